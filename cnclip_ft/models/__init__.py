"""Towers, the two of them as one model, checkpoints, and where a run's weights come from."""
