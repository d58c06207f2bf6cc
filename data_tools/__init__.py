"""From pictures and captions to a verified store. Nothing in here imports torch."""
