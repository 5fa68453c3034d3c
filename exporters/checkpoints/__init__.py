"""Adapters in folders: ours, HF PEFT's and the methods' authors'."""
