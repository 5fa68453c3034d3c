"""Convolutions as sites: one to three dimensions, groups, strides, pads, dilation, transposed; every method."""

import copy

import pytest
import torch
import torch.nn.functional as F
from methods import MERGEABLE, METHODS, graft, supernet
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.products.convolution import conv_rows
from fxgraft.rewriter.state import record_of

CASES = {
    "1d": (nn.Conv1d, (6, 8, 3), {"stride": 2, "padding": 1}, (2, 6, 9)),
    "2d": (nn.Conv2d, (6, 8, 3), {"padding": 1}, (2, 6, 7, 5)),
    "without a batch": (nn.Conv2d, (6, 8, (3, 2)), {"stride": (2, 1)}, (6, 7, 5)),
    "3d": (nn.Conv3d, (6, 9, 2), {"padding": 1, "dilation": 2}, (2, 6, 4, 5, 3)),
    "1x1": (nn.Conv2d, (6, 8, 1), {"bias": False}, (2, 6, 7, 5)),
    "groups": (nn.Conv2d, (6, 8, 3), {"padding": 1, "groups": 2, "dilation": 2}, (2, 6, 7, 5)),
    "depthwise": (nn.Conv2d, (6, 6, 3), {"padding": 1, "groups": 6}, (2, 6, 7, 5)),
    "same": (nn.Conv2d, (6, 8, (4, 3)), {"padding": "same", "dilation": 2}, (2, 6, 7, 5)),
    "valid": (nn.Conv2d, (6, 8, 3), {"padding": "valid"}, (2, 6, 7, 5)),
    "reflect": (nn.Conv1d, (6, 8, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 6, 9)),
    "circular same": (nn.Conv2d, (6, 8, 3), {"padding": "same", "padding_mode": "circular"}, (2, 6, 7, 5)),
    "transposed 1d": (nn.ConvTranspose1d, (6, 8, 3), {"stride": 2, "padding": 1, "output_padding": 1}, (2, 6, 9)),
    "transposed 2d": (
        nn.ConvTranspose2d,
        (6, 9, (3, 2)),
        {"stride": (2, 3), "padding": 1, "dilation": 2, "groups": 3},
        (2, 6, 7, 5),
    ),
    "transposed 3d": (nn.ConvTranspose3d, (6, 8, 2), {"stride": 2, "bias": False}, (2, 6, 3, 2, 3)),
}


def model_of(case):
    kind, sizes, options, shape = CASES[case]
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), kind(*sizes, **options)), torch.randn(shape)


def filled(adapted, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "fxgraft" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapted.eval()


def the_site(adapted):
    return record_of(adapted, "default").sites[0]


@pytest.mark.parametrize("case", CASES)
def test_the_rows_times_the_matrix_are_the_convolution(case):
    model, x = model_of(case)
    layer, site = model[1], the_site(fg.rewrite(model, fg.Spec(fg.LoRA(2), "1")))
    product = site.product
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    rows = conv_rows(x, *product._numbers)
    assert rows.shape[-1] == site.in_features
    matrix = product.matrix(layer.weight)
    assert matrix.shape == (site.out_features, site.in_features)
    if product.groups > 1:  # every group's rows with its own weights
        y = torch.einsum("...gi,goi->...go", rows, matrix.unflatten(0, (product.groups, -1))).flatten(-2)
    else:
        y = rows @ matrix.t()
    y = y.movedim(-1, product.channel)
    if layer.bias is not None:
        y = y + layer.bias.view(-1, *(1,) * (-product.channel - 1))
    torch.testing.assert_close(y, model(model_of(case)[1]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MERGEABLE)
def test_every_method_computes_what_its_merged_weight_does(case, name):
    model, x = model_of(case)
    adapted = filled(graft(model, fg.Spec(METHODS[name], "1")))
    y = adapted(x)
    assert not torch.allclose(y, model(x), atol=1e-3)
    exact = fg.merge(copy.deepcopy(adapted).double())(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=2e-5)
    with fg.disabled(adapted):
        assert torch.equal(adapted(x), model(x))


@pytest.mark.parametrize("case", CASES)
def test_the_factors_of_a_low_rank_delta_are_a_convolution_and_one_of_1x1(case):
    kind = CASES[case][0]
    model, x = model_of(case)
    adapted = filled(fg.rewrite(model, fg.Spec(fg.LoRA(2), "1")))
    A, B = (t for n, t in adapted.named_parameters() if "fxgraft" in n)
    layer = copy.deepcopy(model[1])
    delta = (8.0 * B @ A).detach()
    if "Transpose" in kind.__name__:
        groups = layer.groups
        delta = torch.stack([d.unflatten(1, (-1, *layer.kernel_size)) for d in delta.chunk(groups)])
        layer.weight.data += delta.transpose(1, 2).reshape(layer.weight.shape)
    else:
        layer.weight.data += delta.view(layer.weight.shape)
    torch.testing.assert_close(adapted(x), layer(x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", ["2d", "groups", "transposed 2d"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_a_float64_twin(case, name):
    method = METHODS[name]
    model, x = model_of(case)
    adapted = filled(graft(model, fg.Spec(method, "1"))).train()
    exact = copy.deepcopy(adapted).double()
    x = x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    for one, given in ((adapted, x), (exact, wide)):
        torch.manual_seed(3)
        one(given).square().mean().backward()
    pairs = [(p, q) for p, q in zip(adapted.parameters(), exact.parameters(), strict=True) if p.requires_grad]
    assert pairs and all(p.grad is not None for p, _ in pairs)
    for p, q in [*pairs, (x, wide)]:
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["1d", "depthwise", "transposed 2d", "3d"])
def test_the_rows_of_an_operator_and_its_halves_are_the_same_function(case):
    model, x = model_of(case)
    halves = filled(fg.rewrite(model, fg.Spec(fg.HydraLoRA(rank=2, experts=3), "1")))
    rows = filled(fg.rewrite(model, fg.Spec(fg.HydraLoRA(rank=2, experts=3, dropout=0.5), "1")))
    torch.testing.assert_close(halves(x), rows(x), rtol=1e-4, atol=1e-4)
    rows.train()
    assert not torch.equal(rows(x), rows(x))
    each = filled(
        fg.rewrite(model, fg.Spec(fg.HydraLoRA(rank=2, experts=3, dropout=0.5, per_expert_dropout=True), "1"))
    )
    torch.testing.assert_close(halves(x), each(x), rtol=1e-4, atol=1e-4)
    assert each.train()(x).shape == halves(x).shape


@pytest.mark.parametrize("case", ["2d", "depthwise", "transposed 1d"])
def test_a_supernet_on_a_fixed_path_is_that_path(case):
    method = METHODS["supernet"]
    assert supernet(method)
    model, x = model_of(case)
    adapted = filled(fg.rewrite(model, fg.Spec(method, "1")))
    y = adapted(x)
    fixed = fg.fix_paths(adapted, {the_site(adapted).name: fg.GLoRAPath("lora", "lora", "lora", "vector", "vector")})
    torch.testing.assert_close(y, fg.merge(fixed)(x), rtol=1e-4, atol=1e-4)


def test_parts_of_a_convolution_and_why_not_of_one_with_groups():
    model, x = model_of("2d")
    adapted = filled(fg.rewrite(model, fg.Spec(fg.LoRA(2), [fg.Target("1", parts=4, select=(1, 3))])))
    change = (adapted(x) - model(x)).abs().amax((0, 2, 3))
    assert (change[[0, 1, 4, 5]] == 0).all() and (change[[2, 3, 6, 7]] > 0).all()
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x), rtol=1e-5, atol=2e-5)
    with pytest.raises(fg.TargetError, match="groups would be cut through; adapt all of it"):
        fg.rewrite(model_of("groups")[0], fg.Spec(fg.LoRA(2), [fg.Target("1", parts=2)]))


def test_names_mean_convolutions_and_all_linear_does_not():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))

    def sites(targets):
        return [s.name for s in record_of(fg.rewrite(model, fg.Spec(fg.LoRA(1), targets)), "default").sites]

    assert sites("all-linear") == ["2", "3"] and sites(["0", "all-linear"]) == ["0", "2", "3"]
    assert sites("re:.*") == ["0", "2", "3"]


class Functional(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.positions = nn.Parameter(torch.randn(1, 4, 3, 3))
        self.how = how

    def forward(self, x):
        return self.how(self, x) + self.positions


def test_a_convolution_with_a_bare_parameter():
    model, x = Functional(lambda m, x: F.conv2d(x, m.kernels, stride=2)), torch.randn(2, 3, 7, 7)
    adapted = filled(fg.rewrite(model, fg.Spec(fg.LoRA(2), "kernels")))
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x), rtol=1e-5, atol=2e-5)
    with pytest.raises(fg.TargetError, match="'positions' cannot be adapted"):
        fg.rewrite(model, fg.Spec(fg.LoRA(2), ["kernels", "positions"]))
    with pytest.raises(fg.TargetError, match="taken by their names only"):  # a glob means no bare tensor
        fg.rewrite(model, fg.Spec(fg.LoRA(2), "kern*"))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda m, x: F.conv2d(x, m.kernels, padding=(x.shape[-1] // 7, 1), stride=2), "computed at every call"),
        (lambda m, x: F.conv2d(x, m.kernels, stride=2) + F.conv2d(x, m.kernels, padding=1, stride=3), "that differ"),
        (lambda m, x: F.conv2d(x, m.kernels.transpose(2, 3), stride=2), "not a linear product"),
        (lambda m, x: F.conv2d(x, m.kernels, stride=2) * m.kernels.sum(), "not a linear product"),
    ],
)
def test_what_is_no_convolution_says_why(how, reason):
    with pytest.raises(fg.TargetError, match=reason):
        fg.rewrite(Functional(how), fg.Spec(fg.LoRA(2), "kernels"))


def test_a_transposed_convolution_refuses_an_output_size():
    adapted = fg.rewrite(model_of("transposed 1d")[0], fg.Spec(fg.LoRA(2), "1"))
    with pytest.raises(ValueError, match="without output_size, or exclude it"):
        adapted[1](torch.randn(2, 6, 9), output_size=[18])


def test_kernels_in_another_memory_format_merge():
    model, x = model_of("2d")
    adapted = filled(fg.rewrite(model.to(memory_format=torch.channels_last), fg.Spec(fg.LoRA(2), "1")))
    assert not adapted[1].weight.is_contiguous()
    merged = fg.merge(adapted)
    torch.testing.assert_close(merged(x), adapted(x), rtol=1e-5, atol=2e-5)
    assert not torch.equal(merged[1].weight, model[1].weight)
