"""Chinese CLIP (arXiv 2211.01335): a ViT or ResNet image tower, a RoBERTa text tower, BERT WordPiece, pictures squashed to a square."""
