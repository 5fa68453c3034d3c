"""GLoRA (arXiv 2306.07967): the method, its paths, and the search for them."""
