"""Holding a graph against torch and against its record, at its export and in `verify`."""
