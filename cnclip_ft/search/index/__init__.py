"""The index on disk: what is listed, encoded part by part, and replaced whole."""
