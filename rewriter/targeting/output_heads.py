"""Which modules produce a model's output: `all-linear` leaves them alone."""

from __future__ import annotations

from torch import nn

from ..analysis.dataflow import tied_names
from ..base_names import base_modules
from ..modules.wrappers import unwrap

#: last path components that name an output head in models that do not declare one
HEAD_NAMES = frozenset(
    {
        *("lm_head", "head", "heads", "classifier", "score", "cls", "qa_outputs"),
        *("embed_out", "output_layer", "output_projection", "prediction_head", "fc_out"),
    }
)


def output_heads(model: nn.Module) -> set[str]:
    """Paths of the modules that produce the model's output.

    They are: what `get_output_embeddings()` names; a linear tied to an embedding; in a transformers model with a head,
    everything outside `base_model`; in any other model, modules whose last name is one of `HEAD_NAMES`.
    """
    modules = dict(base_modules(model))
    paths = {id(m): path for path, m in modules.items()}
    heads = set()
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if callable(get_output_embeddings):
        try:
            head = get_output_embeddings()
        except (NotImplementedError, AttributeError):  # transformers raises these for models without one
            head = None
        if isinstance(head, nn.Module):
            heads.add(paths.get(id(unwrap(head))))
    embeddings = {path for path, m in modules.items() if isinstance(m, nn.Embedding)}
    for name, names in tied_names(model).items():
        owner, _, _ = name.rpartition(".")
        if owner not in embeddings and any(other.rpartition(".")[0] in embeddings for other in names):
            heads.add(owner)
    base = getattr(model, "base_model", None)
    base = unwrap(base) if isinstance(base, nn.Module) else None
    if base is not None and base is not model and id(base) in paths:
        inside = paths[id(base)]
        heads |= {path for path in modules if path and path != inside and not path.startswith(inside + ".")}
    elif not hasattr(model, "base_model"):
        heads |= {path for path in modules if path.rpartition(".")[2] in HEAD_NAMES}
    heads.discard(None)
    return {str(head) for head in heads}
