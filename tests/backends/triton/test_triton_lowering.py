"""The pass that puts kernels in: the printed graphs, the numbers by the kernels' definitions, and its reasons.

The graphs are captured on a CPU; `recorded_on_cuda` gives their nodes the metadata of CUDA tensors, which is all that
the pass and its gate look at.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from small_models import perturb, relative_error
from torch import nn
from torch._subclasses import FakeTensorMode

import fxgraft as fg
from fxgraft.backends.triton.kernel_gate import Form, Sizes, decide
from fxgraft.backends.triton.lower import Lower, with_kernels
from fxgraft.passes.graph import pipelines

KERNELS = {
    "lora": fg.LoRA(rank=2),
    "unilora": fg.UniLoRA(rank=2, vector_length=30, init_bound=0.5),
    "hydralora": fg.HydraLoRA(rank=2, experts=3),
    "prolora": fg.PRoLoRA(rank=4, unshared=1, a_chunks=5, b_chunks=4),
}


class Two(nn.Module):
    def __init__(self, inner: int = 12) -> None:
        super().__init__()
        self.up = nn.Linear(inner, 8)
        self.down = nn.Linear(8, 10, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(method, inner=12):
    return perturb(fg.rewrite(Two(inner).eval(), fg.Spec(method, targets=["up", "down"])), 0.3)


def captured(model, rows=5):
    return fg.capture(model, (torch.randn(rows, model.up.in_features),))


def banked(method):
    model = adapted(method)
    states = {}
    for name in "abc":
        states[name] = {key: torch.randn_like(value) for key, value in fg.adapter_state(model).items()}
    return fg.bank(model, states)


def recorded_on_cuda(program):
    """The same graph with the metadata a capture on a GPU would have given it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for node in program.graph.nodes:
            for key in ("val", "example_value"):
                if isinstance(node.meta.get(key), torch.Tensor):
                    like = node.meta[key]
                    node.meta[key] = torch.empty(tuple(like.shape), dtype=like.dtype, device="cuda")
    return program


def kernels_in(program):
    return [n for n in program.graph.nodes if "fxgraft_kernels." in str(n.target)]


def printed(program):
    lines = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            target = str(node.target) if not hasattr(node.target, "__name__") else node.target.__name__
            lines.append(f"{node.name} = {target}({', '.join(map(str, node.args))})")
    return "\n".join(lines)


GOLDEN = """\
linear = linear.default(x, up_weight, up_bias)
t = t(up_fxgraft_default_b)
lora_default = lora.default(linear, x, None, up_fxgraft_default_a, t, 8.0)
tanh = tanh.default(lora_default)
linear_1 = linear.default(tanh, down_weight)
t_1 = t(down_fxgraft_default_b)
lora_default_1 = lora.default(linear_1, tanh, None, down_fxgraft_default_a, t_1, 8.0)"""


def test_it_prints():
    program = recorded_on_cuda(captured(adapted(fg.LoRA(rank=2))))
    result = Lower(always=True, devices=("cuda",))(program)
    assert printed(result.program) == GOLDEN
    assert [str(n.target) for n in kernels_in(result.program)] == ["fxgraft_kernels.lora.default"] * 2
    assert all(n.meta["fxgraft"].made_by == "Lower" for n in kernels_in(result.program))


@pytest.mark.parametrize("method", KERNELS.values(), ids=KERNELS)
def test_the_numbers_stay(method):
    model = adapted(method)
    x = torch.randn(5, 12)
    oracle = copy.deepcopy(model).double()(x.double())
    lower = Lower(always=True, devices=("cpu",))
    for pipeline in (pipelines.inference, pipelines.training):
        program = with_kernels(pipeline, lower)(captured(model)).program
        assert len(kernels_in(program)) == 2
        assert relative_error(program.graph_module(x), oracle) < 1e-5


def test_the_shared_gradient_is_one_sum_by_index():
    model = adapted(fg.UniLoRA(rank=2, vector_length=30, init_bound=0.5)).train()
    x = torch.randn(5, 12)
    (theta,) = (p for p in model.parameters() if p.requires_grad)
    (want,) = torch.autograd.grad(model(x).square().sum(), [theta])
    program = captured(model)
    program.training = True
    result = with_kernels(pipelines.training, Lower(devices=("cpu",)))(program)
    assert " = summed_factors(" in printed(program) and " = all_factors(" not in printed(program)
    (made,) = [n for n in program.graph.nodes if getattr(n.target, "__name__", "") == "summed_factors"]
    assert made.meta["fxgraft"].made_by == "LowerShared"
    assert "no kernel: training" in " ".join(n.reason for n in result.no_matches)
    got = [p for n, p in program.graph_module.named_parameters() if n.endswith("theta")]
    program.graph_module(x).square().sum().backward()
    assert relative_error(got[0].grad, want) < 1e-5
    plain = captured(model.eval())
    left = with_kernels(pipelines.inference, Lower(devices=("cuda",)))(plain).no_matches
    assert "its kernel is for the way back, and nothing trains" in {n.reason for n in left}


@pytest.mark.parametrize("method", KERNELS.values(), ids=KERNELS)
def test_a_bank_reads_its_ids(method):
    model = banked(method)
    ids, x = fg.adapter_ids(model, ["b", None, "a", "b", "c"]), torch.randn(5, 12)
    seen = []

    def backend(gm, inputs):
        result = Lower(always=True, devices=("cpu",))(fg.Program(gm, tuple(inputs)))
        seen.append(result.program)
        return result.program.graph_module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, adapter_ids=ids), model(x, adapter_ids=ids), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled(x), model(x))
    assert [len(kernels_in(p)) for p in seen] == [2, 0]  # without ids there is nothing to do


def test_sums_into_parts_of_a_fused_weight_stay(gpt2, ids):
    """They write into a view of the whole product, which others read."""
    targets = [fg.Target("c_attn", parts=3, select=(0, 2)), "c_fc"]
    model = perturb(fg.rewrite(gpt2, fg.Spec(fg.LoRA(2), targets=targets)))
    seen = []

    def backend(gm, inputs):
        program = fg.Program(gm, tuple(inputs), training=torch.is_grad_enabled())
        result = with_kernels(pipelines.inference, Lower(always=True, devices=("cpu",)))(program)
        seen.append([n.args[0] is None for n in kernels_in(result.program)])
        return result.program.graph_module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert seen == [[True, True, False] * 2]


def test_two_adapters_add_up():
    model = perturb(fg.rewrite(adapted(fg.LoRA(rank=2)), fg.Spec(KERNELS["prolora"], targets=["up"]), name="b"), 0.3)
    fg.set_active(model, ["default", "b"])
    x = torch.randn(5, 12)
    result = with_kernels(pipelines.inference, Lower(always=True, devices=("cpu",)))(captured(model))
    assert [n.args[0] is None for n in kernels_in(result.program)] == [False] * 3
    torch.testing.assert_close(result.program.graph_module(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_reasons():
    def reasons(program, **options):
        return {n.reason for n in Lower(**{"devices": ("cuda",), **options})(program).no_matches}

    lora = adapted(fg.LoRA(rank=2))
    assert reasons(captured(lora)) == {"its input is on cpu, kernels run on cuda"}
    assert reasons(recorded_on_cuda(captured(adapted(fg.LoRAXS(rank=2))))) == {"no kernel for fxgraft.lora_xs.default"}
    double = fg.capture(copy.deepcopy(lora).double(), (torch.randn(5, 12, dtype=torch.float64),))
    (text,) = reasons(recorded_on_cuda(double))
    assert text.startswith("its input is torch.float64, kernels take torch.float32")
    (text,) = reasons(recorded_on_cuda(captured(lora)))
    assert re.fullmatch(
        r"no kernel: 5 rows, no CUDA graphs; with the base's product \d+ us by the kernel, \d+ by ATen", text
    )
    training = recorded_on_cuda(captured(lora))
    training.training = True
    assert reasons(training) == {"no kernel: training: its backward pass is products that cuBLAS does well"}
    program = recorded_on_cuda(captured(lora))
    for node in program.graph.nodes:
        if "fxgraft.lora" in str(node.target):
            node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    assert reasons(program) == {"autocast makes torch.bfloat16 of torch.float32"}


def test_always_raises_before_it_changes_anything():
    program = recorded_on_cuda(captured(adapted(fg.LoRAXS(rank=2))))
    before = str(program.graph)
    with pytest.raises(
        fg.FxgraftError, match=r"cannot run as a kernel: no kernel for fxgraft\.lora_xs.*choose kernels='auto'"
    ):
        Lower(always=True, devices=("cuda",))(program)
    assert str(program.graph) == before


def test_the_gate_takes_few_rows_in_cuda_graphs():
    program = recorded_on_cuda(captured(adapted(fg.LoRA(rank=2), inner=768), rows=2))
    result = Lower(graphed=True, devices=("cuda",))(program)
    assert result.count == 2
    assert re.search(r"2 rows, CUDA graphs; .* us by the kernel", kernels_in(result.program)[0].meta["fxgraft"].reason)


def test_the_gate_turns_once():
    """More rows never make a refused kernel pay; it pays somewhere and somewhere not."""
    from fxgraft.backends.triton.kernels.lora_kernel import forms

    answers = []
    for rows in (1, 16, 256, 4096, 65536):
        sizes = Sizes(rows, 4096, 4096, 8, 1, 2, 2)
        answers.append(bool(decide(sizes, rows, "", *forms(sizes, rows), True)))
    assert answers == sorted(answers, reverse=True) and answers[0] and not answers[-1]
    one = Sizes(1, 4096, 4096, 8, 1, 2, 2)
    assert not decide(one, 1, "", *forms(one, 1), False)  # asking for it from Python costs more than it saves
    assert decide(one, 1, "", Form(1, 0.0, 1.0), Form(1, 0.0, 1e12), False)
