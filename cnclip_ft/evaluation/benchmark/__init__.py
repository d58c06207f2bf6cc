"""`benchmark`: one model on all public test sets of a folder."""
