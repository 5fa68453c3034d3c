"""Linear layers whose weight is stored in fewer bits: how each package keeps it, a file each."""
