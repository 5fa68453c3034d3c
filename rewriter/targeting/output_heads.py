"""Which modules produce a model's output: `all-linear` leaves them alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..analysis.dataflow import tied_names
from ..base_names import base_modules
from ..modules.wrappers import unwrap
from .last_product import feeds_products, last_products
from .model_embeddings import told

#: last path components that name an output head in models that do not declare one
HEAD_NAMES = frozenset(
    {
        *("lm_head", "head", "heads", "classifier", "score", "cls", "qa_outputs"),
        *("embed_out", "output_layer", "output_projection", "prediction_head", "fc_out"),
    }
)


def called_head(path: str) -> bool:
    """Whether a module, or one around it, has the name of a head."""
    return not HEAD_NAMES.isdisjoint(path.split("."))


def output_heads(model: nn.Module) -> set[str]:
    """Paths of the modules that produce the model's output."""
    return set(heads_with_reasons(model))


def heads_with_reasons(model: nn.Module) -> dict[str, str]:
    """Paths of the modules that produce the model's output, and what says so.

    They are: what `get_output_embeddings()` or, in timm, `get_classifier()` names; a linear tied to an embedding; in a
    transformers model with a head, everything outside `base_model`. In any other model: the last product before the
    output where it gives `num_classes` or `num_labels` values, and modules whose last name is one of `HEAD_NAMES`,
    unless a traced forward shows that another product reads what they give.
    """
    modules = dict(base_modules(model))
    paths = {id(m): path for path, m in modules.items()}
    heads: dict[str, str] = {}
    for declares in ("get_output_embeddings", "get_classifier"):
        for path in _declared(model, declares, paths):
            heads.setdefault(path, f"the output head: {declares}() names it")
    embeddings = {path for path, m in modules.items() if isinstance(m, nn.Embedding)}
    for name, names in tied_names(model).items():
        owner, _, _ = name.rpartition(".")
        if owner not in embeddings and any(other.rpartition(".")[0] in embeddings for other in names):
            heads.setdefault(owner, "the output head: tied to an embedding")
    base = getattr(model, "base_model", None)
    base = unwrap(base) if isinstance(base, nn.Module) else None
    if base is not None and base is not model and id(base) in paths:
        inside = paths[id(base)]
        outside = (path for path in modules if path and path != inside and not path.startswith(inside + "."))
        for path in outside:
            heads.setdefault(path, f"a task head: outside of base_model ({inside})")
    elif not hasattr(model, "base_model"):
        for path in _counted(model, modules):
            heads.setdefault(path, "the output head: the last product before the output, a value per class")
        for path in modules:
            if path.rpartition(".")[2] in HEAD_NAMES and not feeds_products(modules, path):
                heads.setdefault(path, "an output head by its name")
    return heads


def _declared(model: nn.Module, method: str, paths: Mapping[int, str]) -> list[str]:
    """The paths of what a model's own method gives as its head."""
    given = told(model, method)
    given = given if isinstance(given, (tuple, list)) else [given]
    found = [paths.get(id(unwrap(head))) for head in given if isinstance(head, nn.Module)]
    return [path for path in found if path]


def _counted(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """The last products of a model that says how many classes it tells apart, where they give so many values."""
    counts = {getattr(model, name, None) for name in ("num_classes", "num_labels")}
    counts = {count for count in counts if isinstance(count, int) and count > 0}
    if not counts:
        return []
    return [path for path in last_products(modules) if path and getattr(modules[path], "out_features", None) in counts]
