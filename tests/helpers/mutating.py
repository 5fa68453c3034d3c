"""Programs that write: what a forward may do beside returning a value, each around two adapted linears on one input.

Every program is a function `(model, x) -> output` of a `Writes`; the model's buffers count as output too.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxgraft.backends.compile.gather_apart import GatherApart
from fxgraft.backends.triton.lower import Lower
from fxgraft.backends.triton.lower_shared import LowerShared
from fxgraft.passes.graph.accumulate import Accumulate
from fxgraft.passes.graph.choose import Choose
from fxgraft.passes.graph.cleanup import Cleanup
from fxgraft.passes.graph.pipelines import inference, packaged, training
from fxgraft.passes.graph.share import Share
from fxgraft.passes.graph.siblings import Siblings
from fxgraft.rewriter.program import Pipeline, Program

WIDTH = 8


class Writes(nn.Module):
    def __init__(self, program) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(6, WIDTH))
        self.program = program

    def forward(self, x):
        return self.program(self, x)


PROGRAMS = {}
INFERENCE_ONLY = set()  # autograd itself refuses these writes


def program(function):
    PROGRAMS[function.__name__] = function
    return function


def inference_only(function):
    INFERENCE_ONLY.add(function.__name__)
    return program(function)


@program
def scatter(m, x):
    y = m.q(x) + m.k(x)
    mask = torch.zeros_like(y)
    mask.scatter_(1, y.topk(2, dim=1).indices, 1.0)
    return y * mask


@program
def fill(m, x):
    y = m.q(x) * m.k(x)
    y[:, 1].fill_(3.0)
    return y


@program
def copy_into_a_cache(m, x):
    m.cache[:4].copy_(m.q(x))
    return m.k(x) + m.cache.sum()


@program
def index_copy(m, x):
    m.cache.index_copy_(0, torch.tensor([1, 3, 0, 2]), m.k(x))
    return m.q(x) @ m.cache.t()


@program
def masked_fill(m, x):
    y = m.q(x) + m.k(x)
    y.masked_fill_(y > 0.2, -1.0)
    return y


@program
def clamp(m, x):
    y = m.q(x)
    y.clamp_(-0.1, 0.1)
    return y + m.k(x)


@program
def index_add(m, x):
    y = m.q(x) * 1
    y.index_add_(0, torch.tensor([0, 0, 2, 1]), m.k(x))
    return y


@program
def index_put(m, x):
    y = m.q(x) * 1
    y[torch.tensor([0, 2]), torch.tensor([1, 1])] = m.k(x)[0, 0]
    return y


@program
def into_a_given_tensor(m, x):
    y = m.q(x).detach()
    out = torch.empty_like(y)
    torch.mul(y, 2.0, out=out)
    torch.cumsum(out, 1, out=y)
    return m.k(x) + out + y


@program
def a_view(m, x):
    h = m.q(x)
    v = h[:, :2]
    v += 100.0
    return h + m.k(x)


@program
def a_view_of_a_view(m, x):
    h = m.q(x) + m.k(x)
    h.t()[:3].unflatten(1, (2, 2))[:, 1].mul_(-2.0)
    return h


@program
def set_item(m, x):
    h = m.q(x) + m.k(x)
    h[1:3, 2] = 7.0
    return h


@program
def the_product_itself(m, x):
    y, z = m.q(x), m.k(x)
    y *= 0.5
    z += y
    return y, z


@program
def another_reader_of_what_is_added_to(m, x):
    y = m.q(x) * 2
    before = y.view(-1)
    y += m.k(x)
    return before * 3, y


@program
def activation_in_place(m, x):
    return F.relu(m.q(x), inplace=True) + F.hardtanh(m.k(x), inplace=True)


@inference_only
def the_input_in_between(m, x):
    x = x * 1
    q = m.q(x)
    x.add_(1.0)
    return q + m.k(x)


@inference_only
def a_view_of_the_input_in_between(m, x):
    x = x * 1
    part = x[:, 3:]
    q = m.q(x)
    part.mul_(-1.0)
    return q, m.k(x)


@inference_only
def the_input_of_one_product_in_its_sum(m, x):
    x = x * 1
    y = m.k(x) * 1
    y += x.zero_() + m.q(x)
    return y


@inference_only
def the_callers_tensor(m, x):
    q = m.q(x)
    x.add_(1.0)
    return q + m.k(x)


@program
def a_weight_in_between(m, x):
    q = m.q(x)
    with torch.no_grad():
        m.k.weight.mul_(1.5)
    return q + m.k(x)


@program
def a_weight_through_its_data(m, x):
    m.q.weight.data[0].mul_(0.5)
    return m.q(x) + m.k(x)


@program
def a_counter(m, x):
    m.calls.add_(1)
    return m.q(x) + m.k(x)


@program
def a_counter_that_counts(m, x):
    m.calls += 1
    return m.q(x) * m.calls + m.k(x)


@program
def a_reassigned_buffer(m, x):
    m.calls = m.calls + m.q(x).detach().mean()
    return m.k(x) * m.calls


@program
def batch_norm(m, x):
    return m.norm(m.q(x)) + m.k(x)


@program
def batch_norm_in_training(m, x):
    y = F.batch_norm(m.q(x), m.cache[0], m.cache[1], training=True)
    return y + m.k(x)


@program
def vmapped(m, x):
    return torch.vmap(lambda row: m.q(row) * m.k(row).sum())(x)


@program
def random_state(m, x):
    torch.rand(3)
    return m.q(x) + m.k(x) * torch.rand(WIDTH)


@inference_only
def items_of_a_list(m, x):
    rows = list((m.q(x) * 1).unsqueeze(0).unbind(0))
    rows[0].add_(m.k(x))
    both = [rows[0] * 2, rows[0]]
    both[0][:, 0] -= 1.0
    return both[0] + both[1]


@program
def many_at_once(m, x):
    parts = [m.q(x) * 1, m.k(x) * 1]
    torch._foreach_add_(parts, 1.0)
    return parts[0] * parts[1]


@inference_only
def pieces_of_one_tensor(m, x):
    h = m.q(x) * 1
    left, right = h.split(WIDTH // 2, -1)
    left.mul_(3.0)
    right.sub_(left)
    return h + m.k(x)


@program
def behind_a_dropout_that_does_nothing(m, x):
    h = m.q(x)
    F.dropout(h, 0.3, training=False).add_(1.0)
    return h + m.k(x)


@program
def a_detached_twin(m, x):
    h = m.q(x)
    h.detach().add_(1.0)
    return h + m.k(x)


@program
def checks(m, x):
    torch._assert_async((x.abs() < 1e6).all())
    torch._check(x.shape[0] > 1)
    return m.q(x) + m.k(x)


@program
def gradients_off_in_between(m, x):
    with torch.no_grad():
        q = m.q(x)
    return q + m.k(x)


@program
def autocast_in_between(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        q = m.q(x)
    return q.float() + m.k(x)


@program
def checkpointed(m, x):
    return checkpoint(lambda a: m.q(a) * m.k(a), x, use_reentrant=False)


@program
def grows_by_itself(m, x):
    for _ in range(2):
        x = m.q(x) + m.k(x)
        x.tanh_()
    return x


@program
def a_product_read_by_a_cache(m, x):
    k = m.k(x)
    m.cache[2:] = k.detach()
    k.mul_(2.0)
    return m.q(x) + k + m.cache[2:]


PIPELINES = {
    "inference": inference,
    "packaged": packaged,
    "training": training,
    "joined": Pipeline("joined", (Share(), Siblings(always=True), Accumulate(always=True), GatherApart(), Cleanup())),
    "accumulated": Pipeline("accumulated", (Cleanup(), Accumulate(always=True), Cleanup())),
    "chosen": Pipeline("chosen", (Cleanup(), Share(), Choose(always=True), Siblings(always=True), Cleanup())),
    "kernels": Pipeline("kernels", (Lower(always=False, devices=("cpu",)), Share(), LowerShared(("cpu",)), Cleanup())),
}


def twins(arguments):
    """Copies that lie in each other's memory where the originals do."""
    with torch.no_grad():
        return copy.deepcopy([a.detach() if isinstance(a, torch.Tensor) else a for a in arguments])


class Compared:
    """A `torch.compile` backend: every pipeline's graph against the graph it was made of, on the inputs of each call.

    Outputs, what was written into the inputs (buffers are inputs) and gradients must agree.
    """

    def __init__(self, pipelines=None, tolerance: float = 1e-4) -> None:
        self.pipelines, self.tolerance = PIPELINES if pipelines is None else pipelines, tolerance
        self.graphs, self.rewritten, self.compared = 0, 0, 0

    def __call__(self, gm, inputs):
        made = {}
        for name, pipeline in self.pipelines.items():
            given = Program(copy.deepcopy(gm), tuple(inputs), training=torch.is_grad_enabled())
            result = pipeline(given)
            made[name] = result.program.graph_module
            self.rewritten += result.count
        self.graphs += 1

        def run(*arguments):
            state = torch.get_rng_state()
            before = twins(arguments)
            want = self._run(gm, arguments, before, state)
            for name, graph in made.items():
                got = self._run(graph, arguments, before, state)
                for one, other in zip(got, want, strict=True):
                    if one is None or other is None:  # no gradient, or one of zeros
                        assert one is other or not (other if one is None else one).any(), name
                        continue
                    torch.testing.assert_close(
                        one, other, rtol=self.tolerance, atol=self.tolerance, msg=lambda m, n=name: f"{n}: {m}"
                    )
                    self.compared += 1
            torch.set_rng_state(state)
            return gm(*arguments)

        return run

    def _run(self, graph, arguments, before, state):
        torch.set_rng_state(state)
        own = twins(before)
        for mine, given in zip(own, arguments, strict=True):
            if isinstance(given, torch.Tensor) and given.requires_grad:
                mine.requires_grad_()
        outputs = [o for o in graph(*own) if isinstance(o, torch.Tensor)]
        floating = [o for o in outputs if o.requires_grad]
        leaves = [t for t in own if isinstance(t, torch.Tensor) and t.requires_grad]
        if floating and leaves:
            loss = sum(o.float().square().sum() for o in floating)
            grads = list(torch.autograd.grad(loss, leaves, allow_unused=True))
        else:
            grads = []
        written = [t for t in own if isinstance(t, torch.Tensor)]
        return [t if t is None else t.detach() for t in (*outputs, *written, *grads)]
