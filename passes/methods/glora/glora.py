"""GLoRA: five support tensors and a searched path (Chavan et al., arXiv 2306.07967, section 3).

`W = W0 + W0 * A + B`, `b = b0 + b0 * D + E + W0 C`, `y = x W^T + b`, the first product elementwise. A and B are
`Xd Xu`, one column `Xd[:, 0]`, one number `Xd[0, 0]` or nothing; C is `Cd Cu`, its first column or nothing; D and E
are a vector, its element 0 or nothing: 432 paths per site, all drawn from the same tensors (the supernet).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ....rewriter.config_checks import check_positive_int, check_rank, lower_rank
from ....rewriter.emitter import Emitter
from ....rewriter.errors import MergeError, SpecError
from ....rewriter.method import Decl, Declaration, InitContext, Method, Tensors
from ....rewriter.sites import Site
from .glora_operators import glora, glora_supernet, glora_weight
from .path import COLUMNS, PATHS, GLoRAPath, draw_mask, path_from_dict

TENSORS = ("Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E")


@dataclass(frozen=True)
class GLoRA(Method, key="glora"):
    """GLoRA (arXiv 2306.07967).

    Args:
        rank: `r` of A, B and C, of use up to `min(in, out)` of a site.
        path: what each support tensor is (a `GLoRAPath`, or its dict from JSON). None is the supernet: in training
            every site draws one of the 432 paths at every forward, in eval it takes the path `set_paths` gave it,
            at first the maximal one, all low-rank and vectors.

    Tensors per site: `Ad, Bd (out, r)`, `Au, Bu (r, in)`, `Cd (in, r)`, `Cu (r, 1)`, `D, E (out,)`, all trained; with a
    path only what it uses: `Xd (out, 1)`, C's `(in, 1)`, for `vector`, one number for `constant`. D is left out where
    the base has no bias. Xd, D and E start at zero, Xu xavier-uniform: a no-op on every path.
    Supernet, derived: `path (1,)` int64 per site and one `table (432, 12)` of choice masks.

    The supernet costs what a low-rank A costs at every forward, whatever is drawn: a full weight-gradient product.

    Raises:
        SpecError: a value outside its range, or a base weight that is not floating.
    """

    not_low_rank: ClassVar[str | None] = (
        "GLoRA rescales the base weight elementwise (W0 * A has any rank) and changes the bias; use merge instead"
    )
    weighs: ClassVar[bool] = True
    drawn: ClassVar[bool] = False  # a table of all paths, and the one that `set_paths` chose last

    rank: int = 4
    path: GLoRAPath | None = None

    def __post_init__(self) -> None:
        check_positive_int(self, rank=self.rank)
        if isinstance(self.path, Mapping):
            object.__setattr__(self, "path", path_from_dict(self.path))
        if self.path is not None and not isinstance(self.path, GLoRAPath):
            raise SpecError(f"GLoRA(path={self.path!r}): give a GLoRAPath, or None for the supernet")

    def meaning(self) -> dict[str, Any]:
        low_rank = self.path is None or "lora" in (self.path.A, self.path.B, self.path.C)
        return super().meaning() | ({} if low_rank else {"rank": None})

    def _shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        path = self.path or PATHS[0]
        return path.shapes(site.in_features, site.out_features, self.rank, site.bias is not None)

    def fitted(self, out_features: int, in_features: int) -> GLoRA:
        low_rank = self.path is None or "lora" in (self.path.A, self.path.B, self.path.C)
        return lower_rank(self, out_features, in_features) if low_rank else self

    def adds_bias(self, site: Site) -> str | None:
        biased = not {"Cd", "D", "E"}.isdisjoint(self._shapes(site))
        return "choose a path with C, D and E 'none' there, or another method" if biased else None

    def declare(self, sites: Sequence[Site]) -> Declaration:
        if self.path is None or "lora" in (self.path.A, self.path.B, self.path.C):
            check_rank(self, self.rank, sites)
        for site in sites:
            if not site.dtype.is_floating_point:
                raise SpecError(f"GLoRA multiplies the weight elementwise, and that of {site.name!r} is {site.dtype}: "
                                "dequantise the site or exclude it")  # fmt: skip
        local = [{name: Decl(shape) for name, shape in self._shapes(site).items()} for site in sites]
        if self.path is not None:
            return Declaration(local)
        set_path = {"path": Decl((1,), "derived", torch.int64)}
        table = {"table": Decl((len(PATHS), len(COLUMNS)), "derived")}
        return Declaration([tensors | set_path for tensors in local], table)

    def derive(self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors]) -> None:
        if self.path is None:
            rows = [[float(getattr(path, tensor) == choice) for tensor, choice in COLUMNS] for path in PATHS]
            shared["table"].copy_(torch.tensor(rows))
            for tensors in local:
                tensors["path"].zero_()

    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        for tensors in local:
            for name in TENSORS:
                if name in tensors and name.endswith("u"):
                    torch.nn.init.xavier_uniform_(tensors[name])
                elif name in tensors:
                    tensors[name].zero_()

    def emit(self, e: Emitter) -> fx.Node:
        shapes = self._shapes(e.site)
        if not shapes:  # a path of nothing leaves the site alone
            return e.output
        y = e.y
        tensors = [e.tensor(name) if name in shapes else None for name in TENSORS]
        weight, bias = e.weight(), e.bias()
        biased = bias is not None and e.site.form != "matmul"  # `x @ W + b` adds its bias behind the product
        clean = e.untouched
        keep = clean and e.site.whole and "Ad" in shapes and not e.weighted and not e.site.product.by_rows
        if self.path is None:
            training = e.graph.get_attr("training")
            mask = e.call(draw_mask, e.shared("table"), e.tensor("path"), training)
            new = e.call(glora_supernet, e.x, weight, bias, *tensors, mask, keep, biased)
        else:
            product = None
            if clean and not e.site.product.by_rows and "Ad" in shapes and "Au" not in shapes:
                # a part is added to in place, which must not change what the backward of A reads
                product = y if e.site.whole else e.call(torch.clone, y)
            new = e.call(glora, e.x, product, weight, bias, *tensors, keep, biased)
        if not keep:
            return e.add(new)
        if new not in y.users:  # the base's product is dead: eager must not run it
            y.replace_all_uses_with(new)
            e.graph.erase_node(y)
        return new

    def fold(
        self, weight: Tensor, bias: Tensor | None, shared: Tensors, local: Tensors
    ) -> tuple[Tensor, Tensor | None]:
        if self.path is None:
            raise MergeError(
                "a GLoRA supernet has no one weight: every site still chooses among 432 paths. Fix them first, "
                "fix_paths(model, search_paths(...).paths), and merge the result"
            )
        tensors = [local[name].to(weight.dtype) if name in local else None for name in TENSORS]
        return glora_weight(weight, bias, *tensors, keep=True, biased=True)  # type: ignore[misc, arg-type]
