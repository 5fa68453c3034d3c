"""The sites of a PEFT-like folder: found by its tensors' keys, compared with the targets that its config names.

Sites come from the keys and not from the config's patterns; where both are there they have to agree.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ....rewriter.errors import CheckpointError, listing
from .foreign_folder import ForeignFolder, Sites, Tensors
from .peft_targets import told_names
from .stored_modules import stored_modules


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


def check_sites(folder: ForeignFolder, sites: Sites, names: Iterable[str] = (), *, loosely: bool = False) -> None:
    """Raise unless every site has tensors of these names, and the sites are the layers that the config's patterns name.

    Args:
        loosely: for the forks, whose older PEFT matched names more loosely: a layer with tensors may also end in a
            target as a text, or be one that an expression does not match.
    """
    what = folder.what
    folder.all_there(sites, names)
    if not sites:
        raise CheckpointError(f"{what} has no adapter tensors at all")
    named = told_names(folder.config, folder.model, what)
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
