"""A model's modules and parameters as the base has them: without adapters, in names without wrappers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from .adapter_tensors import Container
from .errors import AdapterError
from .modules.offloaded import values_of
from .modules.wrappers import unwrap
from .quantised.quantised import quantised
from .sites import Site


def base_modules(model: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the model without the adapters grafted into it; wrappers give what is inside, and no name.

    Args:
        every_name: list a module that stands at several places under each of its names.
    """
    seen: set[int] = set()

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield prefix, module
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, Container):
                yield from walk(f"{prefix}.{name}" if prefix else name, child)
        if every_name:
            seen.discard(id(module))

    return walk("", model)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every base parameter under each of its names, in names without wrappers."""
    for path, module in base_modules(model, every_name=True):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{path}.{name}" if path else name), parameter


def lookup(model: nn.Module, path: str) -> nn.Module:
    """The module of a name without wrappers. Raises `AdapterError` where there is none."""
    module = unwrap(model)
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            raise AdapterError(f"this {type(unwrap(model)).__name__} has no module {path!r}: {part!r} is not there")
        module = unwrap(child)
    return module


def weight_at(modules: Mapping[str, nn.Module], site: Site) -> Tensor:
    """The base weight of a site, as it is stored, wherever that is; of a quantised layer in floating point, made for
    this call."""
    owner = modules[site.owner]
    if (kind := quantised(owner)) is not None:
        return kind.weight(owner)
    weight = values_of(owner, site.weight)
    assert weight is not None
    return weight


def in_order(module: nn.Module, names: Iterable[str]) -> None:
    """Children and tensors in the order of these names: methods with one projection for all sites hand it out so."""
    by_child: dict[str, list[str]] = {}
    for name in names:
        child, _, rest = name.partition(".")
        by_child.setdefault(child, []).extend([rest] if rest else [])
    position = {child: index for index, child in enumerate(by_child)}
    for held in (module._modules, module._parameters, module._buffers):
        ordered = sorted(held.items(), key=lambda item: position.get(item[0], len(position)))  # type: ignore[arg-type]
        held.clear()
        held.update(ordered)  # type: ignore[arg-type]
    for child, inside in by_child.items():
        if inside and (inner := module._modules.get(child)) is not None:
            in_order(inner, inside)
