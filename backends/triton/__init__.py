"""Triton kernels for adapter operators on NVIDIA GPUs, and the pass that puts them in (`lower.py`).

Every kernel is an operator of the namespace `fxgraft_kernels` with a plain PyTorch definition beside it, which runs
wherever the kernel cannot: without triton, on a CPU, on another accelerator. Nothing here needs triton to be imported.
"""
