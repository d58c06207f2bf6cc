"""The families of dual encoders: a small module each, with towers, tokenizer, preprocessing and the names they have in files."""
