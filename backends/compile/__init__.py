"""The `torch.compile` backend "fxgraft"."""
