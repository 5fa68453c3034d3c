"""Whether a compiler or an exporter is looking at this call, and not at one of another thread."""

from __future__ import annotations

import torch


def captured() -> bool:
    """Whether this thread's call is being captured.

    `torch.compiler.is_compiling()` is a flag of the process: it also says yes in a thread that just runs a model while
    another one compiles or exports. What captures runs on fake tensors, in a mode of its own thread.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    fake = torch._C._TorchDispatchModeKey.FAKE
    return torch.compiler.is_compiling() and torch._C._get_dispatch_mode(fake) is not None
