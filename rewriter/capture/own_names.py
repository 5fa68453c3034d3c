"""Tensors of a graph under the names that they had in the model: Dynamo gives them names of its own.

    L__self___layers_0_q_weight   ->   layers.0.q.weight      `torch._dynamo.export` says which is which
    _param_constant3              ->   layers.0.q.weight      with `aten_graph=True` the layer that reads it says so

Does not handle what only a module other than `nn.Linear` reads in an ATen graph: it keeps its name.
"""

from __future__ import annotations

import re
from typing import Any

from torch import fx, nn

FLAT = "dynamo_flat_name_to_original_fqn"  # in the meta of a graph module


def own_names(gm: fx.GraphModule) -> None:
    """Rename the tensors of a graph module that Dynamo captured, in place; any other is left alone."""
    names: dict[str, str] = dict(gm.meta.get(FLAT) or _by_reader(gm))
    held = {name: where for where in (gm._parameters, gm._buffers) for name in where}
    taken: set[str] = set()
    for flat, own in names.items():
        if flat not in held or flat == own or own in taken or not _free(gm, own):
            continue
        taken.add(own)
        _move(gm, flat, own, persistent=flat not in gm._non_persistent_buffers_set)
        for node in gm.graph.nodes:
            if node.op == "get_attr" and node.target == flat:
                node.target = own
    if taken:
        gm.meta.pop(FLAT, None)
        gm.recompile()


def _by_reader(gm: fx.GraphModule) -> dict[str, str]:
    """The weights and biases of `nn.Linear` in an ATen graph, by the module that Dynamo noted at their reads."""
    found: dict[str, str] = {}
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack") if node.op == "get_attr" else None
        if not stack or not re.fullmatch(r"_param_constant\d+", str(node.target)):
            continue
        path, kind = list(stack.values())[-1]
        own = _path(str(path))
        if own and (kind is nn.Linear or str(kind).endswith("nn.modules.linear.Linear")):
            attribute = "weight" if gm._parameters[node.target].dim() == 2 else "bias"  # type: ignore[union-attr]
            found[str(node.target)] = f"{own}.{attribute}"
    return found


def _path(source: str) -> str:
    """`L['self'].layers.0.q`, `L['self']._modules['layers'][0].q` -> `layers.0.q`; empty where it is no path."""
    match = re.match(r"L\[['\"]\w+['\"]\]", source)
    if match is None:
        return ""
    rest = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", source[match.end() :]).replace("._modules", "").lstrip(".")
    return rest if re.fullmatch(r"\w+(\.\w+)*", rest) else ""


def _free(gm: fx.GraphModule, name: str) -> bool:
    """Whether a dotted name can be given: nothing is there, and what is above it can hold it."""
    module: Any = gm
    *above, leaf = name.split(".")
    for part in above:
        if part in module._parameters or part in module._buffers:
            return False
        module = module._modules.get(part)
        if module is None:
            return True
    return not hasattr(module, leaf)


def _move(gm: fx.GraphModule, flat: str, own: str, persistent: bool) -> None:
    module: nn.Module = gm
    *above, leaf = own.split(".")
    for part in above:
        if part not in module._modules:
            module._modules[part] = nn.Module()
        module = module._modules[part]  # type: ignore[assignment]
    if flat in gm._parameters:
        module.register_parameter(leaf, gm._parameters.pop(flat))
    else:
        module.register_buffer(leaf, gm._buffers.pop(flat), persistent=persistent)
        gm._non_persistent_buffers_set.discard(flat)
