"""`fg.swap`: other values for an adapter, from a state, a model, or a saved folder of any format."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from ...rewriter.adapter_state import AdapterState
from ...rewriter.program_verbs import over_programs
from ...rewriter.state import record_of
from ...rewriter.switch import base_of
from ...rewriter.tensors import adapter_state, widened_like
from ...rewriter.tensors import swap as swap_state
from .derived_hash import check_derived
from .folder_files import read_folder
from .load_adapter import load_adapter
from .own_format import is_own, own_state


@over_programs
def swap(
    model: nn.Module, state: Mapping[str, Tensor] | nn.Module | str | os.PathLike[str], name: str = "default"
) -> None:
    """Give an adapter other values of the same structure, in place; a compiled model is not compiled anew.

    A call going on in another thread meanwhile may see some tensors new and some old: swap between calls.

    Args:
        model: the adapted model, or what compiled it.
        state: what `adapter_state` gives, which remembers its methods; a plain dict, taken as values of this adapter's
            structure; an adapted model with an adapter of that name, or one adapter; or a folder with a saved adapter
            (fxgraft's, PEFT's or the authors' format; stored in a narrower dtype than the model's, it is widened).

    Raises:
        AdapterError: a tensor is missing, unknown, of another shape or dtype, or not finite; or the state's method
            would compute something else (another alpha, rank, seed, ...). Nothing has been written then.
        CheckpointError: the folder cannot be read, or is of another model.
    """
    if isinstance(state, (str, os.PathLike)):
        record_of(model, name)
        there = _in_folder(model, state, name)
        state = AdapterState(widened_like(adapter_state(model, name), there), there.methods)
    swap_state(model, state, name)


def _in_folder(model: nn.Module, directory: str | os.PathLike[str], name: str) -> AdapterState:
    """The state in a folder. Only other programs' folders need the base model, to know what their names mean."""
    stored = read_folder(directory, name)
    if not is_own(stored):
        return adapter_state(load_adapter(base_of(model), directory, name), name)
    there = own_state(stored)
    check_derived(model, name, stored)
    return there
