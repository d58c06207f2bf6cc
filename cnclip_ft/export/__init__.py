"""A checkpoint in other formats, checked against its source. A format is a module here, named in `run.FORMATS`."""
