"""Subcommands. Functions import their rooms when called, so that ``--help`` stays quick."""
