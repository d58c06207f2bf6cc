"""A checkpoint in other formats, checked against its source."""
