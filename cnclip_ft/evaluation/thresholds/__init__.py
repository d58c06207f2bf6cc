"""`calibrate`: which cosine means that picture and text match, and how commands are told it."""
