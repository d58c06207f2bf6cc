"""Search over a recipe's settings: what may change (`space`), one trial (`runner`), the search, what it found (`outcome`)."""
