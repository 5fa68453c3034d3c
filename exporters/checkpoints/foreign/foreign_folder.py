"""A folder that another program wrote, and the adapter in it in our terms.

config + tensors in their names  --a reader of `formats/`-->  methods by site + tensors in our names
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ....rewriter.base_names import base_modules
from ....rewriter.errors import CheckpointError, listing
from ....rewriter.method import Method
from ....rewriter.modules.wrappers import unwrap
from ....rewriter.targeting.fused_parts import parts_by_name
from ....rewriter.targeting.fused_presets import fused
from ....rewriter.targeting.weight_products import candidates_of
from .peft_targets import is_conv1d

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Sites = dict[str, dict[str, Tensor]]  # site -> name -> tensor
_NEEDED = object()


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of another program in our terms.

    Args:
        methods: site name -> its method.
        tensors: in the names of `adapter_state`, in whatever floating dtype they were stored.
        train: paths of the modules, and names of the single parameters, that come with the adapter.
        warning: what whoever opens it has to know.
        read_by_parent: sites whose weight a module above reads, and where the adapter acts all the same.
    """

    methods: Mapping[str, Method]
    tensors: Tensors
    train: tuple[str, ...] = ()
    warning: str = ""
    read_by_parent: Collection[str] = ()


@dataclass(frozen=True)
class ForeignFolder:
    """What a reader is given.

    Args:
        tensors: under `plain_keys` where the folder is PEFT-like.
        model: the one it is opened on.
        what: subject of the error texts.
    """

    config: Config
    tensors: Tensors
    model: nn.Module
    what: str

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The base model's modules by name."""
        return dict(base_modules(unwrap(self.model)))

    @cached_property
    def known_parts(self) -> dict[str, tuple[str, int, int]]:
        """The names that parts of fused layers would have as layers -> the fused layer and the part's `(in, out)`."""
        found = {}
        candidates = candidates_of(self.modules)
        for name, site in parts_by_name(self.modules, candidates).items():
            layer, _, number = site.removesuffix("]").partition("[")
            sizes, known = self.sizes(layer), fused(self.modules, candidates[layer])
            if name not in self.modules and sizes is not None and known is not None and known.fits(layer, sizes[1]):
                cut = known.cut(layer, sizes[1])
                found[name] = (layer, sizes[0], cut.groups * cut.sizes[int(number)])
        return found

    def parts(self, sites: Collection[str]) -> list[str]:
        """The names of parts of fused layers, of such kinds as are among these sites, wherever the model has one."""
        strange = [site for site in sites if site not in self.modules]
        leaves = {site.rpartition(".")[2] for site in strange if site in self.known_parts}
        return [name for name in self.known_parts if name.rpartition(".")[2] in leaves] if leaves else []

    def has_bias(self, site: str) -> bool:
        """Whether the base layer of a site has a bias."""
        layer = site if site in self.modules else self.known_parts.get(site, (site,))[0]
        return getattr(self.modules.get(layer), "bias", None) is not None

    def sizes(self, site: str) -> tuple[int, int] | None:
        """`(in, out)` of a layer; None where the model has none of that name with a matrix as its weight."""
        layer: Any = self.modules.get(site)
        if layer is None and site in self.known_parts:
            return self.known_parts[site][1:]
        if isinstance(layer, nn.Linear):  # a quantiser's weight has another shape
            return layer.in_features, layer.out_features
        shape = tuple(getattr(getattr(layer, "weight", None), "shape", ()))
        if len(shape) != 2:
            return None
        return shape if is_conv1d(layer) else (shape[1], shape[0])

    def value(self, key: str, kind: type, default: Any = _NEEDED) -> Any:
        """A config entry of the right type; `float` takes whole numbers too."""
        given = self.config.get(key)
        if given is None and default is not _NEEDED:
            return default
        kinds = (int, float) if kind is float else kind
        if (isinstance(given, bool) and kind is not bool) or not isinstance(given, kinds):
            raise CheckpointError(f"{self.what}: the config's {key!r} is {given!r}, expected a {kind.__name__}")
        return given

    def only_entries(self, known: Collection[str]) -> None:
        """Raise if the config says anything beyond the known keys."""
        if unknown := [f"{k}={v!r}" for k, v in self.config.items() if k not in known and not empty(v)]:
            raise CheckpointError(f"{self.what}: not supported in its config: {', '.join(unknown[:8])}")

    def by_site(self, tensors: Tensors, pattern: str) -> tuple[Sites, dict[str, Tensor]]:
        """Tensors by site and name, and what is left over, by its key.

        Args:
            pattern: a regular expression for whole keys with the groups `site` and `name`.
        """
        sites: Sites = {}
        rest = {}
        for key, tensor in tensors.items():
            found = re.fullmatch(pattern, key)
            if found:
                sites.setdefault(found["site"], {})[found["name"]] = tensor
            else:
                rest[key] = tensor
        return sites, rest

    def misfit(self, name: str, A: Tensor, B: Tensor, experts: int) -> CheckpointError:
        return CheckpointError(
            f"{self.what}: the factors of {name!r} are {tuple(A.shape)} and {tuple(B.shape)}, which fit no rank for "
            f"{experts or 1} matrices"
        )

    def lacks(self, keys: Collection[str]) -> CheckpointError:
        return CheckpointError(f"{self.what} lacks {len(keys)} tensor(s): {listing(keys)}")

    def all_there(self, sites: Sites, names: Iterable[str]) -> None:
        """Raise unless every site has all of these tensors."""
        if missing := [f"{site}: {name}" for site, given in sites.items() for name in names if name not in given]:
            raise self.lacks(missing)

    def none_left(self, rest: Collection[str]) -> None:
        """Raise if there are tensors the reader has no use for."""
        if rest:
            raise CheckpointError(f"{self.what} has {len(rest)} tensor(s) that are not understood: {listing(rest)}")


def in_model_order(names: Collection[str], model: nn.Module) -> list[str]:
    """The names in the order of the model's modules; those it does not have come last."""
    order = {name: i for i, (name, _) in enumerate(base_modules(unwrap(model)))}
    stems = {name: name.partition("[")[0] for name in names}  # a part of a fused layer comes where the layer is
    places = {n: order.get(s, order.get(s.rpartition(".")[0], len(order))) for n, s in stems.items()}
    return sorted(names, key=lambda name: (places[name], name if name != stems[name] else ""))


def empty(given: Any) -> bool:
    """Whether a config entry switches nothing on."""
    return given is None or given is False or given == {} or given == []
