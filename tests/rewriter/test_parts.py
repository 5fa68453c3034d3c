"""Parts of a fused weight, of unequal sizes and interleaved: every method, every verb."""

import copy
import pickle

import pytest
import torch
from methods import FIXED, LOW_RANK, MERGEABLE, METHODS, graft
from small_models import noisy, perturb
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.parts import Cut
from fxgraft.rewriter.state import record_of

#: how 36 features are cut: unequal blocks, stretches with a piece of each, single features in turn
CUTS = {
    "unequal": {"parts": (18, 10, 8), "select": (0, 2)},
    "grouped": {"parts": (6, 3, 3), "select": (0, 2), "groups": 3},
    "in turn": {"parts": 2, "select": (1,), "groups": 18},
}


class Heads(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36, bias=bias)
        self.out = nn.Linear(36, 4)

    def forward(self, x):
        y = self.qkv(x)
        return y, self.out(torch.tanh(y))


def spec(method, cut):
    return fg.Spec(method, [fg.Target("qkv", **CUTS[cut]), "out"])


def rows_of(cut):
    """The numbers of the rows, written out one by one."""
    given = CUTS[cut]
    groups = given.get("groups", 1)
    sizes = given["parts"] if isinstance(given["parts"], tuple) else (36 // groups // given["parts"],) * given["parts"]
    stride = sum(sizes)
    return {
        part: [g * stride + sum(sizes[:part]) + i for g in range(groups) for i in range(sizes[part])]
        for part in given["select"]
    }


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Heads().eval()


@pytest.fixture
def x():
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_only_the_rows_of_the_parts_change(model, x, method, cut):
    before = copy.deepcopy(model.state_dict())
    adapted = perturb(graft(model, spec(method, cut))).eval()
    (y, _), (base, _) = adapted(x), model(x)
    rows = [row for part in rows_of(cut).values() for row in part]
    others = [row for row in range(36) if row not in rows]
    assert torch.equal(y[..., others], base[..., others])
    assert ((y - base).abs().amax((0, 1)) > 0)[rows].all()
    with fg.disabled(adapted):
        assert all(map(torch.equal, adapted(x), model(x)))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    fg.remove(adapted, "default")
    assert all(map(torch.equal, adapted(x), model(x)))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("method", MERGEABLE.values(), ids=MERGEABLE)
def test_each_part_is_what_a_layer_of_these_rows_would_be(x, method, cut):
    """Against layers of their own with the same tensors, in float64, forward and backward, and merged."""
    torch.manual_seed(0)
    model = Heads().double()
    x = x.double().requires_grad_()
    adapted = perturb(graft(model, spec(method, cut)))
    y, _ = adapted(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    want = model.qkv(x).clone()
    state = fg.adapter_state(adapted)
    for part, rows in rows_of(cut).items():
        layer = nn.Linear(12, len(rows)).double()
        layer.load_state_dict({"weight": model.qkv.weight[rows], "bias": model.qkv.bias[rows]})
        layer = graft(layer, fg.Spec(method))
        own = {k.removeprefix(f"qkv[{part}]."): t for k, t in state.items() if k.startswith(f"qkv[{part}].")}
        if own and not isinstance(method, (fg.UniLoRA, fg.VeRA)):  # these draw a site's part by its place among all
            fg.swap(layer, dict(own))
            want = want.index_copy(-1, torch.tensor(rows), layer(x))
        else:
            want = want.index_copy(-1, torch.tensor(rows), y[..., rows])
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    merged = fg.merge(adapted)
    torch.testing.assert_close(merged(x), adapted(x), rtol=1e-10, atol=1e-10)
    rows = [row for part in rows_of(cut).values() for row in part]
    changed = (merged.qkv.weight != model.qkv.weight).any(1)
    assert changed[rows].all() and changed.sum() == len(rows)
    (gx,) = torch.autograd.grad(merged(x)[0].square().sum(), x)
    torch.testing.assert_close(gradient, gx, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_saved_and_opened_copied_and_pickled(model, x, method, tmp_path):
    adapted = perturb(graft(model, spec(method, "grouped"))).eval()
    fg.save_adapter(adapted, tmp_path)
    want = adapted(x)
    for other in (fg.load_adapter(model, tmp_path), copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert all(map(torch.equal, other.eval()(x), want))
    assert fg.adapter_state(fg.load_adapter(model, tmp_path)).keys() == fg.adapter_state(adapted).keys()
    other = graft(model, spec(method, "grouped")).eval()
    fg.swap(other, fg.adapter_state(adapted))
    assert all(map(torch.equal, other(x), want))


@pytest.mark.parametrize("method", LOW_RANK.values(), ids=LOW_RANK)
@pytest.mark.parametrize("cut", CUTS)
def test_to_lora_combine_and_bank(model, x, method, cut):
    adapted = noisy(graft(model, spec(method, cut)), "default", 1).eval()
    adapted = noisy(graft(adapted, spec(method, cut), "b"), "b", 2).eval()
    fg.set_active(adapted, ["default"])
    want = adapted(x)
    torch.testing.assert_close(fg.to_lora(adapted)(x), want, rtol=1e-5, atol=1e-5)
    banked = fg.bank(adapted)
    ids = fg.adapter_ids(banked, ["default", None])
    torch.testing.assert_close(banked(x, adapter_ids=ids)[0][0], want[0][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(banked(x, adapter_ids=ids)[0][1], model(x)[0][1])
    fg.set_active(adapted, {"default": 0.5, "b": -2.0})
    both = adapted(x)
    torch.testing.assert_close(fg.merge(adapted)(x), both, rtol=1e-5, atol=1e-5)
    combined = fg.combine(adapted, {"default": 0.5, "b": -2.0}, name="c", method="cat")
    torch.testing.assert_close(combined(x), both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", FIXED.values(), ids=FIXED)
def test_compiled_as_it_is(model, x, method):
    torch._dynamo.reset()
    adapted = perturb(graft(model, spec(method, "grouped"))).eval()
    with torch.no_grad():
        torch.testing.assert_close(fg.compile(adapted, fullgraph=True)(x), adapted(x), rtol=1e-5, atol=1e-5)


def test_adapters_whose_parts_overlap(model, x):
    """Whole, unequal and interleaved parts of one weight, active together with weights."""
    adapted, names = model, {"whole": ["qkv"], **{cut: [fg.Target("qkv", **CUTS[cut])] for cut in CUTS}}
    for seed, (name, targets) in enumerate(names.items()):
        method = fg.GLoRA(2, fg.GLoRAPath("vector", "lora", "lora", "vector", "vector")) if seed % 2 else fg.LoRA(2)
        name = name.replace(" ", "_")
        adapted = noisy(fg.rewrite(adapted, fg.Spec(method, targets), name=name), name, seed)
    weights = {"whole": 1.0, "grouped": -0.5, "in_turn": 2.0, "unequal": 1.0}
    fg.set_active(adapted, weights)
    deltas = []
    for name in weights:
        fg.set_active(adapted, [name])
        deltas.append(weights[name] * (adapted(x)[0] - model(x)[0]))
    fg.set_active(adapted, weights)
    torch.testing.assert_close(adapted(x)[0], model(x)[0] + sum(deltas), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fg.merge(adapted, weights=weights)(x), adapted(x), rtol=1e-5, atol=1e-5)


def test_explain_says_which_rows(model):
    adapted = fg.rewrite(model, spec(fg.LoRA(2), "grouped"))
    first, second, out = fg.explain(adapted).rows
    assert (first.rows, second.rows, out.rows) == ("rows 0..5 of each 12 of 36", "rows 9..11 of each 12 of 36", "")
    assert "rows 9..11 of each 12" in str(fg.explain(adapted)).replace("\n", "")
    assert fg.explain(fg.rewrite(model, spec(fg.LoRA(2), "unequal"))).rows[1].rows == "rows 28..35 of 36"


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({"parts": (18, 10, 7)}, "'qkv' produces 36 features, and these parts are 35 together"),
        ({"parts": 3, "groups": 5}, "produces 36 features, which 5 does not divide"),
        ({"parts": 5, "groups": 3}, "12 in each of 3 groups, which 5 does not divide"),
        ({"select": ("q_proj",)}, "how 'qkv' is cut is not known; give parts="),
    ],
)
def test_a_cut_that_does_not_fit(model, target, says):
    with pytest.raises(fg.TargetError) as error:
        fg.rewrite(model, fg.Spec(fg.LoRA(2), [fg.Target("qkv", **target)]))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({"parts": ()}, "allowed are whole numbers from 1 up"),
        ({"parts": (3, 0)}, "allowed are whole numbers from 1 up"),
        ({"parts": (3, 3), "select": (2,)}, "allowed are 0..1"),
        ({"parts": 3, "groups": 0}, "groups=0"),
        ({"parts": 3, "select": ("q_proj",)}, "selected by name"),
        ({"parts": 3, "select": (0, "q_proj")}, "allowed are 0..2"),
    ],
)
def test_targets_that_make_no_sense(target, says):
    with pytest.raises(fg.SpecError) as error:
        fg.Target("qkv", **target)
    assert says in str(error.value)


def test_a_spec_with_parts_survives_json():
    targets = [fg.Target("qkv", (6, 3, 3), (0, 2), groups=3), fg.Target("a", 3), fg.Target("b", select=["q"])]
    given = fg.Spec(fg.LoRA(2), targets)
    assert fg.Spec.from_dict(given.to_dict()) == given
    assert given.to_dict()["targets"][1] == {"pattern": "a", "parts": 3, "select": [0]}


def test_rows_of_another_cut_are_not_taken(model, tmp_path):
    """Sites of one name and one size whose rows lie elsewhere."""
    apart = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(2), [fg.Target("qkv", 3, (0,), groups=3)])))
    blocks = fg.rewrite(model, fg.Spec(fg.LoRA(2), [fg.Target("qkv", 3, (0,))]))
    with pytest.raises(fg.AdapterError, match="3 parts of 4 in 3 stretches there, and into equal parts"):
        fg.swap(blocks, fg.adapter_state(apart))
    both = fg.rewrite(apart, fg.Spec(fg.LoRA(2), [fg.Target("qkv", 3, (0,))]), name="b")
    for verb in (lambda: fg.combine(both, ["default", "b"], name="c"), lambda: fg.bank(both)):
        with pytest.raises(fg.FxgraftError, match="cut one weight differently"):
            verb()
    banked = fg.bank(apart, capacity=2)
    with pytest.raises(fg.AdapterError, match="cut one weight differently"):
        fg.add_tenant(banked, "b", blocks)
    record = record_of(fg.bank(model, {"a": fg.adapter_state(apart)}), "bank").sites
    assert [site.cut for site in record] == [Cut((4, 4, 4), 3)]
