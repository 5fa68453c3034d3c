"""How a folder in PEFT's manner is read: what its config's entries mean, and the sites that its tensors' keys name.

Written against PEFT 0.21. Sites come from the keys and not from the config's patterns; where both are there they have
to agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from ....rewriter.errors import CheckpointError, listing
from .foreign_folder import ForeignFolder, Sites, Tensors, empty
from .peft_targets import told_names
from .stored_modules import stored_modules

#: keys that say where an adapter comes from or how its training began; they change nothing in what it computes
DESCRIPTIVE = frozenset(
    {
        *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
        *("inference_mode", "megatron_core", "qalora_group_size", "eva_config", "init_weights"),
        # the stored factors have one layout whatever the base's is, and the base says itself which it has
        "fan_in_fan_out",
        # what was tied is stored for each of the tied modules, with the values it had
        "ensure_weight_tying",
    }
)
#: keys that name modules
PATTERNS = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"})
_NEUTRAL: Mapping[str, Collection[Any]] = {
    "bias": ("none",),
    # where tensors are kept while it runs
    "runtime_config": ({"ephemeral_gpu_offload": False}, {"ephemeral_gpu_offload": True}),
    # the others start from a changed base weight, so A and B belong to a base that is not the given one
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}
_ADVICE = {
    "bias": "trained base biases are part of a LoRA or VeRA folder only",
    "use_dora": "merge it in PEFT and load the merged model",
    "init_lora_weights": "it changes the base weights; save it in PEFT with path_initial_model_for_weight_conversion",
    "target_parameters": "only LoRA has it",
    "trainable_token_indices": "trained tokens are not part of an adapter here",
}


#: what a config may say of biases that were trained with the adapter, beside `none`
BIASES: Mapping[str, Collection[str]] = {"LORA": ("all", "lora_only"), "VERA": ("all", "vera_only")}


def check_config(folder: ForeignFolder, known: Collection[str], biases: Collection[str] = ()) -> None:
    """Raise for the first entry that would change what the adapter computes and that we do not know.

    Args:
        biases: of `BIASES`, what the format stores.
    """
    for key, given in folder.config.items():
        if key == "bias" and given in biases:
            continue
        if key in known or key in DESCRIPTIVE or key in PATTERNS or empty(given):
            continue
        # `in` alone would take 1 for True
        if any(given is ok or (isinstance(given, (str, dict)) and given == ok) for ok in _NEUTRAL.get(key, ())):
            continue
        advice = f": {_ADVICE[key]}" if key in _ADVICE else ""
        raise CheckpointError(f"{folder.what}: {key}={given!r} in its config is not supported{advice}")


def peft_sites(
    folder: ForeignFolder, pattern: str, tensors: Tensors | None = None
) -> tuple[Sites, tuple[str, ...], dict[str, Tensor]]:
    """The adapter's tensors by site and name, and the modules that come with it: paths and tensors.

    Args:
        pattern: what a key has behind the site, a regular expression with the group `name`.
        tensors: those that are left to explain; by default all.
    """
    given = folder.tensors if tensors is None else tensors
    sites, rest = folder.by_site(given, rf"base_model\.model\.(?P<site>.+)\.{pattern}")
    return sites, *stored_modules(folder, rest)


def check_sites(
    folder: ForeignFolder, sites: Sites, names: Iterable[str] = (), *, loosely: bool = False, others: bool = False
) -> None:
    """Raise unless every site has tensors of these names, and the sites are the layers that the config's patterns name.

    Args:
        loosely: for the forks, whose older PEFT matched names more loosely: a layer with tensors may also end in a
            target as a text, or be one that an expression does not match.
        others: whether the folder has other adapters than on layers, so that it needs none of these.
    """
    what = folder.what
    folder.all_there(sites, names)
    if not sites and not others:
        raise CheckpointError(f"{what} has no adapter tensors at all")
    named = told_names(folder.config, folder.model, what, folder.parts(sites))
    if named is None:
        return
    if missing := [name for name in named if name not in sites]:
        raise CheckpointError(f"{what} lacks the tensors of {len(missing)} layer(s) it targets: {listing(missing)}")
    targets = folder.config["target_modules"]
    endings: tuple[str, ...] = ()  # nothing ends in one of none
    where = f" in this {type(folder.model).__name__}"
    if loosely:
        endings, where = tuple(targets) if isinstance(targets, (list, tuple)) else ("",), ""
    if other := [name for name in sites if name not in named and not name.endswith(endings)]:
        raise CheckpointError(
            f"{what} has tensors for {len(other)} layer(s) that its target_modules={targets!r} do not name{where}: "
            f"{listing(other)}"
        )
