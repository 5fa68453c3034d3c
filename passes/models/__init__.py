"""Steps over whole models: many adapters in one, merged, combined, or opened into plain tensors."""
