"""Any text encoder of transformers, BERT to Qwen, as a text tower."""
