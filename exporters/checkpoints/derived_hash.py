"""A hash of what an adapter derives instead of storing it, saved with it and compared where it is opened."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import nn

from ...rewriter.errors import CheckpointError
from ...rewriter.modules.shards import full
from ...rewriter.modules.wrappers import unwrap
from ...rewriter.state import record_of
from ...rewriter.tensors import adapter_modules
from .folder_files import Stored, update_hash

#: where it stands: an entry of our own config, and of the tensors' metadata where the config is PEFT's
IN_CONFIG, IN_METADATA = "derived", "fxgraft.derived"


def derived_hash(
    model: nn.Module, name: str, *, signs: bool = True, names: Mapping[str, str] | None = None
) -> str | None:
    """SHA-256 of what an adapter draws by its config (Uni-LoRA's indices, VeRA's A and B); None: nothing.

    A vector means something only under the very indices it was trained with, and those follow from the config, the
    order of the sites and a random generator.

    Args:
        signs: of real numbers the signs only, which a model in another dtype rounds to the same; older folders have
            the hash of their values.
        names: of sites that were called otherwise where it was saved -> what they were called.
    """
    root = unwrap(model)
    told, any_there = hashlib.sha256(), False
    for here, tensors in adapter_modules(root, name, record_of(root, name)):
        known = here if tensors.site is None else (names or {}).get(tensors.site.name)
        prefix = here if known in (None, here) else f"{known}."
        for key in sorted(tensors._non_persistent_buffers_set if tensors.method.drawn else ()):
            tensor = tensors._buffers[key]
            if tensor is None or tensor.is_meta:
                return None
            tensor, any_there = full(tensor), True
            update_hash(told, prefix + key, tensor.signbit() if signs and tensor.is_floating_point() else tensor)
    return told.hexdigest() if any_there else None


def check_derived(model: nn.Module, name: str, stored: Stored, names: Mapping[str, str] | None = None) -> None:
    """Raise where an adapter derives something else here than where it was saved; without a hash nothing is known."""
    said = stored.metadata.get(IN_METADATA, stored.config.get(IN_CONFIG))
    if said is None or derived_hash(model, name, names=names) in (None, said):
        return
    if derived_hash(model, name, signs=False, names=names) != said:
        raise CheckpointError(
            f"{stored.what} was trained with another projection than its config gives here: the order of the model's "
            "layers or the random generator of numpy or torch is another one. Load it where it was saved, and save it "
            "with format='peft', save_indices=True (Uni-LoRA, VeRA), or fg.to_lora(adapted), which is exact"
        )
