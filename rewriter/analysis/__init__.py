"""Questions asked of a graph: who writes, who shares memory, who reads what."""
