"""VeRA: operator and halves, HF PEFT's projection and training step, one A and B for the whole model, every verb."""

import pytest
import torch
import torch.nn.functional as F
from small_models import perturb, relative_error
from torch import nn

import fxgraft as fg
from fxgraft.passes.graph.siblings import Siblings, go_down
from fxgraft.passes.methods.vera import draw, vera_across, vera_down, vera_up

TARGETS = ["query", "value", "intermediate.dense", "layer.1.output.dense"]  # 32 x 32, 48 x 32 and 32 x 48
SPEC = fg.Spec(fg.VeRA(rank=6, seed=5), TARGETS, train=["classifier"])


def oracle(x, A, B, d, b):
    """The paper's `Lambda_b B Lambda_d A x` with diagonal matrices, in float64; A and B cut to the layer."""
    x, A, B, d, b = (t.double() for t in (x, A, B, d, b))
    return x @ (torch.diag(b) @ B[: len(b)] @ torch.diag(d) @ A[:, : x.shape[-1]]).T


def operands(dtype=torch.float32, r=3, i=7, o=5, more=0, batch=(2, 4)):
    A, B = torch.randn(r, i + more, dtype=dtype), torch.randn(o + more, r, dtype=dtype)
    return torch.randn(*batch, i, dtype=dtype), A, B, torch.randn(r, dtype=dtype), torch.randn(o, dtype=dtype)


@pytest.mark.parametrize("batch", [(4,), (2, 3), ()])
@pytest.mark.parametrize("more", [0, 4])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_operator(rank, more, batch):
    values = operands(r=rank, more=more, batch=batch)
    assert relative_error(torch.ops.fxgraft.vera(*values, 7), oracle(*values)) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_operator_in_half_precision(dtype, tolerance):
    """The tensors stay float32 and are cast where they meet x: 8 and 11 bits of mantissa, five roundings."""
    x, *rest = operands(r=16, i=64, o=32)
    y = torch.ops.fxgraft.vera(x.to(dtype), *rest, 64)
    assert y.dtype == dtype and relative_error(y, oracle(x.to(dtype), *rest)) < tolerance


@pytest.mark.parametrize("more", [0, 4])
def test_halves_are_the_operator(more):
    x, *rest = operands(torch.float64, more=more)
    expected, z = oracle(x, *rest), F.linear(x, vera_down(*rest, 7))
    torch.testing.assert_close(vera_up(z, *rest, 7), expected)
    torch.testing.assert_close(F.linear(z, vera_across(*rest, 7)), expected)


def test_a_projection_on_another_device():
    """Of a model spread over devices, A and B live on the first. Meta is a device that every machine has."""
    A, B = torch.empty(3, 9), torch.empty(8, 3)
    x, d, b = (torch.empty(shape, device="meta") for shape in ((2, 7), (3,), (5,)))
    ids, stacks = torch.empty(2, dtype=torch.long, device="meta"), (d.expand(4, 3), b.expand(4, 5))
    shared, local = {"A": A[:, :7], "B": B[:5]}, {"d": d, "b": b}
    made = torch.ops.fxgraft.vera(x, A, B, d, b, 7), torch.ops.fxgraft.bank_vera(x, ids, A, B, *stacks)
    made += vera_down(A, B, d, b, 7), vera_across(A, B, d, b, 7), *fg.VeRA(3).factors(shared, local)
    assert {t.device.type for t in made} == {"meta"}


def test_gradients():
    x, A, B, d, b = operands(torch.float64, more=2)
    check = [t.requires_grad_() for t in (x, d, b)]
    assert torch.autograd.gradcheck(lambda x, d, b: torch.ops.fxgraft.vera(x, A, B, d, b, 7), check)


def peft_of(bert, **settings):
    from peft import VeraConfig, get_peft_model

    config = {"r": 6, "projection_prng_key": 5, "target_modules": TARGETS, "modules_to_save": ["classifier"]} | settings
    return get_peft_model(bert, VeraConfig(**config))


@pytest.mark.parametrize(("rank", "seed", "d_initial"), [(6, 5, 0.1), (64, 0, 1.0)])
def test_starts_as_peft_starts_bit_for_bit(rank, seed, d_initial, bert):
    adapted = fg.rewrite(bert, fg.Spec(fg.VeRA(rank, seed, d_initial), TARGETS))
    peft = peft_of(bert, r=rank, projection_prng_key=seed, d_initial=d_initial).base_model
    shared = adapted.fxgraft_shared.default
    assert shared.A.shape == (rank, 48) and shared.B.shape == (48, rank)
    assert torch.equal(shared.A, peft.vera_A["default"]) and torch.equal(shared.B, peft.vera_B["default"])
    for key, tensor in fg.adapter_state(adapted).items():
        site, _, name = key.rpartition(".")
        theirs = getattr(peft.model.get_submodule(site), f"vera_lambda_{name}")["default"]
        assert torch.equal(tensor, theirs), key


def test_trains_as_peft_trains(bert, ids):
    """Three steps of AdamW: the same losses, and the same vectors and head afterwards."""
    labels, models = torch.tensor([0, 1, 1]), {}
    models["ours"], models["peft"] = fg.rewrite(bert, SPEC), peft_of(bert)  # PEFT changes the model it is given
    losses = {}
    for name, model in models.items():
        model.eval()  # BERT's own dropout draws differently otherwise
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[name] = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["ours"] == pytest.approx(losses["peft"], rel=1e-6) and losses["ours"][2] < losses["ours"][0]
    theirs = dict(models["peft"].base_model.model.named_parameters())
    for key, tensor in fg.adapter_state(models["ours"]).items():
        site, _, name = key.rpartition(".")
        full = (
            f"{site}.modules_to_save.default.{name}" if site == "classifier" else f"{site}.vera_lambda_{name}.default"
        )
        torch.testing.assert_close(tensor, theirs[full].detach(), rtol=1e-5, atol=1e-6)


def test_start_is_the_base_bit_for_bit(bert, ids):
    assert torch.equal(fg.rewrite(bert, SPEC)(ids).logits, bert(ids).logits)


def test_A_and_B_are_there_once_and_never_saved(bert):
    adapted = fg.rewrite(bert, SPEC)
    buffers = {n: b for n, b in adapted.named_buffers() if "fxgraft" in n}
    assert set(buffers) == {"fxgraft_shared.default.A", "fxgraft_shared.default.B"}
    assert not set(buffers) & set(adapted.state_dict())
    record = fg.rewriter.state.record_of(adapted, "default")
    sites = [t for _, t in fg.rewriter.tensors.adapter_modules(adapted, "default", record) if t.site is not None]
    A, B = buffers.values()
    for tensors in sites:
        seen = tensors.shared_tensors()
        assert seen["A"].shape == (6, tensors.site.in_features) and seen["B"].shape == (tensors.site.out_features, 6)
        assert seen["A"].data_ptr() == A.data_ptr() and seen["B"].data_ptr() == B.data_ptr()


def test_only_d_and_b_train_as_vectors(bert):
    adapted = fg.rewrite(bert, SPEC)
    sites = 2 * 2 * (6 + 32) + 2 * (6 + 48) + (6 + 32)
    assert fg.explain(adapted).trainable == sites + 2 * 32 + 2
    groups = fg.parameter_groups(adapted, lr=1e-4, weight_decay=0.1, vector_lr=4e-3)
    found = {g["name"]: (sum(p.numel() for p in g["params"]), g["lr"], g["weight_decay"]) for g in groups}
    assert found["vector"] == (sites, 4e-3, 0.0) and set(found) == {"vector", "head", "head_no_decay"}


def test_the_published_setting_has_a_rank_above_the_layers(recwarn):
    """1,024 on RoBERTa-base, which is 768 wide: every entry of d is a number of its own, so nobody is warned."""
    layer = nn.Linear(8, 8)
    adapted = perturb(fg.rewrite(layer, fg.Spec(fg.VeRA(rank=32))))
    assert not recwarn and fg.explain(adapted).trainable == 32 + 8
    x = torch.randn(3, 8)
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "rank", "targets", "published"),
    [("base", 1024, ["query", "value"], 43_008), ("large", 256, ["query", "value"], 61_440)],
)
def test_published_counts_are_pefts_too(model, rank, targets, published):
    """The paper's table of GLUE results: 0.043 and 0.061 million. Models and adapters on the meta device."""
    from peft import VeraConfig, get_peft_model
    from transformers import RobertaConfig, RobertaModel

    sizes = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096)}[model]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    with torch.device("meta"):
        roberta = RobertaModel(RobertaConfig(**dict(zip(names, sizes, strict=True))))
    adapted = fg.rewrite(roberta, fg.Spec(fg.VeRA(rank), targets))
    peft = get_peft_model(roberta, VeraConfig(r=rank, target_modules=targets), low_cpu_mem_usage=True)
    assert fg.explain(adapted).trainable == peft.get_nb_trainable_parameters()[0] == published


CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def trained(bert):
    return perturb(fg.rewrite(bert, SPEC), 0.5).eval()


def test_merged_and_converted_it_computes_the_same(trained, bert, ids):
    expected = trained(ids).logits
    assert not torch.allclose(expected, bert(ids).logits, atol=1e-3)
    torch.testing.assert_close(fg.merge(trained)(ids).logits, expected, **CLOSE)
    torch.testing.assert_close(fg.to_lora(trained)(ids).logits, expected, **CLOSE)


def test_two_of_them_are_weighed_and_combined(trained, bert, ids):
    both = fg.rewrite(trained, fg.Spec(fg.VeRA(rank=9, seed=1), TARGETS), name="b")
    perturb(both, 0.3)  # b, which is active; the other was copied
    fg.set_active(both, {"default": 0.5, "b": -1.5})
    torch.testing.assert_close(fg.merge(both)(ids).logits, both(ids).logits, **CLOSE)
    fg.set_active(both, ["default"])
    assert torch.equal(both(ids).logits, trained(ids).logits)
    joined = fg.combine(fg.rewrite(trained, fg.Spec(fg.LoRA(2), ["query"]), name="b"), ["default", "b"], method="cat")
    torch.testing.assert_close(joined(ids).logits, trained(ids).logits, **CLOSE)  # the LoRA starts as a no-op


@pytest.mark.parametrize("projection", ["drawn", "stored"])
def test_in_a_folder(projection, bert, ids, tmp_path):
    from safetensors.torch import load_file

    spec = fg.Spec(fg.VeRA(rank=6, seed=5, projection=projection), TARGETS)
    adapted = perturb(fg.rewrite(bert, spec), 0.5).eval()
    fg.save_adapter(adapted, tmp_path)
    shared = {k for k in load_file(tmp_path / "adapter_model.safetensors") if "." not in k}
    assert shared == ({"A", "B"} if projection == "stored" else set())
    assert torch.equal(fg.load_adapter(bert, tmp_path)(ids).logits, adapted(ids).logits)
    other = fg.rewrite(bert, spec)
    fg.swap(other, tmp_path)
    assert torch.equal(other(ids).logits, adapted(ids).logits)


def test_vectors_belong_to_their_projection(trained, bert, tmp_path, monkeypatch):
    with pytest.raises(fg.AdapterError, match="seed would make the same tensors another adapter"):
        fg.swap(
            fg.rewrite(bert, fg.Spec(fg.VeRA(rank=6, seed=6), TARGETS, train=["classifier"])), fg.adapter_state(trained)
        )
    fg.save_adapter(trained, tmp_path)
    from fxgraft.passes.methods import vera

    monkeypatch.setattr(vera, "draw", lambda *given: [-matrix for matrix in draw(*given)])
    with pytest.raises(fg.CheckpointError, match="another projection than its config gives here"):
        fg.load_adapter(bert, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_folder_opens_on_a_base_in_another_dtype(dtype, trained, bert, ids, tmp_path):
    """What is drawn is rounded to the model's dtype there, and is the same projection still."""
    fg.save_adapter(trained.to(dtype), tmp_path / "there")
    loaded = fg.load_adapter(bert.float(), tmp_path / "there")
    assert loaded.fxgraft_shared.default.A.dtype == torch.float32
    fg.save_adapter(loaded, tmp_path / "here")
    fg.load_adapter(bert.to(dtype), tmp_path / "here")


def test_parts_of_a_fused_weight(gpt2, ids):
    adapted = fg.rewrite(gpt2, fg.Spec(fg.VeRA(rank=5), [fg.Target("c_attn", 3, (0, 2)), "mlp.c_proj"]))
    assert adapted.fxgraft_shared.default.A.shape == (5, 128) and adapted.fxgraft_shared.default.B.shape == (32, 5)
    perturb(adapted, 0.5)
    torch.testing.assert_close(fg.merge(adapted)(ids).logits, adapted(ids).logits, **CLOSE)


def test_compiled_it_is_one_node_and_every_pass_keeps_its_numbers(trained, ids):
    seen = []

    def spy(gm, inputs):
        seen.extend(n for n in gm.graph.nodes if "fxgraft." in str(n.target))
        return gm.forward

    torch.compile(trained, backend=spy, fullgraph=True)(ids)
    assert len(seen) == 7 and {str(n.target) for n in seen} == {"fxgraft.vera.default"}


class Attention(nn.Module):
    """Three linears of two sizes on one input."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 6)

    def forward(self, x):
        return (self.q(x) * self.k(x)).sum(-1, keepdim=True) * self.v(x)


def test_layers_on_one_input_go_down_once():
    """A is everyone's: q, k and v scale one and the same product. A LoRA beside them has a factor of its own."""
    spec = fg.Spec(fg.VeRA(rank=5), ["q", "k", "v"])
    adapted, x = perturb(fg.rewrite(Attention(), spec), 0.5), torch.randn(4, 12)
    mixed = perturb(fg.rewrite(Attention(), fg.Spec(spec.method, spec.targets, overrides={"k": fg.LoRA(2)})), 0.5)
    for model, factors in ((adapted, 1), (mixed, 2)):
        program = fg.capture(model, (x,))
        joined = Siblings(always=True)(program).program
        (down,) = (node for node in joined.graph.nodes if node.target is go_down)
        assert len(down.args[1]) == factors
        torch.testing.assert_close(joined.graph_module(x), model(x), **CLOSE)


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"rank": 2.0}, {"seed": -1}, {"seed": 1.5}, {"seed": 1 << 64}, {"d_initial": 0}, {"dropout": 1},
     {"projection": "random"}],
)  # fmt: skip
def test_wrong_values_raise_at_construction(wrong):
    with pytest.raises(fg.SpecError, match=next(iter(wrong))):
        fg.VeRA(**wrong)


def test_tenants_of_a_bank_are_vectors_over_one_projection(bert, ids, tmp_path):
    """Memory per tenant is `r + out` numbers a layer, and mixed batches compute what each adapter does alone."""
    spec = fg.Spec(fg.VeRA(rank=6, seed=5), TARGETS)
    own = {name: perturb(fg.rewrite(bert, spec), 0.5).eval() for name in "abc"}
    banked, expanded = fg.bank(bert, {"a": own["a"], "b": own["b"]}, capacity=4), fg.bank(bert, own, expand=True)
    fg.save_adapter(own["c"], tmp_path)
    fg.add_tenant(banked, "c", tmp_path)
    names = ["c", None, "a"]
    with torch.no_grad():
        rows = [(own[name] if name else bert)(ids[i : i + 1]).logits for i, name in enumerate(names)]
        for model in (banked, expanded):
            given = model(ids, adapter_ids=fg.adapter_ids(model, names)).logits
            torch.testing.assert_close(given, torch.cat(rows), **CLOSE)
    stacks = {k.rpartition(".")[2]: tuple(t.shape) for k, t in banked.state_dict().items() if "query.fxgraft" in k}
    assert stacks == {"d": (5, 6), "b": (5, 32)}
    assert "fxgraft_shared.bank.A" in dict(banked.named_buffers())
    with pytest.raises(fg.AdapterError, match="another projection"):
        fg.add_tenant(banked, "other", fg.rewrite(bert, fg.Spec(fg.VeRA(rank=6, seed=6), TARGETS)))
    with pytest.raises(fg.AdapterError, match="other sites"):
        fg.add_tenant(banked, "fewer", fg.rewrite(bert, fg.Spec(fg.VeRA(rank=6, seed=5), ["query"])))


def test_values_under_the_projection_of_other_sites_are_refused():
    """Two configs that differ in dropout alone are two groups, each with the A and B of its own largest site."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    one = perturb(fg.rewrite(model, fg.Spec(fg.VeRA(rank=4), ["0", "1", "2"])), 0.5)
    apart, same = (
        fg.rewrite(model, fg.Spec(fg.VeRA(rank=4), ["0", "1", "2"], overrides={site: fg.VeRA(rank=4, dropout=0.1)}))
        for site in ("0", "2")
    )
    with pytest.raises(fg.AdapterError, match="projection: it is another"):
        fg.swap(apart, fg.adapter_state(one))
    fg.swap(same, fg.adapter_state(one))  # the largest of both groups is that of all sites
    x = torch.randn(3, 6)
    torch.testing.assert_close(same.eval()(x), one.eval()(x))


def test_other_projections_share_a_bank_as_factors(bert, ids):
    specs = {"a": fg.VeRA(rank=6), "b": fg.VeRA(rank=3, seed=1), "c": fg.LoRA(rank=2)}
    own = {name: perturb(fg.rewrite(bert, fg.Spec(method, ["query"])), 0.5).eval() for name, method in specs.items()}
    banked = fg.bank(bert, own)
    with torch.no_grad():
        given = banked(ids, adapter_ids=fg.adapter_ids(banked, list(own))).logits
        rows = [model(ids[i : i + 1]).logits for i, model in enumerate(own.values())]
        torch.testing.assert_close(given, torch.cat(rows), **CLOSE)


def test_a_bank_leaves_as_a_graph_of_factors(bert, ids, tmp_path):
    own = {name: perturb(fg.rewrite(bert, SPEC), 0.5).eval() for name in "ab"}
    export = fg.export_onnx(fg.bank(bert, own, capacity=3), tmp_path / "m.onnx", (ids,), adapters="bank")
    session = fg.OrtSession(export.path)
    given = session.run({"input_ids": ids.numpy()}, adapter_ids=["a", None, "b"])["logits"]
    with torch.no_grad():
        rows = [(own[n] if n else bert)(ids[i : i + 1]).logits for i, n in enumerate(["a", None, "b"])]
    torch.testing.assert_close(torch.from_numpy(given), torch.cat(rows), **CLOSE)
