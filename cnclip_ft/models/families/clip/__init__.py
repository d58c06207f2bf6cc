"""CLIP (arXiv 2103.00020) and MetaCLIP 2 (arXiv 2507.22062): a ViT or ResNet image tower, a causal text tower read at its end."""
