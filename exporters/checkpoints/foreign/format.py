"""A format of another program: what its folders are known by, how they are read and, for PEFT's own, written.

A new one is a file of its own in `formats/` with a constant `FORMAT`; nothing else is touched. `peft_vera.py` is one
with everything, a fork of PEFT is as short as `authors_hydralora.py`:

    check_config(folder, {...})        refuses config entries that are not named here and could matter
    peft_sites(folder, pattern)        tensors by site, and the modules that come with the adapter
    check_sites(folder, sites, names)  none is missing, and they are the layers that the config names
    folder.value(key, type, default)   a config entry, of the right type
    ForeignAdapter(...)                the method of every site, tensors in the names of `adapter_state`

A reader uses every tensor and config entry or raises; that they fit the model is checked after it, for all formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ....rewriter.adapter_tensors import AdapterTensors
from ....rewriter.base_names import base_modules, lookup
from ....rewriter.errors import CheckpointError
from ....rewriter.method import Method
from ....rewriter.state import AdapterRecord
from .foreign_folder import Config, ForeignAdapter, ForeignFolder, Tensors
from .peft_attention import adapted_attentions
from .peft_targets import is_conv1d

Written = tuple[dict[str, Any], dict[str, Tensor]]  # entries of the config, tensors


@dataclass(frozen=True)
class OwnAdapter:
    """An adapter of ours that is to be written in PEFT's format.

    Args:
        root: the adapted model.
        sites: site name -> its tensors.
        what: subject of the error texts.
        save_indices: what `save_adapter` was told; None for every method without indices.
        parameters: the sites that are parameters to PEFT, and no layers it wraps.
    """

    root: nn.Module
    record: AdapterRecord
    sites: Mapping[str, AdapterTensors]
    what: str
    save_indices: bool | None
    parameters: tuple[str, ...] = ()

    @property
    def methods(self) -> dict[str, Any]:
        """Site name -> its method, in the order the sites count in."""
        return {site.name: group.method for group in self.record.groups for site in group.sites}

    @property
    def attentions(self) -> list[str]:
        """The attentions that are adapted as a whole."""
        kinds = {type(group.method).key for group in self.record.groups}
        return adapted_attentions(self.record, dict(base_modules(self.root)), self.what) if kinds == {"lora"} else []

    @property
    def on_conv1d(self) -> bool:
        """What PEFT's `fan_in_fan_out` says."""
        return any(is_conv1d(lookup(self.root, site.owner)) for site in self.record.sites)

    def only_method(self, shared: str) -> Any:
        """The method of all sites.

        Args:
            shared: what PEFT has one of, such as `vector per Uni-LoRA`.
        """
        if (count := len(self.record.groups)) > 1:
            raise CheckpointError(
                f"{self.what}: PEFT has one {shared} adapter, this one has {count} (overrides). fg.to_lora(adapted) is "
                "the same function as a LoRA: save that, or use format='fxgraft'"
            )
        return self.record.groups[0].method

    def one(self, values: Iterable[Any], field: str) -> Any:
        """The value all sites share."""
        first, *others = sorted(set(values))
        if others:
            raise CheckpointError(f"{self.what}: PEFT has one {field} per adapter, this one has {[first, *others]}")
        return first


@dataclass(frozen=True)
class Format:
    """One way to store adapters of a method.

    Args:
        read: the adapter in a folder of this format; raises for whatever it has no use for.
        names: a regular expression for the parts of its keys that name a tensor, where an adapter's name may follow
            (`X.<name>`, `X.<name>.<adapter>`, `X.<name>.<adapter>.<leaf>`).
        leaves: what may stand behind such a part beside `weight` and `bias`.
        peft_type: of a format of PEFT's own, which is known by it.
        key, entry: what the others are known by: a regular expression found in one of the tensors' keys, or
            what is to be seen in the config.
        method: what `write` writes, in PEFT's format.
        has_indices: whether `save_indices` means something to it.
    """

    read: Callable[[ForeignFolder], ForeignAdapter]
    names: str = ""
    leaves: tuple[str, ...] = ()
    peft_type: str = ""
    key: str = "(?!)"
    entry: Callable[[Config], bool] = lambda config: False
    method: type[Method] | None = None
    write: Callable[[OwnAdapter], Written] | None = None
    has_indices: bool = False

    def knows(self, config: Config, tensors: Tensors) -> bool:
        """Whether a folder is in this format. Tensors of a PEFT-like folder come under `plain_keys`."""
        if self.peft_type:
            return bool(config.get("peft_type") == self.peft_type)
        return self.entry(config) or any(re.search(self.key, key) for key in tensors)
