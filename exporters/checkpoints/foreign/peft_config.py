"""What the entries of PEFT's `adapter_config.json` mean for an adapter, and which are refused. Written against 0.21."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ....rewriter.errors import CheckpointError
from .foreign_folder import ForeignFolder, empty

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
    "bias": "trained base biases are not part of an adapter here",
    "use_dora": "merge it in PEFT and load the merged model",
    "init_lora_weights": "it changes the base weights; save it in PEFT with path_initial_model_for_weight_conversion",
    "target_parameters": "only layers can be targets",
    "trainable_token_indices": "trained tokens are not part of an adapter here",
}


def check_config(folder: ForeignFolder, known: Collection[str]) -> None:
    """Raise for the first entry that would change what the adapter computes and that we do not know."""
    for key, given in folder.config.items():
        if key in known or key in DESCRIPTIVE or key in PATTERNS or empty(given):
            continue
        # `in` alone would take 1 for True
        if any(given is ok or (isinstance(given, (str, dict)) and given == ok) for ok in _NEUTRAL.get(key, ())):
            continue
        advice = f": {_ADVICE[key]}" if key in _ADVICE else ""
        raise CheckpointError(f"{folder.what}: {key}={given!r} in its config is not supported{advice}")
