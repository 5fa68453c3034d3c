"""What of a model's Python becomes a graph: tracing a module alone, and what its forward reads and writes meanwhile."""
