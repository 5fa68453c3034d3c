"""One random life of an adapted model: operations in any order, every answer compared with the formulas in float64."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from reference import Delta, Reference, reference_model, unilora_factors
from torch import Tensor, nn
from zoo import LAYERS, WIDTH, Model, layout, models

import fxgraft as fg
from fxgraft.passes.graph.pipelines import pipeline_for
from fxgraft.rewriter.program import Program

TOLERANCE = 2e-5  # of the largest output: float32 through a dozen layers


# -- what is drawn -----------------------------------------------------------------------------------------------
def methods() -> st.SearchStrategy[Any]:
    rank, alpha = st.integers(1, 4), st.sampled_from([1, 3.5, 16])
    choices = {"A": ("lora", "vector", "constant", "none"), "C": ("lora", "vector", "none"),
               "D": ("constant", "none", "vector")}  # fmt: skip
    path = st.builds(fg.GLoRAPath, *(st.sampled_from(choices[c]) for c in "AACDD"))
    return st.one_of(
        st.builds(fg.LoRA, rank=rank, alpha=alpha, rslora=st.booleans()),
        st.builds(fg.LoRAXS, rank=st.integers(1, 3), alpha=alpha),
        st.builds(fg.LoRASB, rank=st.integers(1, 3)),
        st.builds(fg.UniLoRA, rank=rank, vector_length=st.integers(1, 30), seed=st.integers(0, 3),
                  sampler=st.sampled_from(["balanced", "uniform"])),
        st.builds(fg.PRoLoRA, rank=st.just(4), unshared=st.integers(0, 4), a_chunks=st.integers(1, 4),
                  b_chunks=st.integers(1, 4), alpha=alpha),
        st.builds(fg.HydraLoRA, rank=rank, experts=st.integers(2, 3), alpha=alpha),
        st.builds(fg.GLoRA, rank=rank, path=st.one_of(st.none(), path)),
    )  # fmt: skip


def operations() -> st.SearchStrategy[tuple[str, int, Any]]:
    kinds = st.sampled_from([*("rewrite",) * 3, *(n[3:] for n in dir(Life) if n.startswith("do_"))])
    return st.tuples(kinds, st.integers(0, 2**16), methods())


def lives() -> st.SearchStrategy[tuple[Model, list[tuple[str, int, Any]]]]:
    first = st.tuples(st.just("rewrite"), st.integers(0, 2**16), methods())
    then = st.lists(operations(), min_size=4, max_size=10)
    return st.tuples(models(), st.builds(lambda one, more: [one, *more], first, then))


# -- the life ----------------------------------------------------------------------------------------------------
class Refused(Exception):
    """fxgraft refused an operation with one of its own errors: a right outcome, and nothing may have changed."""


@dataclass
class Life:
    """An adapted model and what is known of it: the spec of every adapter, and the weights of the active ones."""

    base: Model
    model: nn.Module
    specs: dict[str, fg.Spec] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, base: Model) -> Life:
        return cls(base, base)

    # -- drawing -------------------------------------------------------------------------------------------------
    def _layers(self) -> list[str]:
        kinds = {n: type(m).__name__.lower() for n, m in self.base.layers.named_children()}
        return ["stem", *(f"layers.{n}.{leaf}" for n, kind in kinds.items() for leaf in LAYERS[kind])]

    def _spec(self, method: Any, pick: int) -> fg.Spec:
        layers = [f"{layer}.w" if layer.endswith("product") else layer for layer in self._layers()]
        chosen = [layer for i, layer in enumerate(layers) if pick >> (i % 16) & 1] or [layers[pick % len(layers)]]
        targets: Any = "all-linear" if pick % 5 == 0 else chosen
        if pick % 7 == 1 and any(layer.endswith("qkv") for layer in layers):
            targets = [fg.Target("qkv", parts=3, select=(0, 2)), *(c for c in chosen if not c.endswith("qkv"))]
        train = ["classifier"] if pick % 3 == 0 else []
        return fg.Spec(method, targets=targets, train=train)

    def _estimate(self, spec: fg.Spec) -> fg.UpdateEstimate:
        return fg.estimate_update(
            self.base, [inputs()], targets=spec.targets, loss=lambda output, batch: output.square().mean(),
            samples=3, lr=1e-2, total_steps=10, progress=False,
        )  # fmt: skip

    # -- operations ----------------------------------------------------------------------------------------------
    def do_rewrite(self, pick: int, method: Any) -> None:
        name = next((n for n in "abc" if n not in self.specs), "a")  # a fourth is refused: the name is taken
        spec = self._spec(method, pick)
        update = self._estimate(spec) if isinstance(method, fg.LoRASB) else None
        self.model = self.randomised(fg.rewrite(self.model, spec, name=name, update=update), name, pick)
        self.specs[name], self.active = spec, {name: 1.0}

    def do_set_active(self, pick: int, method: Any) -> None:
        names = [n for i, n in enumerate(sorted(self.specs)) if pick >> i & 1]
        if pick % 2:
            names.reverse()
        weights = dict(zip(names, (0.7, -0.2, 1.0), strict=False)) if pick % 5 == 1 else dict.fromkeys(names, 1.0)
        fg.set_active(self.model, weights if pick % 5 == 1 else names)
        self.active = weights

    def do_disabled(self, pick: int, method: Any) -> None:
        before = fg.active(self.model)
        with fg.disabled(self.model):
            # torch takes other kernels, with other bits, where weights require grad: the base's do and ours do not
            frozen = copy.deepcopy(self.base).requires_grad_(False)
            assert torch.equal(self.model(inputs()), frozen(inputs())), "disabled is not the base, bit for bit"
        assert fg.active(self.model) == before

    def do_swap(self, pick: int, method: Any) -> None:
        name = self._one(pick)
        self.randomised(self.model, name, pick)

    def do_save_and_load(self, pick: int, method: Any) -> None:
        name = self._one(pick)
        with tempfile.TemporaryDirectory() as folder:
            fg.save_adapter(self.model, folder, name, format="peft" if pick % 4 == 0 else "fxgraft")
            loaded = fg.load_adapter(self.base, folder, name)
        alone = Life(self.base, loaded, {name: self.specs[name]}, {name: 1.0})
        alone.check("loaded")

    def do_merge(self, pick: int, method: Any) -> None:
        plain = fg.merge(self.model)
        assert not any("fxgraft" in key for key in plain.state_dict()), "merging leaves nothing of fxgraft"
        assert type(plain) is type(self.base)
        extra = set(plain.state_dict()) - set(self.base.state_dict())
        assert all(key.endswith(("bias", ".b")) for key in extra), f"merging brought {extra}"
        compare(plain(inputs()), self.expected(), "merged")

    def do_remove(self, pick: int, method: Any) -> None:
        name = self._one(pick)
        fg.remove(self.model, name)
        del self.specs[name]
        self.active.pop(name, None)

    def do_deepcopy(self, pick: int, method: Any) -> None:
        old, self.model = self.model, copy.deepcopy(self.model)
        if self.specs:
            name = self._one(pick)
            kept = {k: v.clone() for k, v in fg.adapter_state(old, name).items()}
            self.randomised(self.model, name, pick)
            assert all(torch.equal(v, kept[k]) for k, v in fg.adapter_state(old, name).items()), "the copy shares"

    def do_pickle(self, pick: int, method: Any) -> None:
        self.model = pickle.loads(pickle.dumps(self.model))

    def do_state_dict(self, pick: int, method: Any) -> None:
        state = self.model.state_dict()
        assert set(self.base.state_dict()) <= set(state), "a base key is gone"
        for name in self.specs:
            self.randomised(self.model, name, pick)
        self.model.load_state_dict(state)

    def do_to_lora(self, pick: int, method: Any) -> None:
        name = self._one(pick)
        lora = fg.to_lora(self.model, name)
        compare(lora(inputs()), Life(self.base, lora, self.specs, {name: 1.0}).expected(of=self.model), "to_lora")

    def do_train(self, pick: int, method: Any) -> None:
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if not self.active:
            raise Refused
        assert all(".fxgraft." in f".{n}" or "fxgraft_shared" in n for n in trained), "a base weight trains"
        self.model.zero_grad()
        self.model(inputs()).square().mean().backward()
        dead = [n for n, p in trained.items() if p.grad is None]
        assert not dead, f"no gradient reaches {dead}"
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        torch.optim.SGD(trained.values(), lr=1e-2).step()

    def do_training_mode(self, pick: int, method: Any) -> None:
        if any(isinstance(self.specs[n].method, fg.GLoRA) and self.specs[n].method.path is None for n in self.active):
            raise Refused  # a supernet draws a path at every forward there
        want = self.expected()  # may be refused: before the mode changes, which the next operations would find
        self.model.train()
        compare(self.model(inputs()), want, "in training mode")
        self.model.eval()

    def do_capture(self, pick: int, method: Any) -> None:
        pipeline = getattr(fg.passes.pipelines, ("inference", "packaged", "frozen")[pick % 3])
        with torch.no_grad():
            program = fg.capture(self.model, (inputs(),))
            compare(pipeline(program).program.graph_module(inputs()), self.expected(), f"after {pipeline.name}")

    def do_compile(self, pick: int, method: Any) -> None:
        """Through Dynamo and the passes; the lowering behind them is eager."""
        torch._dynamo.reset()
        compiled = torch.compile(self.model, backend=passes_alone)
        if pick % 2:
            with torch.no_grad():
                compare(compiled(inputs()), self.expected(), "compiled")
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            raise Refused
        grads = [torch.autograd.grad(m(inputs()).square().mean(), trained) for m in (self.model, compiled)]
        for eager, other in zip(*grads, strict=True):
            compare(other, eager.double(), "compiled gradients")

    def do_combine(self, pick: int, method: Any) -> None:
        names = sorted(self.specs)
        weights = [(1.0, -0.5, 2.0)[(pick + i) % 3] for i in range(len(names))]
        mixed = dict(zip(names, weights, strict=True))
        combined = fg.combine(self.model, mixed, name="mix")
        want = Life(self.base, self.model, self.specs, mixed).expected()
        compare(combined(inputs()), want, "combined")

    def do_bank(self, pick: int, method: Any) -> None:
        banked = fg.bank(self.model)
        names = [*sorted(self.specs), None]
        rows = [names[(pick >> i) % len(names)] for i in range(len(inputs()))]
        got = banked(inputs(), adapter_ids=fg.adapter_ids(banked, rows))
        for row, name in enumerate(rows):
            one = replace(self, active={} if name is None else {name: 1.0})
            compare(got[row], one.expected()[row], f"bank row {row} ({name})")

    def do_explain(self, pick: int, method: Any) -> None:
        if not self.specs:
            raise Refused
        assert fg.explain(self.model).trainable == sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        assert str(fg.explain(self.model))

    # -- checking ------------------------------------------------------------------------------------------------
    def _one(self, pick: int) -> str:
        if not self.specs:
            raise Refused
        return sorted(self.specs)[pick % len(self.specs)]

    @staticmethod
    def randomised(model: nn.Module, name: str, seed: int) -> nn.Module:
        g = torch.Generator().manual_seed(seed)
        state = fg.adapter_state(model, name)
        frozen = {n for n, b in model.named_buffers()}
        for key, value in state.items():
            if value.is_floating_point() and not any(f.endswith(key.rpartition(".")[2]) for f in frozen):
                state[key] = torch.randn(value.shape, generator=g) * 0.3
        fg.swap(model, state, name)
        return model

    def expected(self, of: nn.Module | None = None) -> Tensor:
        layers: dict[str, list[Delta]] = defaultdict(list)
        trained: dict[str, dict[str, Tensor]] = {}
        for name, weight in self.active.items():
            state = {k: v.double() for k, v in fg.adapter_state(self.model if of is None else of, name).items()}
            spec, sites = self.specs[name], defaultdict(dict)
            for key, value in state.items():
                site, _, tensor = key.rpartition(".")
                if site.startswith("classifier"):
                    trained.setdefault("classifier", {})[tensor] = value
                elif site:
                    sites[site][tensor] = value
            if isinstance(spec.method, fg.UniLoRA):
                order = [row.site for row in fg.explain(self.model if of is None else of).rows
                         if row.adapter == name and row.kind == "site"]  # fmt: skip
                # the projection follows the order of the model's modules, which explain() keeps
                order.sort(key=self._position)
                shapes = [self._shape(site)[:2] for site in order]
                factors = unilora_factors(spec.method, state["theta"], shapes)
                sites = dict(zip(order, factors, strict=True))
            for site, tensors in sites.items():
                path, offset, length = self._where(site)
                layers[path].append(Delta(spec.method, tensors, offset, length, weight))
        if not all(w == 1 for w in self.active.values()) and trained:
            raise Refused  # weights and trained heads: not this campaign's
        return reference_model(self.base, layers, trained, layout)(inputs().double())

    def _position(self, site: str) -> tuple[int, int]:
        path, offset, _ = self._where(site)
        return [n for n, _ in self.base.named_modules()].index(path), offset

    def _shape(self, site: str) -> tuple[int, int]:
        path, _, length = self._where(site)
        return layout(self.base.get_submodule(path))[0].shape[1], length

    def _where(self, site: str) -> tuple[str, int, int]:
        """The layer of a site, and which of its outputs are the site's."""
        path, _, part = site.partition("[")
        if path.endswith(".w"):
            path = path[:-2]
        whole = layout(self.base.get_submodule(path))[0].shape[0]
        return (path, int(part[:-1]) * WIDTH, WIDTH) if part else (path, 0, whole)

    def check(self, what: str) -> None:
        compare(self.model(inputs()), self.expected(), what)


def passes_alone(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
    program = Program(gm, tuple(example_inputs), training=torch.is_grad_enabled())
    return pipeline_for(program)(program).program.graph_module.forward


def inputs() -> Tensor:
    """`(3, 3, 5)`: as many samples as positions, so that an axis taken for another is no error of shapes."""
    return torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(11))


def compare(got: Tensor, want: Tensor, what: str) -> None:
    scale = max(float(want.abs().max()), 1e-3)
    error = float((got.double() - want).abs().max()) / scale
    assert error < TOLERANCE, f"{what}: {error:.1e} of the largest output"


def live(base: Model, drawn: list[tuple[str, int, Any]], count: Callable[[str], None]) -> None:
    """Run one life; an assertion says what was wrong. Any exception but fxgraft's own is a failure too."""
    before = {k: v.clone() for k, v in base.state_dict().items() if "calls" not in k}
    life = Life.of(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, pick, method in drawn:
            if not life.specs and kind != "rewrite":
                continue
            life.done.append(f"{kind}({pick}, {method})")
            snapshot = replace(life, specs=dict(life.specs), active=dict(life.active))
            try:
                getattr(life, f"do_{kind}")(pick, method)
                count(kind)
            except fg.FxgraftError as error:
                assert str(error), "an error without a word"
                count(f"{kind} refused: {str(error)[:60]}")
                life = replace(snapshot, done=life.done)
            except Refused:
                count(f"{kind} not applicable")
                life = replace(snapshot, done=life.done)
            if life.specs:
                try:
                    life.check(f"after {kind}")
                except Refused:
                    count("unchecked")
            compare(base(inputs()), copy.deepcopy(base).double()(inputs().double()), "the base")
            now = base.state_dict()
            assert all(torch.equal(now[k], v) for k, v in before.items()), f"{kind} changed the base model"


__all__ = ["Reference", "live", "lives"]
