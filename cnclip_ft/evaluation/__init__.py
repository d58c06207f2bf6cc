"""Features of whole splits, exact recall, zero-shot classification, thresholds, comparisons and their files."""
