"""What a row of the matrix does with its model: every verb, every method, PEFT in both directions."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxgraft as fg

from .architecture import BATCH, Architecture
from .cells import Cell, NotHere, TheirLimit, Wrong, cell_of, said

CLOSE = 2e-4  # of the largest value of an output; sums in another order, and deep models

METHODS: dict[str, fg.Method] = {
    "LoRA": fg.LoRA(rank=2),
    "Uni-LoRA": fg.UniLoRA(rank=2, vector_length=64),
    "VeRA": fg.VeRA(rank=4),
    "LoRA-XS": fg.LoRAXS(rank=2),
    "LoRA-SB": fg.LoRASB(rank=2),
    "PRoLoRA": fg.PRoLoRA(rank=2, unshared=1, a_chunks=1, b_chunks=1),
    "HydraLoRA": fg.HydraLoRA(rank=2, experts=2),
    "GLoRA": fg.GLoRA(rank=2, path=fg.GLoRAPath(A="lora", B="lora", C="none", D="none", E="none")),
}
"""The GLoRA path leaves biases alone: not every product has one to change."""


def _numbers(output: Any) -> list[Tensor]:
    """Every floating tensor of an output, except caches that grow."""
    if isinstance(output, dict):
        output = {key: value for key, value in output.items() if "past_key_values" not in key and "cache" not in key}
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _rows(output: Any) -> list[Tensor]:
    """Those whose rows are a sample's: not the scores of every text against every image."""
    if isinstance(output, dict):
        output = {key: value for key, value in output.items() if not key.startswith("logits_per_")}
    return _numbers(output)


def _agree(got: Any, want: Any, what: str, close: float = CLOSE) -> None:
    pairs = list(zip(_numbers(got), _numbers(want), strict=True))
    if not pairs:
        raise Wrong(f"{what}: no numbers to compare")
    for one, other in pairs:
        off = float((one - other).abs().max() / (other.abs().max() + 1e-6)) if other.numel() else 0.0
        if not off <= close:
            raise Wrong(f"{what} is off by {off:.1e} of the largest value")


def _their_own(unmerged: Any, merged: Any) -> None:
    """Where PEFT's layers are passed over (a parent reads the weight), its model is another than its merged one."""
    try:
        _agree(unmerged, merged, "before its merge")
    except Wrong as error:
        raise TheirLimit(f"PEFT's own model is another after its merge: {error}") from error


def _filled(adapted: nn.Module, seed: int = 3) -> nn.Module:
    """The same model with adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "fxgraft" in name and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


class Row:
    """One architecture on its way through all verbs."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.model, self.inputs = architecture.made()
        # frozen as the adapted model's weights are: torch gives some models other bits where weights require grad
        self.base = self.run(copy.deepcopy(self.model).requires_grad_(False))

    def run(self, model: nn.Module) -> Any:
        torch.manual_seed(5)
        with torch.no_grad():
            return model(**copy.deepcopy(self.inputs))

    def rewritten(self, method: fg.Method, seed: int = 3) -> nn.Module:
        spec = fg.Spec(method, targets=["all-linear"])
        update = None
        if isinstance(method, fg.LoRASB):
            try:
                update = fg.estimate_update(
                    self.model, [self.inputs], targets=["all-linear"], loss=lambda output, batch: self.loss(output),
                    samples=BATCH, lr=1e-3, warmup_ratio=0.1, total_steps=10, progress=False,
                )  # fmt: skip
            except RuntimeError as error:
                self._unless_base(self._train_base, "training", error)
        return _filled(fg.rewrite(self.model, spec, update=update).eval(), seed)

    @staticmethod
    def loss(output: Any) -> Tensor:
        return torch.stack([value.float().square().mean() for value in _numbers(output)]).sum()

    # -- verbs ---------------------------------------------------------------------------------------------------------
    def rewrite(self) -> str:
        fresh = fg.rewrite(self.model, fg.Spec(fg.LoRA(rank=2), targets=["all-linear"])).eval()
        _agree(self.run(fresh), self.base, "a fresh adapter", 1e-6)
        self.adapted = _filled(copy.deepcopy(fresh))
        self.output = self.run(self.adapted)
        with fg.disabled(self.adapted):
            for got, want in zip(_numbers(self.run(self.adapted)), _numbers(self.base), strict=True):
                if not torch.equal(got, want):
                    raise Wrong("inside disabled it is not the base bit for bit")
        self.sites = {row.site for row in fg.explain(self.adapted).rows if row.kind == "site"}
        self.left = fg.explain(self.adapted).left.get("default", {})
        parameters = dict(self.model.named_parameters())
        names = {name.partition("[")[0] for name in self.sites}
        reached = {n: p for n, p in parameters.items() if n in names or n.removesuffix(".weight") in names}
        share = sum(p.numel() for p in reached.values()) / sum(p.numel() for p in parameters.values())
        return f"{len(self.sites)} sites, {share:.0%} of the parameters"

    def trains(self) -> str:
        model = _filled(fg.rewrite(self.model, fg.Spec(fg.LoRA(rank=2), targets=["all-linear"])))
        torch.manual_seed(5)
        try:
            self.loss(model(**copy.deepcopy(self.inputs))).backward()
        except RuntimeError as error:
            self._unless_base(self._train_base, "training", error)
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            return f"{len(without)} tensors took no part, such as {without[0]}"
        return ""

    def merge(self) -> str:
        merged = fg.merge(self.adapted)
        _agree(self.run(merged), self.output, "the merged model")
        return ""

    def files(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            fg.save_adapter(self.adapted, folder)
            _agree(self.run(fg.load_adapter(self.model, folder).eval()), self.output, "the loaded adapter", 0.0)
        return ""

    def switch(self) -> str:
        two = _filled(fg.rewrite(self.adapted, fg.Spec(fg.LoRA(rank=1), targets=["all-linear"]), name="b").eval(), 7)
        fg.set_active(two, ["default"])
        _agree(self.run(two), self.output, "the first of two", 1e-6)
        fg.set_active(two, {"default": 0.5, "b": -1.0})
        _agree(self.run(fg.merge(two, weights={"default": 0.5, "b": -1.0})), self.run(two), "two under weights")
        return ""

    def method(self, method: fg.Method) -> str:
        adapted = self.rewritten(method)
        if isinstance(method, fg.HydraLoRA):  # its router makes it no weight
            with tempfile.TemporaryDirectory() as folder:
                fg.save_adapter(adapted, folder)
                again = fg.load_adapter(self.model, folder).eval()
            _agree(self.run(again), self.run(adapted), "the loaded adapter", 0.0)
        else:
            _agree(self.run(fg.merge(adapted)), self.run(adapted), "the merged model", 5e-4)
        return ""

    def _peft(self) -> Any:
        peft = _imported("peft")
        try:
            return peft.get_peft_model(copy.deepcopy(self.model), peft.LoraConfig(r=2, target_modules="all-linear"))
        except Exception as error:
            raise TheirLimit(f"PEFT: {said(error)}") from error

    def as_many_as_peft(self) -> str:
        theirs = {
            name.removeprefix("base_model.model.").rpartition(".lora_A")[0].removesuffix(".base_layer")
            for name, _ in self._peft().named_parameters()
            if ".lora_A" in name
        }
        ours = {name.partition("[")[0] for name in self.sites}
        # heads and routers are left out by what they are; what cannot be adapted is missing
        left = {n for n, why in self.left.items() if "head" in why or "router" in why}
        missing = sorted(name for name in theirs - left if not any(_same(name, one) for one in ours))
        if missing:
            raise Wrong(f"PEFT's all-linear takes {len(missing)} more, such as {missing[0]}")
        return f"{len(ours)}, PEFT {len(theirs)}"

    def from_peft(self) -> str:
        theirs = self._peft().eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        with tempfile.TemporaryDirectory() as folder:
            try:
                want = self.run(theirs.base_model.model)
                theirs.save_pretrained(folder)
                merged = self.run(theirs.merge_and_unload())
            except Exception as error:
                raise TheirLimit(f"PEFT: {said(error)}") from error
            got = self.run(fg.load_adapter(self.model, folder).eval())
        _their_own(want, merged)
        _agree(got, want, "PEFT's folder")
        return ""

    def to_peft(self) -> str:
        peft = _imported("peft")
        with tempfile.TemporaryDirectory() as folder:
            fg.save_adapter(self.adapted, folder, format="peft")
            try:
                theirs = peft.PeftModel.from_pretrained(copy.deepcopy(self.model), folder).eval()
                got = self.run(theirs.base_model.model)
                merged = self.run(theirs.merge_and_unload())
            except Exception as error:
                raise TheirLimit(f"PEFT: {said(error)}") from error
        _their_own(got, merged)
        _agree(got, self.output, "the folder in PEFT")
        return ""

    def compile(self) -> str:
        try:
            _agree(self.run(fg.compile(self.adapted)), self.output, "compiled", 5e-4)
        except Exception as error:
            torch._dynamo.reset()
            self._unless_base(lambda: self.run(torch.compile(self.model)), "torch.compile", error)
        finally:
            torch._dynamo.reset()
        return ""

    def bank(self) -> str:
        other = self.rewritten(fg.LoRA(rank=2), 11)
        banked = fg.bank(self.adapted, {"a": self.adapted, "b": other}, example_inputs=self.inputs)
        ids = fg.adapter_ids(banked, ["a", "b"])
        torch.manual_seed(5)
        with torch.no_grad():
            mixed = banked(**copy.deepcopy(self.inputs), adapter_ids=ids)
        for row, want in ((0, self.output), (1, self.run(other))):
            for got, right in zip(_rows(mixed), _rows(want), strict=True):
                if right.dim() and right.shape[0] == BATCH:
                    _agree(got[row], right[row], f"row {row} of a mixed batch")
        return ""

    def onnx(self, adapters: str) -> str:
        model: Any = self.adapted
        if adapters == "bank":
            other = self.rewritten(fg.LoRA(rank=2), 11)
            model = fg.bank(self.adapted, {"a": self.adapted, "b": other}, example_inputs=self.inputs)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.onnx"
            try:
                fg.export_onnx(model, path, self.inputs, adapters=adapters)
            except Exception as error:
                given = copy.deepcopy(self.inputs)
                self._unless_base(
                    lambda: torch.onnx.export(self.model, kwargs=given, f=str(path), dynamo=True, verbose=False),
                    "torch.onnx", error,
                )  # fmt: skip
        return ""

    def cache(self) -> str:
        if not self.architecture.decodes:
            raise NotHere
        with tempfile.TemporaryDirectory() as folder:
            fg.export_onnx(self.adapted, Path(folder) / "m.onnx", self.inputs, adapters="swappable", cache=True)
        return ""

    def _train_base(self) -> None:
        self.loss(copy.deepcopy(self.model)(**copy.deepcopy(self.inputs))).backward()

    def _unless_base(self, same: Callable[[], Any], what: str, error: Exception) -> None:
        """Raise the error again, as the base's where the same thing fails without an adapter."""
        try:
            same()
        except Exception as theirs:
            raise TheirLimit(f"{what} of the base: {said(theirs)}") from error
        raise error

    def columns(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "rewrite", self.rewrite
        yield "trains", self.trains
        yield "merge", self.merge
        yield "save, load", self.files
        yield "two adapters", self.switch
        for name, method in METHODS.items():
            yield name, lambda method=method: self.method(method)  # type: ignore[misc]
        yield "as PEFT's all-linear", self.as_many_as_peft
        yield "from PEFT", self.from_peft
        yield "to PEFT", self.to_peft
        yield "bank", self.bank
        yield "compile", self.compile
        for mode in ("merged", "swappable", "bank"):
            yield f"ONNX {mode}", lambda mode=mode: self.onnx(mode)  # type: ignore[misc]
        yield "ONNX with cache", self.cache

    def cells(self, without: Collection[str] = ()) -> Iterator[Cell]:
        """The cells in order, but those of some columns; where the first fails there is nothing to go on with."""
        for column, verb in self.columns():
            if column not in without:
                yield cell_of(column, verb)
            if not hasattr(self, "sites"):
                return


def _same(theirs: str, ours: str) -> bool:
    """PEFT names the module, we the weight."""
    return ours == theirs or ours.startswith(f"{theirs}.")


def _imported(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise NotHere from error
