"""Scores of two sets of features, tile by tile: who is found, at which rank. Mathematics only, under evaluation and search."""
