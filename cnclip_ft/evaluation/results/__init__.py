"""How results are told: tables of recall, pictures, what a score depends on, published results to stand beside."""
