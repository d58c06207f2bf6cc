"""Files of others in: recognised by content, read without executing anything, renamed to our names."""
