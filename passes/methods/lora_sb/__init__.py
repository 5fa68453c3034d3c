"""LoRA-SB (arXiv 2411.19557): the method, and the estimate of the first update that it starts from."""
