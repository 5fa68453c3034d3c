"""Passes from graph to graph, the rule that says what a form costs, and the pipelines."""
