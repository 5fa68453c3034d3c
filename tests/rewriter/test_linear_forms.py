"""Ways to write a linear map: each is adapted as merging would have it, or refused with a reason. Nothing between."""

import copy

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS, graft
from small_models import perturb
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.state import record_of

aten = torch.ops.aten


class Form(nn.Module):
    """`w` of the given shape, a `bias (5,)`, `b` for short, another weight `v (5, 5)`, and any function of them."""

    def __init__(self, how, shape):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(5))
        self.v = nn.Parameter(torch.randn(5, 5))
        self.register_buffer("scale", torch.rand(5) + 0.5)
        self.gain = 0.7
        self.how = how

    @property
    def b(self):
        return self.bias

    def forward(self, x):
        return self.how(self, x)


OI, IO, SQ = (5, 7), (7, 5), (7, 7)  # (out, in), (in, out), square
SITES = {
    "linear": (OI, lambda m, x: F.linear(x, m.w)),
    "linear with bias": (OI, lambda m, x: F.linear(x, m.w, m.b)),
    "linear by keywords": (OI, lambda m, x: F.linear(bias=m.b, input=x, weight=m.w)),
    "aten linear": (OI, lambda m, x: aten.linear.default(x, m.w, m.b)),
    "linear of .t()": (IO, lambda m, x: F.linear(x, m.w.t(), m.b)),
    "@": (IO, lambda m, x: x @ m.w),
    "@ .T": (OI, lambda m, x: x @ m.w.T),
    "@ .mT": (OI, lambda m, x: x @ m.w.mT),
    "@ .H": (OI, lambda m, x: x @ m.w.H),
    "@ .t().t()": (IO, lambda m, x: x @ m.w.t().t()),
    "@ three transposes": (OI, lambda m, x: x @ m.w.T.t().transpose(-1, -2)),
    "@ .adjoint()": (OI, lambda m, x: x @ m.w.adjoint()),
    "@ .transpose(0, 1)": (OI, lambda m, x: x @ m.w.transpose(0, 1)),
    "@ .transpose(-1, 0)": (OI, lambda m, x: x @ m.w.transpose(-1, 0)),
    "@ .transpose(0, 0)": (IO, lambda m, x: x @ m.w.transpose(0, 0)),
    "@ .transpose(1, -1)": (IO, lambda m, x: x @ m.w.transpose(1, -1)),
    "@ .transpose by keywords": (OI, lambda m, x: x @ m.w.transpose(dim0=1, dim1=0)),
    "@ torch.transpose": (OI, lambda m, x: x @ torch.transpose(m.w, 0, 1)),
    "@ torch.transpose by keywords": (OI, lambda m, x: x @ torch.transpose(input=m.w, dim0=0, dim1=-1)),
    "@ .swapaxes": (OI, lambda m, x: x @ m.w.swapaxes(0, 1)),
    "@ .movedim": (OI, lambda m, x: x @ m.w.movedim(0, 1)),
    "@ .permute(1, 0)": (OI, lambda m, x: x @ m.w.permute(1, 0)),
    "@ .permute(0, 1)": (IO, lambda m, x: x @ m.w.permute(0, 1)),
    "linear of .permute(0, 1)": (SQ, lambda m, x: F.linear(x, m.w.permute(0, 1))),
    "@ .permute((-1, -2))": (OI, lambda m, x: x @ m.w.permute((-1, -2))),
    "@ .permute(dims=...)": (OI, lambda m, x: x @ m.w.permute(dims=(1, 0))),
    "@ torch.permute": (IO, lambda m, x: x @ torch.permute(m.w, [0, 1])),
    "@ aten.permute": (OI, lambda m, x: x @ aten.permute.default(m.w, [1, 0])),
    "@ aten.permute nothing": (SQ, lambda m, x: x @ aten.permute.default(m.w, [0, 1])),
    "matmul": (IO, lambda m, x: torch.matmul(x, m.w)),
    "matmul by keywords": (IO, lambda m, x: torch.matmul(other=m.w, input=x)),
    ".matmul": (IO, lambda m, x: x.matmul(m.w)),
    "mm": (IO, lambda m, x: torch.mm(x, m.w)),
    "one dimension": (IO, lambda m, x: torch.stack([x[0] @ m.w, F.linear(x[1], m.w.t())])),
    "three dimensions": (OI, lambda m, x: F.linear(x.unsqueeze(0), m.w, m.b)),
    "a computed bias": (OI, lambda m, x: F.linear(x, m.w, m.b * 2)),
    "addmm": (IO, lambda m, x: torch.addmm(m.b, x, m.w)),
    "addmm with ones": (IO, lambda m, x: torch.addmm(m.b, x, m.w, beta=1.0, alpha=1)),
    ".addmm": (IO, lambda m, x: m.b.addmm(x, m.w)),
    "@ + b": (IO, lambda m, x: x @ m.w + m.b),
    "b + @": (IO, lambda m, x: m.b + x @ m.w),
    "(@).add(b)": (IO, lambda m, x: (x @ m.w).add(m.b)),
    "@ += b": (IO, lambda m, x: torch.add(x @ m.w, m.b)),
    "b - @": (IO, lambda m, x: m.b - x @ m.w),
    "@ - b": (IO, lambda m, x: x @ m.w - m.b),
    "rsub": (IO, lambda m, x: torch.rsub(x @ m.w, m.b)),
    "add with alpha": (IO, lambda m, x: torch.add(x @ m.w, m.b, alpha=3)),
    "add to a scaled one": (IO, lambda m, x: torch.add(m.b, x @ m.w, alpha=3)),
    "@ + b, b read elsewhere": (IO, lambda m, x: x @ m.w + m.b + m.b.norm()),
    "@ + b, product read elsewhere": (IO, lambda m, x: (lambda h: (h + m.b) * h)(x @ m.w)),
    "@ + 2 b": (IO, lambda m, x: x @ m.w + m.b * 2),
    "@ + b + b": (IO, lambda m, x: x @ m.w + m.b + m.b),
    "one bias for two weights": (IO, lambda m, x: (x @ m.w + m.b) @ m.v + m.b),
    "written into after": (OI, lambda m, x: F.linear(x, m.w, m.b).add_(5.0).relu_()),
    "twice": (SQ, lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.w)),
    "cast to its own": (OI, lambda m, x: F.linear(x, m.w.to(x.dtype), m.b.to(x.dtype))),
    "cast to wider": (OI, lambda m, x: F.linear(x.double(), m.w.double()).float()),
    "cast by type_as": (OI, lambda m, x: F.linear(x, m.w.type_as(x))),
    "input cast to it": (OI, lambda m, x: F.linear(x.to(m.w.dtype).type_as(m.w), m.w)),
    "its shape is read": (OI, lambda m, x: F.linear(x.view(-1, m.w.shape[1]), m.w).view(-1, m.w.size(0))),
    "contiguous": (OI, lambda m, x: x @ m.w.t().contiguous()),
    "detached": (OI, lambda m, x: F.linear(x, m.w.detach())),
    "an embedding": (OI, lambda m, x: F.embedding(x.mul(9).long().abs() % 5, m.w)),
    "einsum": (OI, lambda m, x: torch.einsum("ni,oi->no", x, m.w)),
    "einsum without an output": (IO, lambda m, x: torch.einsum("ni,io", x, m.w)),
    "einsum, weight first": (OI, lambda m, x: torch.einsum("oi,ni->on", m.w, x)),
    "einsum with dots": (OI, lambda m, x: torch.einsum("...i,oi->...o", x[None], m.w)),
    "einsum of .t()": (IO, lambda m, x: torch.einsum("ni,oi->no", x, m.w.t())),
    "einsum of a list": (OI, lambda m, x: torch.einsum("ni,oi->no", [x, m.w])),
    "einsum into heads": ((2, 3, 7), lambda m, x: torch.einsum("ni,hdi->hnd", x, m.w)),
    "einsum over heads": ((4, 2, 7), lambda m, x: torch.einsum("nhi,ohi->no", torch.stack([x, x * 2], 1), m.w)),
    "einsum that sums x": (OI, lambda m, x: torch.einsum("nti,oi->no", x[None], m.w)),
    "einsum + b": (OI, lambda m, x: torch.einsum("ni,oi->no", x, m.w) + m.b),
    "aten einsum": (OI, lambda m, x: aten.einsum.default("ni,oi->no", [x, m.w])),
    "heads of a view": ((6, 7), lambda m, x: torch.einsum("ni,hdi->nhd", x, m.w.view(2, -1, 7))),
    "heads of a permuted one": ((2, 7, 3), lambda m, x: torch.einsum("ni,ihd->nhd", x, m.w.permute(1, 0, 2))),
    "tensordot": (IO, lambda m, x: torch.tensordot(x, m.w, 1)),
    "tensordot by dims": (OI, lambda m, x: torch.tensordot(x, m.w, dims=([1], [1]))),
    "tensordot into heads": ((7, 2, 3), lambda m, x: torch.tensordot(x, m.w, dims=([-1], [0]))),
    "tensordot over two": ((2, 7, 4), lambda m, x: torch.tensordot(torch.stack([x, -x], 1), m.w)),
    "inner": (OI, lambda m, x: torch.inner(x, m.w)),
    "scaled": (OI, lambda m, x: F.linear(x, m.w * 0.5)),
    "scaled by an attribute": (OI, lambda m, x: F.linear(x, m.w * m.gain, m.b)),
    "divided": (IO, lambda m, x: x @ (m.w / 3)),
    "negated": (OI, lambda m, x: F.linear(x, -m.w)),
    "negated + b": (IO, lambda m, x: x @ (-m.w) + m.b),
    "viewed": (OI, lambda m, x: x @ m.w.view(7, 5)),
    "reshaped": (OI, lambda m, x: x @ m.w.reshape(7, 5)),
    "flattened": ((7, 2, 3), lambda m, x: x @ m.w.reshape(7, 6)),
    "bmm": (IO, lambda m, x: torch.bmm(x.expand(4, -1, -1), m.w.unsqueeze(0).expand(4, -1, -1))),
    "bmm of .expand": (IO, lambda m, x: torch.bmm(x.expand(4, -1, -1), m.w.expand(4, 7, 5))),
    "baddbmm": (IO, lambda m, x: torch.baddbmm(m.b, x.expand(4, -1, -1), m.w.unsqueeze(0).expand(4, -1, -1))),
    "@ .unsqueeze": (IO, lambda m, x: x @ m.w.unsqueeze(0)),
    "two weights": (OI, lambda m, x: F.linear(F.linear(x, m.w, m.b), m.v)),
}
REFUSED = {
    "itself and its transpose": (SQ, lambda m, x: (x @ m.w) @ m.w.t(), "both as it is and transposed"),
    "an autoencoder": (OI, lambda m, x: F.linear(F.linear(x, m.w), m.w.t()), "both as it is and transposed"),
    "left operand": (OI, lambda m, x: (m.w @ x.t()).t(), "left operand"),
    "input of a linear": (SQ, lambda m, x: F.linear(m.w, x), "left operand|computed"),
    "input and weight": (SQ, lambda m, x: F.linear(x, m.w) + F.linear(m.w, m.w)[:3], "left operand"),
    "sliced": (OI, lambda m, x: F.linear(x[:, :4], m.w[:, :4]), "not a linear product"),
    "chunked": (OI, lambda m, x: F.linear(x[:, :3], m.w.split(3, 1)[0]), "not a linear product"),
    "as_strided": (OI, lambda m, x: x @ m.w.as_strided((7, 5), (1, 7)), "not a linear product"),
    "unsqueezed": (OI, lambda m, x: F.linear(x, m.w.unsqueeze(0)[0]), "not a linear product"),
    "padded": (OI, lambda m, x: F.linear(x, F.pad(m.w, (0, 0))), "not a linear product"),
    "stacked": (OI, lambda m, x: F.linear(x, torch.cat([m.w, m.v[:, :1].expand(5, 7)])), "not a linear product"),
    "in place": (OI, lambda m, x: F.linear(x, m.w.detach().clone().mul_(2)), "not a linear product"),
    "in place on its view": (OI, lambda m, x: (m.w.detach().t().add_(0), F.linear(x, m.w))[1], "not a linear product"),
    ".data": (OI, lambda m, x: F.linear(x, m.w.data), "not a linear product"),
    "cast to integers": (OI, lambda m, x: F.linear(x.long(), m.w.to(torch.int64)).float(), "not a linear product"),
    "cast by .type": (OI, lambda m, x: F.linear(x, m.w.type("torch.FloatTensor")), "not a linear product"),
    "cast by .long": (OI, lambda m, x: F.linear(x.long(), m.w.long()).float(), "not a linear product"),
    "cast to float8": (OI, lambda m, x: F.linear(x, m.w.to(torch.float8_e4m3fn).float()), "not a linear product"),
    "einsum of a batch": (
        (3, 7, 5),
        lambda m, x: torch.einsum("ni,nio->no", x, m.w),
        "one matrix for each entry of 'n'",
    ),
    "einsum of the weight's sum": ((7, 5, 2), lambda m, x: torch.einsum("ni,iok->no", x, m.w), "over 'k' by itself"),
    "einsum of a diagonal": (SQ, lambda m, x: torch.einsum("ni,ii->n", x, m.w), "more than a product"),
    "bmm of a batch": ((3, 7, 5), lambda m, x: torch.bmm(x.unsqueeze(1), m.w), "one matrix for each entry of a batch"),
    "scaled by a tensor": (OI, lambda m, x: F.linear(x, m.w * m.scale[:, None]), "not a linear product"),
    "scaled and read": (OI, lambda m, x: (lambda w: F.linear(x, w) + w.sum())(m.w * 2), "not a linear product"),
    "viewed as other numbers": (IO, lambda m, x: x @ m.w.view(torch.int32).view(torch.float32), "not a linear product"),
    "dropped": (OI, lambda m, x: F.linear(x, F.dropout(m.w, 0.5, False)), "not a linear product"),
    "permuted by a computed order": (OI, lambda m, x: x @ m.w.permute(x.dim() - 1, 0), "not a linear product"),
    "its norm too": (OI, lambda m, x: F.linear(x, m.w) + m.w.norm(), "not a linear product"),
    "a penalty returned": (OI, lambda m, x: (F.linear(x, m.w), m.w.pow(2).sum())[0] + m.w.sum() * 0, "not a linear"),
    "returned": (OI, lambda m, x: (F.linear(x, m.w), m.w), "not a linear product"),
    "an embedding too": (
        IO,
        lambda m, x: x @ m.w + F.embedding(x[0, :1].long() * 0, m.w),
        "of several kinds: Embedding, Linear",
    ),
    "summed": (SQ, lambda m, x: x @ x.t() @ x + m.w[:3], "not a linear product"),
    "mv": (OI, lambda m, x: torch.mv(m.w, x[0]), "not a linear product"),
    "addmm with alpha": (IO, lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), "alpha or beta"),
    "addmm with beta": (IO, lambda m, x: torch.addmm(m.b, x, m.w, beta=0), "alpha or beta"),
    "addmm of a residual": (IO, lambda m, x: torch.addmm(x[:, :5], x, m.w), "bias is not a plain"),
    "mm into a tensor": (IO, lambda m, x: torch.mm(x, m.w, out=torch.empty(3, 5)), "not understood"),
    "a buffer as bias": (OI, lambda m, x: F.linear(x, m.w, m.scale), "bias is not a plain"),
    "a bias read elsewhere": (OI, lambda m, x: F.linear(x, m.w, m.b) * m.b, "also read by"),
    "a bias subtracted first": (OI, lambda m, x: F.linear(x, m.w, m.b) - m.b, "also read by"),
    "with a bias and without": (SQ, lambda m, x: F.linear(x, m.w) + F.linear(x, m.w, m.u), "different biases"),
    "not read": (OI, lambda m, x: x, "not read"),
    "only its shape": (OI, lambda m, x: x * m.w.shape[0], "not used in a product"),
}
VECTORS = fg.GLoRAPath(A="vector", B="lora", C="vector", D="vector", E="vector")
FULL = fg.GLoRAPath(A="lora", B="vector", C="lora", D="constant", E="vector")


def form(how, shape):
    model = Form(how, shape)
    if how is REFUSED["with a bias and without"][1]:
        model.u = nn.Parameter(torch.randn(7))
    return nn.Sequential(model)


def explicit(model, adapted):
    """The model with `W + B A alpha / rank` written into it by hand."""
    (site,), state, twin = record_of(adapted, "default").sites, fg.adapter_state(adapted), copy.deepcopy(model)
    with torch.no_grad():
        delta = state["0.w.B"] @ state["0.w.A"] * (fg.LoRA().alpha / 2)
        site.put(twin[0].w, site.linear_layout(twin[0].w) + delta)
    return twin


@pytest.mark.parametrize("name", SITES)
def test_a_form_is_adapted_as_merging_has_it(name):
    shape, how = SITES[name]
    model, x = form(how, shape), torch.randn(3, 7)
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["0.w"])))
    assert torch.equal(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["0.w"]))(x), model(x))
    out = adapted(x)
    assert not torch.allclose(out, model(x), atol=1e-4)
    torch.testing.assert_close(out, explicit(model, adapted)(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fg.merge(adapted)(x), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", [VECTORS, FULL], ids=["vectors", "full"])
@pytest.mark.parametrize("name", SITES)
def test_a_method_that_changes_the_bias_takes_the_right_one_or_none(name, path):
    shape, how = SITES[name]
    model, x = form(how, shape), torch.randn(3, 7)
    try:
        adapted = perturb(fg.rewrite(model, fg.Spec(fg.GLoRA(rank=2, path=path), ["0.w"])))
        merged = fg.merge(adapted)
    except fg.FxgraftError as error:
        assert "bias" in str(error)
        return
    torch.testing.assert_close(merged(x), adapted(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_linear_map_is_refused_with_the_reason(name):
    shape, how, reason = REFUSED[name]
    with pytest.raises(fg.TargetError, match=reason):
        fg.rewrite(form(how, shape), fg.Spec(fg.LoRA(rank=2), ["0.w"]))


def test_one_parameter_under_two_names():
    model = form(lambda m, x: F.linear(x, m.w) + F.linear(x, m.w2), OI)
    model[0].w2 = model[0].w
    with pytest.raises(fg.TargetError, match="one parameter"):
        fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["0.w"]))


def test_a_complex_weight():
    model = form(lambda m, x: F.linear(x.to(torch.complex64), m.w).real, OI)
    model[0].w = nn.Parameter(torch.randn(5, 7, dtype=torch.complex64))
    with pytest.raises(fg.TargetError, match="complex64"):
        fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["0.w"]))


def test_a_scale_that_changes_later_changes_nothing_silently():
    model, x = form(SITES["scaled by an attribute"][1], OI), torch.randn(3, 7)
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["0.w"])))
    before = adapted(x)
    with pytest.raises(fg.FxgraftError, match=r"'0\.w': the product is another one than when the adapter was made"):
        adapted[0].gain = 0.3
    assert adapted[0].gain == 0.7 and torch.equal(adapted(x), before)


def test_a_product_into_heads_is_not_taken_apart():
    model = form(SITES["einsum into heads"][1], (2, 3, 7))
    with pytest.raises(
        fg.TargetError, match=r"'0\.w' cannot be taken apart .*: what it produces is several dimensions"
    ):
        fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), [fg.Target("0.w", parts=2)]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["einsum into heads", "scaled by an attribute", "heads of a view", "negated + b"])
def test_every_method_beside_a_contraction(name, method, tmp_path):
    shape, how = SITES[name]
    model, x = form(how, shape), torch.randn(3, 7)
    try:
        adapted = perturb(graft(model, fg.Spec(METHODS[method], "0.w"))).eval()
    except fg.SpecError as error:
        assert "a bias" in str(error) and method in ("glora", "supernet")
        return
    out = adapted(x)
    assert not torch.allclose(out, model(x), atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), out, rtol=1e-5, atol=1e-5)
        with fg.disabled(adapted):
            assert torch.equal(adapted(x), model(x))
    if METHODS[method].unmergeable is None and method != "supernet":
        torch.testing.assert_close(fg.merge(adapted)(x), out, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(adapted, backend="eager", fullgraph=True)(x), out, rtol=1e-4, atol=1e-5)
    fg.save_adapter(adapted, tmp_path / "a")
    assert torch.equal(fg.load_adapter(model, tmp_path / "a").eval()(x), out)
    assert torch.equal(copy.deepcopy(adapted)(x), out)
