"""What `data.valid` may hold, one kind a file: its settings, the names of its scores, how it is judged.

A recipe is read without torch, so these files import light things at the top and the rest where it is used.
"""
