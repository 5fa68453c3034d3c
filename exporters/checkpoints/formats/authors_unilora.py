"""Uni-LoRA as its authors' fork of PEFT stores it: `base_model.unilora_vector_bank (d,)`, and per site
the indices `unilora_logits_A (r, in)`, `unilora_logits_B (out, r)` and `unilora_norm_A`, `unilora_norm_B` of the same
shapes.

Where the norms are `1 / sqrt(n)`, n being how often the vector's entry is used, it opens as a Uni-LoRA. The authors'
first code looked its norms up with indices it had replaced before, so they need not be that; then the factors are what
they are, and open as a LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ....passes.methods.lora import LoRA
from ....passes.methods.unilora.unilora import UniLoRA
from ..foreign.foreign_folder import ForeignAdapter, ForeignFolder
from ..foreign.format import Format
from ..foreign.peft_folder import check_config, check_sites, peft_sites
from ..foreign.unilora_indices import Pairs, not_counts, pairs, stored_unilora

BANK = "base_model.unilora_vector_bank"


def read(folder: ForeignFolder) -> ForeignAdapter:
    # num_vectors, topk and init_logits_std are left from the method the fork was made of: its code reads none of them
    unread = {"num_vectors", "topk", "init_logits_std"}
    check_config(folder, {"r", "vector_length", "unilora_dropout", "init_vector_bank_bound", *unread})
    rest = dict(folder.tensors)
    theta = rest.pop(BANK, None)
    if theta is None:
        raise folder.lacks([BANK])
    method = UniLoRA(
        rank=folder.value("r", int, 4),
        vector_length=folder.value("vector_length", int, 256),
        dropout=folder.value("unilora_dropout", float, 0.0),
        init_bound=folder.value("init_vector_bank_bound", float, 0.02),
    )
    sites, train, values = peft_sites(folder, r"unilora_(?P<name>(logits|norm)_[AB])", rest)
    check_sites(folder, sites, ("logits_A", "logits_B", "norm_A", "norm_B"), loosely=True)
    indices, norms = (pairs(sites, stem, folder.model) for stem in ("logits", "norm"))
    return opened(folder, method, theta, indices, norms, train, values)


def opened(
    folder: ForeignFolder,
    method: UniLoRA,
    theta: Tensor,
    indices: Pairs,
    norms: Pairs | None,
    train: tuple[str, ...],
    values: Mapping[str, Tensor],
) -> ForeignAdapter:
    """A Uni-LoRA with stored indices, or a LoRA where the norms are others than its. Without norms they are counted.

    Args:
        train, values: the modules that come with the adapter, and their tensors.
    """
    stored, tensors = stored_unilora(method, theta, indices, folder.what)
    if norms is None or not not_counts(indices, norms, method.vector_length, folder.what):
        return ForeignAdapter(dict.fromkeys(indices, stored), {**values, **tensors}, train)
    factors = dict(values)
    for site, pair in indices.items():
        A, B = (theta[index.long()] * norm.to(theta.dtype) for index, norm in zip(pair, norms[site], strict=True))
        factors |= {f"{site}.A": A, f"{site}.B": B}
    lora = LoRA(rank=method.rank, alpha=method.rank, dropout=method.dropout)
    warning = (
        "its norms are not 1 / sqrt(how often an entry is used), as those of the authors' first code are not; it opens "
        "as a LoRA of the same function, and no longer trains one vector"
    )
    return ForeignAdapter(dict.fromkeys(indices, lora), factors, train, warning)


FORMAT = Format(read, names=r"unilora_\w+", key=rf"^{re.escape(BANK)}$|\.unilora_logits_")
