"""LoRA-XS and LoRA-SB as their authors' forks of PEFT store them: PEFT's LoRA, and per site
`<adapter>_lora_latent_mapping.weight (r, r)` between A and B.

Both open as `LoRAXS`, which differs from LoRA-SB in its initialisation only; its alpha says the stored scale.
"""

from __future__ import annotations

from ....passes.methods.lora_xs import LoRAXS
from ....rewriter.errors import CheckpointError
from ..foreign.foreign_folder import ForeignAdapter, ForeignFolder
from ..foreign.format import Format
from ..foreign.peft_folder import check_config, check_sites, peft_sites
from .peft_lora import FIELDS, lora_at

MAPPING = "lora_latent_mapping"


def read(folder: ForeignFolder) -> ForeignAdapter:
    check_config(folder, FIELDS)
    middle, rest = folder.by_site(folder.tensors, rf"base_model\.model\.(?P<site>.+)_(?P<name>{MAPPING})\.weight")
    sites, train, values = peft_sites(folder, r"(?P<name>lora_[AB])\.weight", rest)
    for full, given in middle.items():
        # PEFT drops `.<adapter>` from its keys wherever it stands, and here that is half of a name
        site = full if full in sites else full.rpartition(".")[0]
        if site not in sites or MAPPING in sites[site]:
            raise CheckpointError(f"{folder.what}: '{full}_{MAPPING}' belongs to no layer with a lora_A and a lora_B")
        sites[site] |= given
    check_sites(folder, sites, ("lora_A", "lora_B", MAPPING), loosely=True)
    methods = {}
    for site, given in sites.items():
        lora = lora_at(folder, site)
        alpha = lora.scale * lora.rank if lora.rslora else lora.alpha
        methods[site] = LoRAXS(rank=lora.rank, alpha=alpha, dropout=lora.dropout)
        values |= {f"{site}.A": given["lora_A"], f"{site}.B": given["lora_B"], f"{site}.R": given[MAPPING]}
    return ForeignAdapter(methods, values, train)


FORMAT = Format(read, key=MAPPING)
