"""Forms: an adapter is the same in its form: alone, in a stack, in larger tensors, and under a weight."""

import pytest
import torch
from methods import BANKED, LOW_RANK, graft
from small_models import perturb

import fxgraft as fg
from fxgraft.passes.methods.low_rank_form import Factors
from fxgraft.passes.methods.unilora.vector_form import Vector
from fxgraft.passes.models.opened import form_values
from fxgraft.rewriter.forms import form_of, form_with, forms_of

X = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def adapters(method, count):
    """The form and the tensors of random adapters of one layer, and what each adds to X."""
    torch.manual_seed(0)
    base = torch.nn.Linear(12, 8).double()
    for _ in range(count):
        adapted = perturb(graft(base, fg.Spec(method)), 0.3)
        ((form, tensors),) = form_values(adapted, "default").values()
        yield form, tensors, (adapted(X) - base(X)).detach()


@pytest.mark.parametrize("method", BANKED.values(), ids=BANKED)
def test_the_products_of_a_form_are_the_adapter(method):
    ((form, tensors, delta),) = adapters(method, 1)
    assert type(form) is form_of(method)
    torch.testing.assert_close(form.products(X, *tensors.values()), delta)
    larger = form.grown(tensors, 2)
    for name, tensor in tensors.items():
        growth = [new - old for new, old in zip(larger[name].shape, tensor.shape, strict=True)]
        assert all((by > 0) == (axis in form.open_axes) for by, axis in zip(growth, form.layout(name), strict=True))
    torch.testing.assert_close(form.products(X, *larger.values()), delta)
    torch.testing.assert_close(form.products(X, *form.weighted([(tensors, -0.5)]).values()), -0.5 * delta)


@pytest.mark.parametrize("method", LOW_RANK.values(), ids=LOW_RANK)
def test_factors_add_up(method):
    (form, one, first), (_, other, second) = adapters(method, 2)
    both = form.weighted([(one, 2.0), (other, -0.25)])
    torch.testing.assert_close(form.products(X, *both.values()), 2 * first - 0.25 * second)


@pytest.mark.parametrize("method", BANKED.values(), ids=BANKED)
def test_a_bank_and_a_graph_compute_the_same_of_a_stack(method):
    found = list(adapters(method, 3))
    kind, ids = type(found[0][0]), torch.tensor([2, 0, 1, 2])
    stacks = {name: torch.stack([tensors[name] for _, tensors, _ in found]) for name in kind.axes}
    expected = torch.stack([found[i][2][row] for row, i in enumerate(ids.tolist())])
    chosen = [stack.index_select(0, ids) for stack in stacks.values()]
    torch.testing.assert_close(kind.products(X, *chosen), expected)
    turned = {name: s.transpose(-1, -2) if kind.axes[name][-1] == "in" else s for name, s in stacks.items()}
    torch.testing.assert_close(kind.operator(X, ids, *turned.values()), expected)
    form, again = kind.opened(turned, 3)
    assert form.sizes["slots"] == 3
    assert all(torch.equal(again[name], stacks[name]) for name in kind.axes)


def test_experts_of_a_stack_do_not_grow():
    ((form, tensors),) = [(form, tensors) for form, tensors, _ in adapters(BANKED["hydralora"], 1)]
    stacks = {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}
    stacked = type(form)(slots=1, graph=True, **{axis: form.sizes[axis] for axis in ("rank", "experts")})
    assert form.open_axes == ("rank", "experts") and stacked.open_axes == ("slots", "rank")
    assert {n: tuple(t.shape) for n, t in stacked.grown(stacks, 1).items()} == {
        "A": (2, 12, 3), "router": (2, 12, 3), "B": (2, 3, 3, 8)
    }  # fmt: skip


def test_which_forms_a_method_has():
    assert forms_of(fg.LoRA()) == [Factors] and forms_of(fg.UniLoRA()) == [Vector, Factors]
    assert forms_of(fg.UniLoRA(sampler="stored")) == [Factors]  # its indices follow from no config
    assert form_of(fg.UniLoRA()) is Factors  # a graph takes no vector with indices of its own
    assert forms_of(fg.GLoRA()) == [] and form_of(fg.GLoRA()) is None
    assert forms_of(Factors(slots=2)) == []
    assert form_with({"A", "B"}) is Factors and form_with({"A", "C"}) is None
    assert form_with({"A", "router", "B"}) is form_of(fg.HydraLoRA())
