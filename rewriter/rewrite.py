"""`rewrite`: graft an adapter into a model, whichever of the three forms the model comes in."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from .create import graft_adapter
from .errors import AdapterError
from .modules.wrappers import unwrap
from .program_verbs import over_programs
from .spec import Spec
from .targeting.train_targets import warn_untied

T = TypeVar("T")


@over_programs
def rewrite(model: T, spec: Spec, name: str = "default", *, dtype: torch.dtype | None = None, update: Any = None) -> T:
    """Graft an adapter into a model and return the adapted model; the input is not changed.

    The result is of the model's own class, shares the base weights' memory, keeps every base state-dict key and adds
    `<owner>.fxgraft.<name>.<tensor>` beside them. The new adapter is the active one. Only its tensors and the modules
    of `spec.train` require grad; these modules are copied, so that training leaves the input model alone.

    Args:
        model: an `nn.Module` (adapted already or not), `fx.GraphModule` or `torch.export.ExportedProgram`.
        spec: what to graft, and where.
        name: of the adapter; letters, digits, `_` and `-`.
        dtype: of the adapter's tensors; by default the site's weight dtype, or float32 where that is narrower than
            float32 or not a floating type.
        update: the result of `estimate_update`, for methods that start from one (LoRA-SB).

    Raises:
        TargetError: a pattern matches nothing, or something that cannot be adapted.
        SpecError: the method does not fit the sites.
        AdapterError: the name is taken or not allowed.
    """
    if not isinstance(spec, Spec):
        raise AdapterError(f"rewrite(model, {type(spec).__name__}): the second argument is an fg.Spec(method, targets)")
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"rewrite({type(model).__name__}, ...): give an nn.Module, an fx.GraphModule or an ExportedProgram"
        )
    warn_untied(unwrap(model), spec)
    return graft_adapter(model, spec, name, dtype=dtype, update=update, fit=True)  # type: ignore[return-value]
