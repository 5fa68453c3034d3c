"""The 150 architectures of the matrix, each at tiny size with random weights, and inputs that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

VOCABULARY, TOKENS, BATCH, IMAGE = 101, 12, 2, 32


@dataclass(frozen=True)
class Architecture:
    """One row: the library it is from, what makes the model, and what a forward takes.

    `decodes` says that it generates text token by token, so that a graph with a cache is wanted of it.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Any]]
    decodes: bool = False

    def made(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model in eval mode and its inputs, the same ones at every call."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # a fresh model may be zero where a trained one is not
                if parameter.is_floating_point() and not parameter.any():
                    parameter.normal_(0, 0.02)
        torch.manual_seed(1)
        return model, self.inputs(model)
