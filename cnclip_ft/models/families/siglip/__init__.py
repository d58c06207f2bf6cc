"""SigLIP and SigLIP 2 (arXiv 2303.15343, 2502.14786): towers under transformers' names, pictures as squares or as patches."""
