"""How models multiply with their weights: what is special about a kind of product, a file each."""
