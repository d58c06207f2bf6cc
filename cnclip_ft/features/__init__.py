"""Features of whole splits: computed once, kept on disk by block, taken up where they were left, read as memory maps."""
