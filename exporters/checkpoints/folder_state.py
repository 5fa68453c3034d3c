"""The state in a folder of ours, without the model: for whoever has none, such as a package."""

from __future__ import annotations

import os

from ...backends.aot.loaded_package import register_folder_reader
from ...backends.artifact.bounded_files import as_path
from ...rewriter.adapter_state import AdapterState, SiteMethod
from ...rewriter.errors import CheckpointError
from ...rewriter.method import Method
from ...rewriter.targets import matches
from .folder import Stored, adapter_folder, check_config_is_theirs, read_folder
from .native import ABOUT, FORMAT, read_spec


def read_state(directory: str | os.PathLike[str]) -> AdapterState:
    """The tensors of a folder that `save_adapter` wrote in fxgraft's format, with the methods they are of.

    Raises:
        CheckpointError: the folder is damaged, or another program's: its names mean something only beside the model.
    """
    stored = read_folder(adapter_folder(as_path(directory)))
    what = f"the adapter in {str(directory)!r}"
    if stored.config.get("format") != FORMAT:
        raise CheckpointError(
            f"{what} is not in fxgraft's own format: load it with fg.load_adapter(model, folder) and give the "
            "fg.adapter_state of that"
        )
    return state_of(stored, what)


def state_of(stored: Stored, what: str) -> AdapterState:
    """The state in a folder of ours that has been read."""
    spec, sites = read_spec(stored, what)
    check_config_is_theirs(stored, ABOUT, what)
    groups: dict[Method, int] = {}
    methods = {}
    for name, (out_features, in_features) in sites.items():
        names = (name, name.partition("[")[0])  # a part of a fused weight answers to the weight's name too
        hits = [m for pattern, m in spec.overrides.items() if any(matches(n, pattern) for n in names)]
        method = hits[0] if hits else spec.method
        group = groups.setdefault(method, len(groups))
        methods[name] = SiteMethod(method, out_features, in_features, group)
    return AdapterState(stored.tensors, methods)


register_folder_reader(read_state)
