"""What belongs to one call of a model: what it is told, and whether adapters are off in it."""
