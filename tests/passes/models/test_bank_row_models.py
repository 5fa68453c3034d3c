"""Banks on models of transformers whose layers fold, roll, route or repeat the rows of a batch."""

from __future__ import annotations

import pytest
import torch
import transformers
from row_models import (
    SMALL,
    check,
    conformer,
    deberta,
    llama,
    longformer,
    mask2former,
    names_of,
    perceiver,
    swinv2,
    t5,
    tenants,
    tokens,
    xlnet,
)

import fxgraft as fg

MODELS = [longformer, xlnet, deberta, swinv2, conformer, llama, t5, perceiver, mask2former]


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_models(make):
    model, targets, inputs = make()
    model.eval().double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    own = tenants(model, targets)
    banked = fg.bank(model, own, example_inputs=inputs)
    check(banked, banked, model, own, inputs)


@torch.no_grad()
def test_models_with_rows_that_all_samples_share():
    config = transformers.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True
    )
    model = transformers.DebertaV2Model(config).eval()
    own = tenants(model, ["query_proj"])
    with pytest.raises(fg.AdapterError, match=r"query_proj': its input .* has the same rows for all 3 samples"):
        fg.bank(model, own, example_inputs={"input_ids": tokens()})


@torch.no_grad()
def test_experts():
    """Attention around experts is fine; the experts get tokens of anybody."""
    config = transformers.SwitchTransformersConfig(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=90, num_experts=4, decoder_start_token_id=0
    )
    model = transformers.SwitchTransformersModel(config).eval()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(3, 5)}
    own = tenants(model, ["wi"])
    with pytest.raises(fg.AdapterError, match="gets other rows when only the content"):
        fg.bank(model, own, example_inputs=inputs)
    own = tenants(model, ["q", "v"])
    check(fg.bank(model, own), fg.bank(model, own), model, own, inputs)


@torch.no_grad()
def test_generate_with_an_encoder():
    """`generate` calls the encoder past the model's forward: it gets the ids too, with beams as without."""
    model, targets, _ = t5()
    model.eval()
    own = tenants(model, targets)
    banked = fg.bank(model, own)
    prompt = tokens()
    names = names_of(3)
    for options in ({}, {"num_beams": 2}):
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt), **options}
        got = banked.generate(prompt, adapter_ids=fg.adapter_ids(banked, names), **options)
        for i, name in enumerate(names):
            alone = (own[name] if name else model).generate(prompt, **options)
            width = min(got.shape[1], alone.shape[1])
            assert torch.equal(got[i, :width], alone[i, :width])
