"""AltCLIP (arXiv 2211.06679): CLIP's image tower, an XLM-R text tower that learnt CLIP's text space."""
