"""`classify`: pictures sorted by classes from a list or a kept column (arXiv 2103.00020, 3.1)."""
