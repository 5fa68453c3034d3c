"""Groups of parameters for an optimizer: what an adapter's kinds of tensors want differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .base_names import base_modules
from .errors import AdapterError, listing
from .modules.wrappers import unwrap
from .program_verbs import over_programs
from .state import state_of
from .tensors import adapter_modules, trained_modules


@over_programs
def parameter_groups(
    adapted: nn.Module,
    lr: float | None = None,
    weight_decay: float = 0.0,
    *,
    vector_lr: float | None = None,
    head_lr: float | None = None,
) -> list[dict[str, Any]]:
    """What an optimizer takes for its parameters: every tensor that requires grad, once, in groups.

        optimizer = torch.optim.AdamW(fg.parameter_groups(adapted, lr=1e-4, weight_decay=0.1, vector_lr=5e-3))

    | group           | holds                                                      | rate        | decay          |
    | `adapter`       | the adapters' tensors                                      | `lr`        | `weight_decay` |
    | `vector`        | those that scale what is frozen (Uni-LoRA's, VeRA's)      | `vector_lr` | 0              |
    | `head`, `base`  | modules trained with an adapter; base weights you unfroze  | `head_lr`, `lr` | `weight_decay` |
    | `*_no_decay`    | biases and norms of these                                  | as theirs   | 0              |

    Groups without tensors are left out; a rate that is not given is `lr`, and without that the optimizer's.
    Tensors of adapters that are not active do not require grad and are not in a group.

    Raises:
        AdapterError: nothing requires grad, a value is out of range, or a rate is for tensors the model does not have.
    """
    root, state = unwrap(adapted), state_of(adapted)
    values = {"lr": lr, "vector_lr": vector_lr, "head_lr": head_lr, "weight_decay": weight_decay}
    for name, value in values.items():
        optional = value is None and name != "weight_decay"
        if not optional and not (_number(value) and 0 <= value < float("inf")):  # type: ignore[operator]
            raise AdapterError(f"parameter_groups({name}={value!r}): allowed are finite numbers from 0 up")
    kinds = _kinds(root, list(state.adapters))
    found: dict[str, list[nn.Parameter]] = {}
    for parameter in root.parameters():  # each once, tied ones too
        if parameter.requires_grad:
            found.setdefault(_group(parameter, kinds), []).append(parameter)
    if not found:
        raise AdapterError(
            f"parameter_groups: no tensor of this model requires grad; set_active(model, [...]) turns on those of the "
            f"adapters it names, and the model has {listing(state.adapters)}"
        )
    rates = {"vector": vector_lr, "head": head_lr}
    for kind, rate in rates.items():
        if rate is not None and not any(group.startswith(kind) for group in found):
            raise AdapterError(f"parameter_groups({kind}_lr={rate}): it trains {listing(found)} tensors only")
    groups = []
    for name, parameters in found.items():
        own = rates.get(name.removesuffix("_no_decay"))
        rate = lr if own is None else own
        decay = 0.0 if name == "vector" or name.endswith("_no_decay") else float(weight_decay)
        group = {"params": parameters, "name": name, "weight_decay": decay}
        groups.append(group if rate is None else {**group, "lr": float(rate)})
    return groups


def _kinds(root: nn.Module, names: Sequence[str]) -> dict[int, str]:
    """`id(parameter) -> kind` of the adapters' tensors; all others are the base's."""
    kinds: dict[int, str] = {}
    modules, state = dict(base_modules(root)), state_of(root)
    for name in names:
        for _, tensors in adapter_modules(root, name, state.adapters[name], modules):
            vectors = tensors.method.vectors
            kinds |= {id(p): "vector" if n in vectors else "adapter" for n, p in tensors.named_parameters()}
        for module in trained_modules(root, name, state.adapters[name], modules).values():
            kinds |= {id(p): "head" for p in module.parameters()}
    return kinds


def _group(parameter: nn.Parameter, kinds: dict[int, str]) -> str:
    kind = kinds.get(id(parameter), "base")
    return f"{kind}_no_decay" if kind in ("head", "base") and parameter.dim() < 2 else kind


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
