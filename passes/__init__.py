"""Graph-to-graph steps and the adapter methods."""
