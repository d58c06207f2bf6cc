"""Boxes found against those of a store, and boxes found as a store to learn from."""
