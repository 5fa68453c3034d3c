"""What every written artifact needs: example inputs, a float64 oracle, parity, and writing whole files or none."""
