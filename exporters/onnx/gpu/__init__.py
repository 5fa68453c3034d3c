"""Which nodes of a graph stay on the CPU beside a GPU."""
