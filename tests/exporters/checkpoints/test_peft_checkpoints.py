"""Adapter folders shared with HF PEFT, both directions: same files, same outputs, and what is refused."""

import copy
import json
import warnings

import pytest
import torch
from adapter_files import CONFIG, WEIGHTS
from safetensors.torch import load_file, save_file
from small_models import perturb
from torch import nn

import fxgraft as fg

peft = pytest.importorskip("peft")
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


class Nested(nn.Module):
    """The name of one layer is the ending of another's."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 8)
        self.block = nn.ModuleDict({"proj": nn.Linear(8, 5)})
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.block["proj"](torch.relu(self.proj(x))))


class Mixture(nn.Module):
    """Numbers inside numbers: `model.layers.0.experts.1.proj`."""

    def __init__(self):
        super().__init__()
        layers = [
            nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(6, 6)}) for _ in range(2)])})
            for _ in range(2)
        ]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, x):
        for layer in self.model["layers"]:
            x = sum(torch.tanh(expert["proj"](x)) for expert in layer["experts"])
        return x


@pytest.fixture
def models(bert, llama, gpt2, ids):
    """Name -> model and a call that returns one output tensor."""
    vectors = torch.randn(4, 6)
    with torch.no_grad():  # wide enough that adapters show, and biases for GLoRA to scale
        for parameter in (p for m in (bert, llama, gpt2) for p in m.parameters()):
            parameter.mul_(5) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter) * 0.3)
    return {
        "bert": (bert, lambda m: m(ids).logits),
        "llama": (llama, lambda m: m(ids).logits),
        "gpt2": (gpt2, lambda m: m(ids).logits),
        "nested": (Nested().eval(), lambda m: m(vectors)),
        "mixture": (Mixture().eval(), lambda m: m(vectors)),
    }


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def open_in_peft(model, folder):
    """PEFT's view of a folder; a complaint about a key fails the test."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        opened = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    assert not [w for w in said if "keys" in str(w.message) or "unexpected" in str(w.message).lower()]
    return opened


# -- ours -> PEFT ------------------------------------------------------------------------------------------------
def path(*choices):
    return fg.GLoRAPath(*choices)


QV = ["query", "value"]
OUT = {
    "lora": ("bert", fg.Spec(fg.LoRA(3, alpha=5), QV)),
    "lora, ranks, alphas and a head": (
        "bert",
        fg.Spec(
            fg.LoRA(3, alpha=5), ["query", "dense"], train=["classifier"],
            overrides={"layer.0.*": fg.LoRA(2, alpha=7), "layer.1.output.dense": fg.LoRA(3, alpha=1.5)},
        ),
    ),
    "rslora": ("bert", fg.Spec(fg.LoRA(4, alpha=5, rslora=True), QV, overrides={"layer.0.*": fg.LoRA(2, 5, 0, True)})),
    "rslora on some": ("bert", fg.Spec(fg.LoRA(4, alpha=5), QV, overrides={"layer.0.*": fg.LoRA(3, 5, 0.0, True)})),
    "lora without it on some": ("bert", fg.Spec(fg.LoRA(4, 5, 0.0, True), QV, overrides={"1.*.query": fg.LoRA(3, 5)})),
    "lora on Conv1D": ("gpt2", fg.Spec(fg.LoRA(2), ["c_attn", "mlp.c_fc"])),
    "all linear": ("llama", fg.Spec(fg.LoRA(2))),
    "one of two names with one ending": ("nested", fg.Spec(fg.LoRA(2), ["re:proj"])),
    "ranks of two names with one ending": (
        "nested", fg.Spec(fg.LoRA(2), ["proj", "head"], overrides={"re:proj": fg.LoRA(3)}),
    ),
    "unilora": ("bert", fg.Spec(fg.UniLoRA(4, 100, init_bound=0.3), QV, train=["classifier"])),
    "unilora, another seed and a remainder": ("bert", fg.Spec(fg.UniLoRA(3, 97, seed=7, init_bound=0.3), ["dense"])),
    "unilora on Conv1D": ("gpt2", fg.Spec(fg.UniLoRA(2, 50, init_bound=0.3), ["c_attn", "c_proj"])),
    "unilora of independent draws": ("bert", fg.Spec(fg.UniLoRA(2, 60, sampler="uniform", init_bound=0.3), QV)),
    "unilora on one of two": ("nested", fg.Spec(fg.UniLoRA(2, 20, init_bound=0.5), ["re:proj"])),
    "vera": ("bert", fg.Spec(fg.VeRA(8, seed=3), [*QV, "output.dense"], train=["classifier"])),
    "vera with its projection": ("bert", fg.Spec(fg.VeRA(40, projection="stored"), ["dense"])),
    "vera on Conv1D": ("gpt2", fg.Spec(fg.VeRA(5), ["c_attn", "c_proj"])),
    "vera on one of two": ("nested", fg.Spec(fg.VeRA(4, d_initial=1), ["re:proj"])),
    "glora": ("bert", fg.Spec(fg.GLoRA(3, path("lora", "lora", "lora", "vector", "vector")), QV, train=["classifier"])),
    "glora of vectors": ("bert", fg.Spec(fg.GLoRA(2, path("vector", "vector", "vector", "constant", "constant")), QV)),
    "glora of constants": ("bert", fg.Spec(fg.GLoRA(2, path("constant", "constant", "none", "vector", "vector")), QV)),
    "glora of the bias": ("bert", fg.Spec(fg.GLoRA(2, path("none", "none", "lora", "none", "none")), QV)),
    "glora without biases": ("llama", fg.Spec(fg.GLoRA(2, path("lora", "lora", "none", "vector", "none")), ["q_proj"])),
}  # fmt: skip


@pytest.mark.parametrize("case", OUT)
def test_peft_opens_what_we_save(models, tmp_path, case):
    which, spec = OUT[case]
    model, call = models[which]
    adapted = perturb(fg.rewrite(model, spec))
    fg.save_adapter(adapted, tmp_path / "a", format="peft")
    opened = open_in_peft(model, tmp_path / "a")
    expected = call(adapted)
    torch.testing.assert_close(call(opened), expected, rtol=1e-5, atol=1e-5)
    assert (expected - call(model)).abs().max() > 1e-3
    # PEFT keeps the very tensors: the same keys, shapes, dtypes and values
    opened.save_pretrained(str(tmp_path / "b"))
    ours, theirs = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key
    # and both folders come back the same
    for folder in ("a", "b"):
        again = fg.load_adapter(model, tmp_path / folder)
        torch.testing.assert_close(call(again), expected, rtol=1e-5, atol=1e-6)
        methods = {
            s.name: type(g.method) for g in fg.rewriter.state.record_of(again, "default").groups for s in g.sites
        }
        assert set(methods.values()) == {type(spec.method)}
        assert list(methods) == [s.name for s in fg.rewriter.state.record_of(again, "default").sites]


@pytest.mark.parametrize(("sampler", "asked"), [("balanced", True), ("uniform", None), ("uniform", True)])
def test_unilora_with_its_indices(bert, ids, tmp_path, sampler, asked):
    spec = fg.Spec(fg.UniLoRA(4, 100, sampler=sampler, init_bound=0.3), QV)
    adapted = fg.rewrite(bert, spec)
    fg.save_adapter(adapted, tmp_path, format="peft", save_indices=asked)
    stored = load_file(tmp_path / WEIGHTS)
    assert len(stored) == 1 + 4 * 4 and json.loads((tmp_path / CONFIG).read_text())["save_indices"] is True
    opened = open_in_peft(bert, tmp_path)
    torch.testing.assert_close(opened(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-6)
    again = fg.load_adapter(bert, tmp_path)
    assert torch.equal(again(ids).logits, adapted(ids).logits)
    # a balanced projection is recognised and is the vector alone again
    method = fg.rewriter.state.record_of(again, "default").groups[0].method
    assert method.sampler == ("balanced" if sampler == "balanced" else "stored")
    assert (len(fg.adapter_state(again)) == 1) == (sampler == "balanced")


def test_unilora_without_its_indices_is_the_vector(bert, tmp_path):
    adapted = fg.rewrite(bert, fg.Spec(fg.UniLoRA(4, 100), QV))
    fg.save_adapter(adapted, tmp_path, format="peft", save_indices=False)
    assert {k: tuple(t.shape) for k, t in load_file(tmp_path / WEIGHTS).items()} == {
        "base_model.unilora_theta_d": (100,)
    }


@pytest.mark.parametrize("method", [fg.LoRAXS(3), fg.PRoLoRA(4, 1, 3, 3), fg.UniLoRA(3, 60, init_bound=0.5)])
def test_to_lora_opens_in_peft(bert, ids, tmp_path, method):
    adapted = perturb(fg.rewrite(bert, fg.Spec(method, QV, train=["classifier"])))
    fg.save_adapter(fg.to_lora(adapted), tmp_path, format="peft")
    torch.testing.assert_close(open_in_peft(bert, tmp_path)(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        (fg.Spec(fg.PRoLoRA(4, 1, 3, 3), QV), {}, "PEFT has no PRoLoRA.*to_lora"),
        (fg.Spec(fg.LoRAXS(4), QV), {}, "PEFT has no LoRAXS.*to_lora"),
        (fg.Spec(fg.HydraLoRA(4), QV), {}, "PEFT has no HydraLoRA, and it is not a LoRA.*format='fxgraft'"),
        (fg.Spec(fg.LoRA(2), QV, overrides={"value": fg.UniLoRA(2, 9)}), {}, "one method, this one has.*to_lora"),
        (fg.Spec(fg.UniLoRA(2, 9), QV, overrides={"value": fg.UniLoRA(2, 8)}), {}, "one vector .*has 2.*to_lora"),
        (fg.Spec(fg.UniLoRA(2, 9, sampler="uniform"), QV), {"save_indices": False}, "would derive others"),
        (fg.Spec(fg.VeRA(2), QV, overrides={"value": fg.VeRA(3)}), {}, "one projection .*has 2.*to_lora"),
        (fg.Spec(fg.VeRA(2, projection="stored"), QV), {"save_indices": False}, "would draw others"),
        (fg.Spec(fg.LoRA(2), QV), {"save_indices": True}, "save_indices is for UniLoRA and VeRA, and this is LoRA"),
        (fg.Spec(fg.LoRA(2), QV, overrides={"value": fg.LoRA(2, dropout=0.5)}), {}, "one lora_dropout"),
        (fg.Spec(fg.GLoRA(2), QV), {}, "no supernet; fg.fix_paths"),
        (fg.Spec(fg.GLoRA(2, path("lora", "none", "none", "none", "none")), QV), {}, "one choice for A and B.*merge"),
        (fg.Spec(fg.GLoRA(2, path("none", "none", "none", "none", "vector")), QV), {}, "one for D and E.*merge"),
        (
            fg.Spec(fg.GLoRA(2, path(*["vector"] * 5)), QV, overrides={"value": fg.GLoRA(3, path(*["vector"] * 5))}),
            {}, r"one r per adapter, this one has \[2, 3\]",
        ),
        (fg.Spec(fg.LoRA(2), [fg.Target("query", 2, (0,))]), {}, "whole layers, and these are parts"),
    ],
)  # fmt: skip
def test_what_peft_cannot_hold(bert, tmp_path, spec, options, says):
    adapted = fg.rewrite(bert, spec)
    with pytest.raises(fg.CheckpointError, match=says):
        fg.save_adapter(adapted, tmp_path / "a", format="peft", **options)
    assert not (tmp_path / "a").exists()


def test_a_bias_path_on_a_base_without_bias(llama, tmp_path):
    for choices in (["vector"] * 5, ["none", "none", "vector", "none", "none"]):
        adapted = fg.rewrite(llama, fg.Spec(fg.GLoRA(2, path(*choices)), ["q_proj"]))
        with pytest.raises(fg.CheckpointError, match="where the base has no bias"):
            fg.save_adapter(adapted, tmp_path / "a", format="peft")


def test_glora_on_conv1d(gpt2, tmp_path):
    adapted = fg.rewrite(gpt2, fg.Spec(fg.GLoRA(2, path(*["vector"] * 5)), ["c_attn"]))
    with pytest.raises(fg.CheckpointError, match=r"takes nn.Linear only, and not 'transformer\.h\.0\.attn\.c_attn'"):
        fg.save_adapter(adapted, tmp_path / "a", format="peft")


def test_a_root_and_a_bare_parameter_have_no_peft_name(tmp_path):
    with pytest.raises(fg.CheckpointError, match="inside a model"):
        fg.save_adapter(fg.rewrite(nn.Linear(4, 5), fg.Spec(fg.LoRA(2), ["re:"])), tmp_path / "a", format="peft")


def test_a_head_that_peft_would_confuse(tmp_path):
    model = nn.ModuleDict({"up": nn.Linear(4, 5), "head": nn.Linear(5, 2), "my_head": nn.Linear(5, 2)})
    model.forward = lambda x: model["head"](model["up"](x)) + model["my_head"](model["up"](x))
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), ["up"], train=["head"]))
    with pytest.raises(fg.CheckpointError, match="would also train 'my_head'"):
        fg.save_adapter(adapted, tmp_path / "a", format="peft")


def test_nan_and_own_format_options(bert, tmp_path):
    adapted = fg.rewrite(bert, fg.Spec(fg.LoRA(2), QV))
    with pytest.raises(fg.CheckpointError, match="is for format='peft'"):
        fg.save_adapter(adapted, tmp_path / "a", save_indices=True)
    with torch.no_grad():
        adapted.bert.encoder.layer[0].attention.self.query.fxgraft.default.A[0, 0] = float("inf")
    with pytest.raises(fg.CheckpointError, match=r"query\.lora_A\.weight'; nothing was written"):
        fg.save_adapter(adapted, tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()


# -- PEFT -> ours ------------------------------------------------------------------------------------------------
def lora(**options):
    return peft.LoraConfig(r=4, lora_alpha=6, **options)


def unilora(**options):
    return peft.UniLoraConfig(r=3, theta_d_length=70, init_theta_d_bound=0.4, **options)


def vera(**options):
    return peft.VeraConfig(r=6, projection_prng_key=options.pop("seed", 2), d_initial=0.5, **options)


def glora(**options):
    return peft.GloraConfig(r=3, **options)


IN = {
    "lora": ("bert", lambda: lora(target_modules=QV)),
    "lora by a regular expression": ("bert", lambda: lora(target_modules=r".*layer\.1.*(query|dense)")),
    "lora everywhere": ("bert", lambda: lora(target_modules="all-linear", task_type="SEQ_CLS")),
    "lora everywhere, Llama": ("llama", lambda: lora(target_modules="all-linear", task_type="CAUSAL_LM")),
    "lora, ranks": ("bert", lambda: lora(target_modules=QV, rank_pattern={"query": 2, "0.attention.self.value": 5})),
    "lora, alphas": ("bert", lambda: lora(target_modules=QV, alpha_pattern={r"layer\.\d.*\.query": 3, "value": 1})),
    "lora, ranks and alphas": (
        "bert", lambda: lora(target_modules=QV, rank_pattern={"^bert.*0.*query": 2}, alpha_pattern={"value": 9}),
    ),
    "rslora": ("bert", lambda: lora(target_modules=QV, use_rslora=True, rank_pattern={"value": 2})),
    "lora with a head": ("bert", lambda: lora(target_modules=["dense"], modules_to_save=["pooler", "classifier"])),
    "lora with PEFT's own choice of heads": ("bert", lambda: lora(target_modules=QV, task_type="SEQ_CLS")),
    "lora, one layer": ("bert", lambda: lora(target_modules=QV, layers_to_transform=1)),
    "lora, layers of a pattern": (
        "bert", lambda: lora(target_modules=QV, layers_to_transform=[0], layers_pattern="layer")),
    "lora, some left out": ("bert", lambda: lora(target_modules=["dense"], exclude_modules=["pooler.dense"])),
    "lora, a regular expression left out": ("bert", lambda: lora(target_modules=QV, exclude_modules=r".*\.0\..*")),
    "lora, gaussian start and dropout": (
        "bert", lambda: lora(target_modules=QV, init_lora_weights="gaussian", lora_dropout=0.1)),
    "lora on Conv1D": ("gpt2", lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True)),
    "lora on a plain module": ("nested", lambda: lora(target_modules=["block.proj"], modules_to_save=["head"])),
    "unilora": ("bert", lambda: unilora(target_modules=QV)),
    "unilora by a regular expression": ("bert", lambda: unilora(target_modules=r".*1.*\.(key|value)", proj_seed=3)),
    "unilora everywhere": ("bert", lambda: unilora(target_modules="all-linear", task_type="SEQ_CLS")),
    "unilora, one layer and a head": (
        "bert", lambda: unilora(target_modules=QV, layers_to_transform=[1], modules_to_save=["classifier"])),
    "unilora, layers of a pattern": (
        "bert", lambda: unilora(target_modules=QV, layers_to_transform=0, layers_pattern=["block", "layer"])),
    "unilora, head inside the targets": (
        "bert", lambda: unilora(target_modules=["dense"], modules_to_save=["pooler"])),
    "unilora, layers that hold numbered experts": (
        "mixture", lambda: unilora(target_modules=["proj"], layers_to_transform=[0])),
    "unilora, layers of a pattern that hold experts": (
        "mixture", lambda: unilora(target_modules=["proj"], layers_to_transform=[1], layers_pattern=["layers"])),
    "unilora, a full name beside chosen layers": (
        "mixture",
        lambda: unilora(target_modules=["model.layers.0.experts.1.proj", "1.proj"], layers_to_transform=[1])),
    "unilora with indices": ("bert", lambda: unilora(target_modules=QV, save_indices=True)),
    "unilora with indices and a head": (
        "bert", lambda: unilora(target_modules=QV, save_indices=True, modules_to_save=["classifier"])),
    "unilora on Conv1D": ("gpt2", lambda: unilora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "vera": ("bert", lambda: vera(target_modules=QV)),
    "vera without its projection": ("bert", lambda: vera(target_modules=["dense"], save_projection=False)),
    "vera everywhere, one layer, a head": (
        "bert",
        lambda: vera(target_modules="all-linear", task_type="SEQ_CLS", layers_to_transform=1, vera_dropout=0.1)),
    "vera on Conv1D": ("gpt2", lambda: vera(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, seed=0)),
    "glora": ("bert", lambda: glora(target_modules=QV, modules_to_save=["classifier"])),
    "glora, vectors": ("bert", lambda: glora(target_modules=QV, config_A_B="vector", config_D_E="vector")),
    "glora, constants": ("bert", lambda: glora(target_modules=["dense"], config_A_B="constant", config_C="vector")),
    "glora, bias only": ("bert", lambda: glora(target_modules=QV, config_A_B="none", config_D_E="none")),
    "glora, no bias": ("llama", lambda: glora(target_modules=["q_proj", "up_proj"])),
}  # fmt: skip


def trained_in_peft(model, config, folder):
    """A PEFT model with values that show in the output, and its folder."""
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    perturb(adapted)
    adapted.save_pretrained(str(folder))
    return adapted


def same_model(model, before):
    return list(model.state_dict()) == list(before) and all(
        torch.equal(t, before[k]) for k, t in model.state_dict().items()
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", IN)
def test_we_open_what_peft_saves(models, tmp_path, case):
    which, config = IN[case]
    model, call = models[which]
    trained = trained_in_peft(model, config(), tmp_path)
    before = copy.deepcopy(model.state_dict())
    loaded = fg.load_adapter(model, tmp_path, name="theirs")
    expected = call(trained)
    torch.testing.assert_close(call(loaded), expected, rtol=1e-5, atol=1e-5)
    assert (expected - call(model)).abs().max() > 1e-3
    assert same_model(model, before) and fg.active(loaded) == ["theirs"]
    # what we write back is what PEFT wrote, and our own format keeps it too
    fg.save_adapter(loaded, tmp_path / "own", name="theirs")
    assert torch.equal(call(fg.load_adapter(model, tmp_path / "own")), call(loaded))
    stored = getattr(config(), "save_indices", False) or getattr(config(), "save_projection", False)
    options = {"save_indices": True} if stored else {}
    fg.save_adapter(loaded, tmp_path / "back", name="theirs", format="peft", **options)
    ours, theirs = load_file(tmp_path / "back" / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("which", "task"), [("bert", "SEQ_CLS"), ("bert", None), ("llama", "CAUSAL_LM")])
def test_all_linear_as_a_word(models, tmp_path, which, task):
    """PEFT writes out the names it found; who writes the word means the same layers."""
    model, call = models[which]
    config = peft.UniLoraConfig(r=2, theta_d_length=70, target_modules="all-linear", task_type=task)
    trained = trained_in_peft(model, config, tmp_path)
    names = set(json.loads((tmp_path / CONFIG).read_text())["target_modules"])
    edit(tmp_path, target_modules="all-linear")
    loaded = fg.load_adapter(model, tmp_path)
    assert {site.name for site in fg.rewriter.state.record_of(loaded, "default").sites} == names
    torch.testing.assert_close(call(loaded), call(trained), rtol=1e-5, atol=1e-5)


def test_indices_handed_out_in_another_order(bert, ids, tmp_path):
    """An exported module may list its sites otherwise; PEFT then needs the indices themselves."""
    spec = fg.Spec(fg.UniLoRA(4, 100, init_bound=0.3), QV)
    names = [s.name for s in fg.rewriter.state.record_of(fg.rewrite(bert, spec), "default").sites]
    adapted = fg.rewriter.create.graft_adapter(bert, spec, "default", order=names[::-1])
    fg.save_adapter(adapted, tmp_path, format="peft")
    assert json.loads((tmp_path / CONFIG).read_text())["save_indices"] is True
    torch.testing.assert_close(open_in_peft(bert, tmp_path)(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fg.load_adapter(bert, tmp_path)(ids).logits, adapted(ids).logits)


def test_a_half_precision_adapter_is_widened(bert, ids, tmp_path):
    trained_in_peft(bert, lora(target_modules=QV), tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({k: v.to(torch.bfloat16) for k, v in t.items()}))
    trained = open_in_peft(bert, tmp_path)
    loaded = fg.load_adapter(bert, tmp_path)
    assert {t.dtype for t in fg.adapter_state(loaded).values()} == {torch.float32}
    torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_half_precision_base_keeps_the_adapter_wide(bert, tmp_path):
    trained_in_peft(bert, lora(target_modules=QV, modules_to_save=["classifier"]), tmp_path)
    loaded = fg.load_adapter(bert.to(torch.bfloat16), tmp_path)
    state = fg.adapter_state(loaded)
    assert state["classifier.weight"].dtype == torch.bfloat16
    assert {t.dtype for k, t in state.items() if not k.startswith("classifier")} == {torch.float32}


def test_stored_indices_survive(bert, ids, tmp_path):
    """Indices no seed gives: through our own format, PEFT's, and a second model."""
    trained_in_peft(bert, unilora(target_modules=QV, save_indices=True), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    names = [k for k in tensors if "unilora_indices" in k]
    for key in names:
        tensors[key] = torch.randint(0, 69, tensors[key].shape)  # entry 69 is used by nobody
    counts = torch.bincount(torch.cat([tensors[k].flatten() for k in names]), minlength=70)
    for key in names:
        tensors[key.replace("indices", "scales")] = counts[tensors[key]].float().rsqrt()
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    expected = open_in_peft(bert, tmp_path / "a")(ids).logits
    loaded = fg.load_adapter(bert, tmp_path / "a")
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-6)
    fg.save_adapter(loaded, tmp_path / "own")
    again = fg.load_adapter(bert, tmp_path / "own")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    fg.save_adapter(again, tmp_path / "back", format="peft")
    assert json.loads((tmp_path / "back" / CONFIG).read_text())["save_indices"] is True
    torch.testing.assert_close(open_in_peft(bert, tmp_path / "back")(ids).logits, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fg.merge(again)(ids).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fg.to_lora(again)(ids).logits, expected, rtol=1e-4, atol=1e-5)
    again(ids).logits.sum().backward()
    assert [n for n, p in again.named_parameters() if p.requires_grad] == ["fxgraft_shared.default.theta"]
    with pytest.raises(fg.CheckpointError, match="would derive others"):
        fg.save_adapter(again, tmp_path / "x", format="peft", save_indices=False)
    with pytest.raises(fg.SpecError, match="takes its indices from a checkpoint"):
        fg.rewrite(bert, fg.Spec(fg.UniLoRA(3, 70, sampler="stored"), QV))


@pytest.mark.filterwarnings("ignore")
def test_a_stored_projection_survives(bert, ids, tmp_path):
    """One that no seed gives and that is larger than the layers, as PEFT gives a second adapter the first one's."""
    trained_in_peft(bert, vera(target_modules=QV), tmp_path / "a")
    larger = {"base_model.vera_A": torch.randn(6, 40), "base_model.vera_B": torch.randn(50, 6)}
    edit_tensors(tmp_path / "a", lambda t: t.update(larger))
    loaded = fg.load_adapter(bert, tmp_path / "a")
    state = fg.adapter_state(loaded)
    assert torch.equal(state["A"], larger["base_model.vera_A"][:, :32])
    assert torch.equal(state["B"], larger["base_model.vera_B"][:32])
    assert [n for n, p in loaded.named_parameters() if p.requires_grad and n[-2:] not in (".d", ".b")] == []
    fg.save_adapter(loaded, tmp_path / "own")
    assert torch.equal(fg.load_adapter(bert, tmp_path / "own")(ids).logits, loaded(ids).logits)
    fg.save_adapter(loaded, tmp_path / "back", format="peft")
    torch.testing.assert_close(open_in_peft(bert, tmp_path / "back")(ids).logits, loaded(ids).logits)
    torch.testing.assert_close(fg.merge(loaded)(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        (lambda t: t.pop("base_model.vera_B"), {}, r"lacks 1 tensor\(s\): 'base_model.vera_B'"),
        (lambda t: t.update({"base_model.vera_A": torch.randn(6, 31)}), {}, r"vera_A is \(6, 31\).*at least \(6, 32\)"),
        (lambda t: t.update({"base_model.vera_A": torch.randn(7, 32)}), {}, r"vera_A is \(7, 32\)"),
        (lambda t: None, {"r": 7}, r"at least \(7, 32\)"),
        (lambda t: None, {"projection_prng_key": 3, "save_projection": False}, "one of both is not the adapter's"),
        (lambda t: None, {"projection_prng_key": -3}, "seed"),
        (lambda t: t.update({f"{QUERY}.vera_lambda_d": torch.randn(5)}), {}, "vera_lambda_d|query.d"),
        (lambda t: t.pop(f"{QUERY}.vera_lambda_b"), {}, "query: b"),
    ],
)
def test_vera_folders_that_are_not_right(bert, tmp_path, change, config, says):
    trained_in_peft(bert, vera(target_modules=QV), tmp_path)
    edit_tensors(tmp_path, change)
    edit(tmp_path, **config)
    with pytest.raises(fg.CheckpointError, match=says):
        fg.load_adapter(bert, tmp_path)


# -- refusals ----------------------------------------------------------------------------------------------------
CONFIGS = {
    "bias": ("lora", {"bias": "all"}, "bias='all'.*stores none of"),
    "dora": ("lora", {"use_dora": True}, "use_dora=True.*merge it in PEFT"),
    "pissa": ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*changes the base"),
    "1 is not True": ("lora", {"init_lora_weights": 1}, "init_lora_weights=1"),
    "lora_bias": ("lora", {"lora_bias": True}, "lora_bias=True"),
    "parameters": ("lora", {"target_parameters": ["x.weight"]}, r"target_parameters=\['x.weight'\]"),
    "tokens": ("lora", {"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\]"),
    "replication": ("lora", {"layer_replication": [[0, 1]]}, "layer_replication="),
    "alora": ("lora", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
    "arrow": ("lora", {"arrow_config": {"top_k": 2}}, "arrow_config="),
    "loftq": ("lora", {"loftq_config": {"loftq_bits": 4}}, "loftq_config="),
    "an option of tomorrow": ("lora", {"use_new_thing": 3}, "use_new_thing=3"),
    "another method": ("lora", {"peft_type": "IA3"}, r"peft_type='IA3' is not supported.*'GLORA', 'LORA', 'UNILORA'"),
    "rank is text": ("lora", {"r": "4"}, "'r' is '4', expected a int"),
    "rank is too large": ("lora", {"r": 33, "rank_pattern": {}}, "\\(33, 32\\)"),
    "rank of another adapter": ("lora", {"r": 3}, r"lora_A|A' is \(4, 32\), the model's is \(3, 32\)"),
    "alpha": ("lora", {"lora_alpha": -1}, "alpha=-1"),
    "dropout": ("lora", {"lora_dropout": 2}, "dropout"),
    "pattern": ("lora", {"rank_pattern": {"(": 2}}, r"'\(' in its config|not a regular expression"),
    "ranks are a list": ("lora", {"rank_pattern": [2]}, "'rank_pattern' is"),
    "targets": ("lora", {"target_modules": 3}, "target_modules=3"),
    "layers": ("lora", {"layers_to_transform": "1"}, "layers_to_transform='1'"),
    "targets without tensors": ("lora", {"target_modules": ["query", "value", "key"]}, "lacks the tensors of 2 layer"),
    "tensors without targets": ("lora", {"target_modules": ["query"]}, "tensors for 2 layer.*do not name"),
    "a head without tensors": ("lora", {"modules_to_save": ["classifier"]}, "lacks 2 tensor.*'classifier.weight'"),
    "a head that is not there": ("lora", {"modules_to_save": ["score"]}, "modules_to_save names 'score'"),
    "unilora: bias": ("unilora", {"bias": "unilora_only"}, "bias='unilora_only'"),
    "unilora: targets": ("unilora", {"target_modules": ["nothing"]}, "stores no indices"),
    "unilora: no targets": ("unilora", {"target_modules": None}, "stores no indices"),
    "unilora: length": ("unilora", {"theta_d_length": 71}, r"'theta' is \(70,\), the model's is \(71,\)"),
    "unilora: indices are missing": ("unilora", {"save_indices": True}, "lacks every unilora_indices"),
    "unilora: an option of tomorrow": ("unilora", {"norm": "l1"}, "norm='l1'"),
    "glora: another choice": ("glora", {"config_A_B": "matrix"}, "A='matrix'"),
    "glora: a choice the tensors do not have": ("glora", {"config_C": "vector"}, "glora_C.X'"),
    "glora: tensors the choices leave over": ("glora", {"config_C": "none"}, r"not understood: 'glora_C\.X[du]'"),
    "glora: bias": ("glora", {"bias": "glora_only"}, "bias='glora_only'"),
}
MAKERS = {"lora": lora, "unilora": unilora, "glora": glora}


@pytest.fixture
def folders(bert, tmp_path):
    def make(kind, **options):
        trained_in_peft(bert, MAKERS[kind](target_modules=QV, **options), tmp_path)
        return tmp_path

    return make


def refused(model, folder, says):
    before = copy.deepcopy(model.state_dict())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(fg.CheckpointError, match=says):
        fg.load_adapter(model, folder)
    assert same_model(model, before) and flags == {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("case", CONFIGS)
def test_refused_configs(bert, folders, case):
    kind, changes, says = CONFIGS[case]
    folder = folders(kind)
    fg.load_adapter(bert, folder)  # it is the change that is refused
    edit(folder, **changes)
    refused(bert, folder, says)


TENSORS = {
    "unknown": ("lora", {}, lambda t: t.update(x=torch.ones(1)), "not understood: 'x'"),
    "no prefix": ("lora", {}, lambda t: t.update({QUERY[17:] + ".lora_A.weight": torch.ones(1)}), "not understood"),
    "dora": ("lora", {}, lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.ones(32)}), "lora_magnitude"),
    "embedding": ("lora", {}, lambda t: t.update({f"{QUERY}.lora_embedding_A": torch.ones(2)}), "query: lora_B"),
    "one half is missing": ("lora", {}, lambda t: t.pop(f"{QUERY}.lora_B.weight"), "lacks 1 tensor.*query: lora_B"),
    "a layer is missing": (
        "lora", {}, lambda t: [t.pop(f"{QUERY}.lora_{x}.weight") for x in "AB"], "lacks the tensors of 1 layer",
    ),
    "all are missing": ("lora", {}, lambda t: (t.clear(), t.update()), "no adapter tensors"),
    "shape": ("lora", {}, lambda t: t.update({f"{QUERY}.lora_A.weight": torch.ones(4, 31)}), r"\(4, 31\)"),
    "nan": ("lora", {}, lambda t: t[f"{QUERY}.lora_A.weight"].fill_(float("nan")), "NaN or infinite"),
    "integers": ("lora", {}, lambda t: t.update({f"{QUERY}.lora_A.weight": torch.ones(4, 32).int()}), "torch.int32"),
    "head": (
        "lora", {"modules_to_save": ["classifier"]}, lambda t: t.pop("base_model.model.classifier.bias"),
        "lacks 1 tensor.*'classifier.bias'",
    ),
    "an untold head": (
        "lora", {}, lambda t: t.update({"base_model.model.classifier.bias": torch.ones(2)}), "understood.*classifier"
    ),
    "theta": (
        "unilora", {}, lambda t: (t.clear(), t.update(x=torch.ones(1))), "lacks 1 tensor.*unilora_theta_d",
    ),
    "an index is missing": (
        "unilora", {"save_indices": True}, lambda t: t.pop(f"{QUERY}.unilora_indices_A"), "query: indices_A",
    ),
    "indices are not whole": (
        "unilora", {"save_indices": True},
        lambda t: t.update({f"{QUERY}.unilora_indices_A": torch.ones(3, 32)}), "expected whole numbers",
    ),
    "indices out of range": (
        "unilora", {"save_indices": True}, lambda t: t[f"{QUERY}.unilora_indices_A"].fill_(70), "from 70 to 70",
    ),
    "indices below zero": (
        "unilora", {"save_indices": True}, lambda t: t[f"{QUERY}.unilora_indices_B"].fill_(-1), "from -1 to -1",
    ),
    "scales of an integer base": (
        "unilora", {"save_indices": True}, lambda t: t[f"{QUERY}.unilora_scales_A"].zero_(), "are not 1 / sqrt",
    ),
    "glora without a tensor": ("glora", {}, lambda t: t.pop(f"{QUERY}.glora_A.Xu"), "lacks 1 tensor.*glora_A.Xu"),
    "glora zeros that are none": (
        "glora", {"config_C": "none"}, lambda t: t[f"{QUERY}.glora_C.zeros"].add_(1), "zeros is not zero",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_refused_tensors(bert, folders, case):
    kind, options, change, says = TENSORS[case]
    folder = folders(kind, **options)
    fg.load_adapter(bert, folder)
    edit_tensors(folder, change)
    refused(bert, folder, says)


def test_real_dora(bert, tmp_path):
    trained_in_peft(bert, lora(target_modules=QV, use_dora=True), tmp_path)
    refused(bert, tmp_path, "use_dora=True")


def test_graph_modules_and_exported_programs(tmp_path):
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 4)
    adapted = perturb(fg.rewrite(net, fg.Spec(fg.LoRA(2), ["0", "2"])))
    fg.save_adapter(adapted, tmp_path, format="peft")
    program = torch.export.export(net, (x,))
    for model in (torch.fx.symbolic_trace(net), torch.compile(net), program.module()):
        torch.testing.assert_close(fg.load_adapter(model, tmp_path)(x), adapted(x))
    graph = torch.fx.symbolic_trace(net)
    theirs = fg.Spec(fg.UniLoRA(2, 20, init_bound=0.5), ["0", "2"])
    fg.save_adapter(fg.rewrite(net, theirs), tmp_path, format="peft")
    with pytest.raises(fg.CheckpointError, match="order of the model's modules, which a graph may have lost"):
        fg.load_adapter(graph, tmp_path)
    own = perturb(fg.rewrite(graph, theirs))
    fg.save_adapter(own, tmp_path, format="peft")
    assert json.loads((tmp_path / CONFIG).read_text())["save_indices"] is True
    torch.testing.assert_close(fg.load_adapter(program, tmp_path).module()(x), own(x))  # the folder has the indices


def test_pickles_are_not_read(bert, folders):
    folder = folders("lora")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    fg.load_adapter(bert, folder)  # safetensors is there, so the pickle is not looked at
    (folder / WEIGHTS).unlink()
    refused(bert, folder, "adapter_model.bin' is a pickle.*save_file")
    (folder / "adapter_model.bin").unlink()
    refused(bert, folder, "is missing")


def test_another_model_and_a_name_that_is_taken(bert, llama, ids, folders):
    folder = folders("lora")
    refused(llama, folder, "lora_A|do not name in this LlamaForCausalLM")
    edit(folder, target_modules=None)
    refused(llama, folder, "does not fit this LlamaForCausalLM")
    both = fg.load_adapter(fg.rewrite(bert, fg.Spec(fg.LoRA(2), ["key"])), folder, name="b")
    fg.set_active(both, ["b"])
    assert torch.equal(both(ids).logits, fg.load_adapter(bert, folder)(ids).logits)
    with pytest.raises(fg.AdapterError, match="already has an adapter 'b'"):
        fg.load_adapter(both, folder, name="b")
