"""Making the graph: the module that is traced, the translation, names, rewrites, inputs, and its files."""
