"""What the formats of other programs share: what a format is, how a folder is read, what PEFT's config says."""
