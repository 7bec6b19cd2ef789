"""How a rank keeps its matrices and multiplies with them."""
