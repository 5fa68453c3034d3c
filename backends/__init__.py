"""What runs or compiles an adapted graph."""
