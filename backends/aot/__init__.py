"""Packages: an adapted model as one .pt2 file that runs without the model's Python."""
