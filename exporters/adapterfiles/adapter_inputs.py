"""What the adapter inputs of a graph are called, and which form they are of.

<site>.<tensor>   a tensor of the site's form; its free sizes are `slots` and `<site>.<axis>`
<name>.delta      of a bank: a stack of differences to the graph's initializer of that name
<name>            a trained tensor in whole, as in the base model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from ...rewriter.forms import SLOTS, Form, form_with

T = TypeVar("T")
Shape = Sequence[int | str | None]
_DIFFERENCE = ".delta"


def at_site(site: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a site by the names of the inputs that take them."""
    return {f"{site}.{name}": tensor for name, tensor in tensors.items()}


def symbol(site: str, axis: str) -> str:
    """What a free size is called. Every site has its own: onnxruntime insists that equal symbols are equal numbers."""
    return axis if axis == SLOTS else f"{site}.{axis}"


def axis_of(size: int | str | None) -> str | None:
    """The axis that a free size is of; None for a number."""
    return size.rpartition(".")[2] if isinstance(size, str) else None


def site_of(name: str) -> str:
    """The site of an input, or what holds a trained tensor."""
    return name.rpartition(".")[0]


def sites_of(shapes: Mapping[str, Shape]) -> dict[str, type[Form] | None]:
    """The sites whose tensors only fit together, as some of their sizes are free, and their forms; None is one that no
    method of ours has."""
    names: dict[str, set[str]] = {}
    for full in shapes:
        names.setdefault(site_of(full), set()).add(full.rpartition(".")[2])
    free = dict.fromkeys(site_of(full) for full, shape in shapes.items() if not all(isinstance(n, int) for n in shape))
    return {site: form_with(names[site]) for site in free if names[site] != {_DIFFERENCE[1:]}}


def right_factors(shapes: Mapping[str, Shape]) -> set[str]:
    """The inputs that a site's delta is linear in: with zeros there, whatever the others are, it is the base."""
    return {f"{site}.{form.right()}" for site, form in sites_of(shapes).items() if form is not None}


def difference(name: str) -> str:
    """The stack of the differences of a tensor that is trained in whole."""
    return f"{name}{_DIFFERENCE}"


def tensor_of(stack: str) -> str:
    """The adapter tensor that goes into a slot of a stack."""
    return stack.removesuffix(_DIFFERENCE)
