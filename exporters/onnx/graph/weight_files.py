"""Weights beside a graph, in files called after their content: `<sha256>.weights`.

    <digest of the base model>.weights    every tensor of the base model, in the form graphs use it (`w` or `w.T`)
    <digest of the rest>.weights          what a graph has besides: merged sites, banks of adapters

The first file is the same for the base, merged, swappable and bank graphs of one base model, so in one folder they
share it. A new export never writes over a file that an older graph reads: other content has another name. Tensors are
written one at a time; no second copy of the weights is made.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ....backends.artifact.bounded_files import sha256

# Smaller tensors stay in the graph: a reader of its constants has them at hand.
SMALL = 256
# Tensors begin at a page, so that a reader can map them.
_PAGE = 4096


def base_forms(model: Any, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base model's tensors in the forms the graph has them: `w`, or `w.T` where all products take it transposed.

    To be asked before anything is opened or folded, so that the answer is that of the base model in every mode.
    """
    forms = {}
    for name, value in model.graph.initializers.items():
        if name not in base:
            continue
        turned = [base[name].dim() == 2 and use.node.op_type == "Transpose" for use in value.uses()]
        if turned and all(turned):
            forms[f"{name}.T"] = base[name].detach().t()
        else:
            forms[name] = base[name].detach()
    return {name: forms[name] for name in sorted(forms) if forms[name].nbytes > SMALL}


def lay_out(model: Any, folder: Path, target: Path, forms: Mapping[str, torch.Tensor]) -> dict[Path, Path]:
    """Move a graph's weights into files in `folder`, and let the graph refer to them.

    A file that is in the `target` folder already is not written again: an empty one of its size stands for it until
    `link`. Returns {file in `folder`: file in `target`} of those.
    """
    import onnx_ir as ir

    initializers = model.graph.initializers
    values = {
        name: value.const_value
        for name, value in initializers.items()
        if value.const_value is not None and value.const_value.nbytes > SMALL
    }
    shared = [name for name, value in values.items() if name in forms and _same(value, forms[name])]
    rest = {name: value for name, value in values.items() if name not in shared}
    base = {name: _torch_tensor(tensor, name) for name, tensor in forms.items()} if shared else {}
    links: dict[Path, Path] = {}
    for names, tensors in ((shared, base), (list(rest), rest)):
        if not names:
            continue
        places = _places(tensors)
        digest = hashlib.sha256()
        for block in _bytes(tensors, places):
            digest.update(block)
        location = f"{digest.hexdigest()}.weights"
        with (folder / location).open("wb") as stream:
            if (target / location).is_file() and sha256(target / location) == digest.hexdigest():
                stream.truncate((target / location).stat().st_size)
                links[folder / location] = target / location
            else:
                stream.writelines(_bytes(tensors, places))
        for name in names:
            value = initializers[name].const_value
            initializers[name].const_value = ir.ExternalTensor(
                location, *places[name], value.dtype, shape=value.shape, name=name, base_dir=folder
            )
    return links


def link(links: Mapping[Path, Path]) -> None:
    """Put the files that were there already in the place of those that stand for them: onnx.checker, which looks at
    sizes only, takes no file with two names."""
    for file, existing in links.items():
        file.unlink()
        try:
            os.link(existing, file)
        except OSError:  # a file system without hard links
            shutil.copyfile(existing, file)


def _places(tensors: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(offset, length) of every tensor in a file that has them in this order."""
    places, end = {}, 0
    for name, tensor in tensors.items():
        offset = -(-end // _PAGE) * _PAGE
        end = offset + tensor.nbytes
        places[name] = (offset, tensor.nbytes)
    return places


def _bytes(tensors: Mapping[str, Any], places: Mapping[str, tuple[int, int]]) -> Iterator[Any]:
    """The content of the file, a tensor at a time."""
    end = 0
    for name, tensor in tensors.items():
        offset, length = places[name]
        yield bytes(offset - end)
        yield tensor.tobytes()
        end = offset + length


def _torch_tensor(tensor: torch.Tensor, name: str) -> Any:
    from onnx_ir.tensor_adapters import TorchTensor

    return TorchTensor(tensor, name=name)


def _same(value: Any, tensor: torch.Tensor) -> bool:
    """Whether an initializer holds exactly this tensor."""
    raw = value.raw
    if not isinstance(raw, torch.Tensor):
        raw = torch.from_numpy(raw) if getattr(raw, "dtype", None) in _NUMPY else None
    if raw is None or raw.shape != tensor.shape or raw.dtype is not tensor.dtype:
        return False
    raw = raw.detach()
    if raw.data_ptr() == tensor.data_ptr() and raw.stride() == tensor.stride():
        return True
    return torch.equal(raw.to(tensor.device), tensor)


_NUMPY: Sequence[str] = ("float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool")
