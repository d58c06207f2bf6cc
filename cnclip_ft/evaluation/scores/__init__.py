"""`evaluate` and `compare`: recall with all it depends on, twins, the official result files, differences and chance."""
