"""A causal language model with its cache as plain tensors, which is what a graph can take and give.

    model(input_ids, attention_mask, past_key_values=Cache)  ->  logits, Cache
    cached(input_ids, attention_mask, past_key_0, past_value_0, ...)  ->  {logits, present_key_0, present_value_0, ...}

One graph does both halves of generation: the prompt is a call with an empty past, each step a call with one token. A
model with a recurrence takes its prompt token by token too.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from ....rewriter.calls.forward_inputs import NAMES, OWN_CLASS, release_inputs, take_inputs
from ....rewriter.capture.skeleton import copy_skeleton
from .cache_layers import PAST, PRESENT
from .cache_plan import EMBEDS, IDS, MASK, POSITIONS, CachePlan
from .cached_seq2seq import seq2seq_class

#: What a model calls its cache.
CACHES = ("past_key_values", "cache_params")


def cached(model: nn.Module, plan: CachePlan) -> nn.Module:
    """The model with a forward over plain tensors: a copy over the same tensors, its adapters included.

    forward(input_ids (batch, sequence), attention_mask (batch, past + sequence), past_key_<i>, past_value_<i> (batch,
    heads, past, width)) gives {"logits": (batch, sequence, vocabulary), "present_key_<i>", "present_value_<i>": (batch,
    heads, past + sequence, width)}; `cache_layers` says what other layers have. Positions are counted along the mask,
    so rows may be padded on the left. With `plan.embeds` there is inputs_embeds (batch, embedded, width) too, the text
    before the ids with its image features. Of an encoder-decoder see `cached_seq2seq`.
    """
    twin = copy_skeleton(model).train(model.training)
    names = twin.__dict__.get(NAMES, ())
    if OWN_CLASS in twin.__dict__:  # a bank's forward takes adapter_ids; it goes around the new one
        release_inputs(twin)
    twin.__class__ = (seq2seq_class if plan.cross else _class)(type(twin), plan)
    take_inputs(twin, names)
    return twin


def cache_name(own: type[nn.Module]) -> str | None:
    """What a model's forward calls its cache, None where it takes none."""
    return next((name for name in CACHES if name in inspect.signature(own.forward).parameters), None)


def counted(mask: torch.Tensor, sequence: int) -> torch.Tensor:
    """The positions of the last `sequence` tokens as generate() counts them: a padded row from its first token on."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -sequence:]


def _class(own: type[nn.Module], plan: CachePlan) -> type[nn.Module]:
    takes_positions = POSITIONS in inspect.signature(own.forward).parameters
    called = cache_name(own)
    assert called is not None

    def forward(self: nn.Module, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        ids, mask = given[IDS], given[MASK]
        new = {IDS: ids}
        if plan.embeds:
            new = {EMBEDS: torch.cat([given[EMBEDS], self.get_input_embeddings()(ids)], dim=1)}  # type: ignore[operator]
        length = next(iter(new.values())).shape[1]
        more = {POSITIONS: counted(mask, length)} if takes_positions else {}
        cache = plan.filled(given, mask.shape[1] - length)
        # A model without attention has no past to hide, and takes the mask of what is new.
        seen = mask if called == CACHES[0] else mask[:, -length:]
        output = own.forward(self, **new, **{MASK: seen, called: cache, "use_cache": True}, **more)
        tensors = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
        tensors |= plan.held(output[called], PRESENT)
        if plan.stepwise:
            real = mask[:, -1] != 0
            for name in [name for name in tensors if name.startswith(PRESENT) and name not in grown]:
                # A token of padding leaves a recurrence as it was.
                rows = real.reshape(-1, *[1] * (tensors[name].dim() - 1))
                tensors[name] = torch.where(rows, tensors[name], given[PAST + name.removeprefix(PRESENT)])
        return tensors

    embeds = [EMBEDS] if plan.embeds else []
    grown = {name for name, axes in plan.outputs.items() if 2 in axes}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *embeds, IDS, MASK, *plan.inputs)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type(own.__name__, (own,), {"__module__": own.__module__, "forward": forward})
