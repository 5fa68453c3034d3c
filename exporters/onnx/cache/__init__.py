"""Decoders with their cache as inputs and outputs of a graph."""
