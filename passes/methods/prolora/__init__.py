"""PRoLoRA (arXiv 2402.16902): LoRA whose factors repeat a small chunk."""
