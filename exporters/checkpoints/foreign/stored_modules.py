"""Modules of the base that a folder stores beside the adapter: those trained with it, and weights that came along."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ....rewriter.base_names import base_modules, base_parameters
from ....rewriter.errors import CheckpointError, listing
from ....rewriter.modules.wrappers import unwrap
from ....rewriter.targeting.model_embeddings import told_embeddings
from ....rewriter.targeting.patterns import inside
from .foreign_folder import ForeignFolder
from .peft_targets import names_in, saved_names
from .plain_keys import PREFIX, WRAPPERS

#: heads PEFT adds to `modules_to_save` by itself, whether the model has them or not
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


_EMBEDDINGS = ("embed_tokens", "lm_head")  # what PEFT takes for them by name


def stored_modules(folder: ForeignFolder, rest: Mapping[str, Tensor]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The modules saved with the adapter of a PEFT-like folder and their tensors under base keys; what is left of
    `rest` are weights of the base that came along (`base_weights`), or it is an error."""
    config, model, what = folder.config, folder.model, folder.what
    endings = names_in(config.get("modules_to_save") or [], "modules_to_save", what)
    train = []
    for ending in dict.fromkeys(endings):
        names = saved_names([ending], model)
        if not names and ending not in _HEADS.get(str(config.get("task_type")), ()):
            raise CheckpointError(f"{what}: modules_to_save names {ending!r}, which this {type(model).__name__} lacks")
        train += [name for name in names if name not in train]
    known = {n for n, _ in base_modules(unwrap(model)) if n and any(n.endswith(e) for e in endings)}
    if inner := sorted(n for n in known if any(n.startswith(f"{other}.") for other in train)):
        raise CheckpointError(
            f"{what}: modules_to_save={endings} names {listing(inner)} inside a module that it names too: PEFT has two "
            "such modules, stores both under one name, and the file does not say which it holds"
        )
    tensors, others, left = {}, {}, []
    biases = _trained_biases(folder)
    for key, tensor in rest.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            left.append(key)
        elif any(name.startswith(f"{path}.") for path in train):
            tensors[name] = tensor
        elif (own := name.replace(".base_layer.", ".")) in biases:
            tensors[own] = tensor
        else:
            others[name] = tensor
    lost = [name for name in biases if name not in tensors] if config.get("bias") == "all" else []
    if lost := [name for name in lost if not inside(name, train)]:
        raise CheckpointError(
            f"{what}: bias='all' in its config says that all biases were trained, and it stores none of "
            f"{listing(lost, 4)}: it was saved without them"
        )
    also, values, unknown = base_weights(folder, others, embeddings(model))
    folder.none_left([*left, *(PREFIX + name for name in unknown)])
    return (*train, *also, *(name for name in biases if name in tensors)), {**tensors, **values}


def _trained_biases(folder: ForeignFolder) -> tuple[str, ...]:
    """The biases that PEFT has trained with the adapter: `bias` is `all`, or `lora_only` for those of its layers."""
    if folder.config.get("bias", "none") == "none":
        return ()
    own = base_parameters(unwrap(folder.model))
    return tuple(dict.fromkeys(name for name, _ in own if name.endswith(".bias")))


def embeddings(model: nn.Module) -> set[str]:
    """The input and output embeddings, which PEFT stores with an adapter that does not name them."""
    root = unwrap(model)
    found = {id(told_embeddings(root, which)) for which in ("input", "output")}
    return {n for n, m in base_modules(root, every_name=True) if id(m) in found or n.split(".")[-1] in _EMBEDDINGS}


def base_weights(
    folder: ForeignFolder, given: Mapping[str, Tensor], trained: Collection[str] | None = None
) -> tuple[tuple[str, ...], dict[str, Tensor], list[str]]:
    """Weights of the base stored with an adapter: embeddings that PEFT adds by itself, whole state dicts.

    A tensor that equals the model's says nothing. Where it differs, its module comes with the adapter, as if it had
    been trained with it.

    Args:
        given: by the model's own names; a layer with an adapter has its base weight under `<site>.base_layer.`.
        trained: the modules that may differ; None allows it for every one.

    Returns:
        the modules that differ, their whole state, and the keys that are not understood.

    Raises:
        CheckpointError: a shape is not the model's, or the base weight under an adapter is not.
    """
    what = folder.what
    own_state = unwrap(folder.model).state_dict()
    state = {".".join(p for p in k.split(".") if p not in WRAPPERS): t for k, t in own_state.items()}
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in given.items():
        name = key.replace(".base_layer.", ".")
        path, _, leaf = name.rpartition(".")
        if name not in state or not path:
            unknown.append(key)
            continue
        own, known = state[name], name != key or trained is None or path in trained
        if tensor.shape == own.shape and (own.is_meta or torch.equal(tensor.to(own.dtype), own.cpu())):
            continue
        if not known:
            unknown.append(key)
        elif tensor.shape != own.shape:
            raise CheckpointError(
                f"{what} stores {name!r} of the base as {tuple(tensor.shape)}, this model's is {tuple(own.shape)}: it "
                "was made on another base, or on one whose embeddings were resized (save_embedding_layers); resize "
                f"this model's first, model.resize_token_embeddings({tensor.shape[0]})"
            )
        elif name != key:
            raise CheckpointError(
                f"{what} stores the base weight under its adapter, {name!r}, and it is not this model's: the adapter "
                "belongs to another base, or to one whose embeddings were resized. Copy the stored weight "
                f"({PREFIX}{key}) into the model first"
            )
        else:
            modules.setdefault(path, {})[leaf] = tensor
    values: dict[str, Tensor] = {}
    for path, changed in modules.items():
        whole = {k.removeprefix(f"{path}."): t for k, t in state.items() if k.startswith(f"{path}.")}
        values |= {f"{path}.{leaf}": changed.get(leaf, t) for leaf, t in whole.items()}
    return tuple(modules), values, unknown
