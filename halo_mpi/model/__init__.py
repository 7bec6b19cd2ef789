"""What the model computes: its shape, its tokenizer and the mathematics of a share of it. Knows no MPI."""
