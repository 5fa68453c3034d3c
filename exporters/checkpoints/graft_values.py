"""Grafting an adapter whose values are there already: nothing is made before they are known to fit.

The dtype of the values, of every format: those of trained modules become what the module's own are. The others become
what an adapter on this model has by default, float32 or wider; only where all that are not float32 have the one narrow
dtype of the base (an adapter rewritten with that dtype) they keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...rewriter.create import graft_adapter
from ...rewriter.errors import AdapterError, CheckpointError, SpecError, TargetError
from ...rewriter.graft_plan import Plan
from ...rewriter.modules.wrappers import M
from ...rewriter.spec import Spec
from ...rewriter.state import record_of
from ...rewriter.tensors import adapter_state, check_shapes, check_state, write_state

_DERIVED_FREE = 1 << 24  # elements that cost nobody anything
_DERIVED_PER_WEIGHT = 4  # an adapter derives a fraction of the weights it adapts


def filled(
    model: M,
    spec: Spec,
    name: str,
    tensors: Mapping[str, Tensor],
    what: str,
    *,
    order: Sequence[str],
    fits: Callable[[Plan], None],
    hint: str,
    keep: bool = False,
    fit: bool = False,
) -> M:
    """Graft a spec and fill it with values that must fit exactly; the input model is not changed.

    Args:
        tensors: in the names of `adapter_state`, in any floating dtype.
        what: subject of the error texts; `hint` is their end.
        order: of the sites, as in `graft_adapter`.
        fits: raises where the sites are not those the adapter was made for.
        fit: as in `graft_adapter`.
        keep: whether values may keep the narrow dtype they have in common with the base.

    Raises:
        CheckpointError: the spec does not fit the model, or the tensors do not fit the spec.
    """

    def check(plan: Plan) -> None:
        fits(plan)
        with _as_checkpoint(hint):
            check_shapes(plan.shapes, tensors, what)
        weights = sum(site.in_features * site.out_features for site in plan.sites)
        if plan.derived > max(_DERIVED_FREE, _DERIVED_PER_WEIGHT * weights):
            raise CheckpointError(
                f"{what} would derive {plan.derived} numbers from its config for layers of {weights} weights in all, "
                "which no adapter does"
            )

    def grafted(dtype: torch.dtype | None) -> M:
        return graft_adapter(model, spec, name, dtype=dtype, initialise=False, order=order, check=check, fit=fit)

    try:
        adapted = grafted(None)
        record = record_of(adapted, name)
        heads = tuple(f"{path}." for path in record.train)
        own = {k: t for k, t in tensors.items() if not k.startswith(heads) and k not in record.parameters}
        stored = {t.dtype for t in own.values() if t.is_floating_point()}
        narrow = {site.dtype for site in record.sites} & stored - {torch.float32} if keep else set()
        if len(narrow) == 1:
            adapted = grafted(narrow.pop())
    except (TargetError, SpecError) as error:
        raise CheckpointError(f"{what} does not fit this {type(model).__name__}: {error}") from error
    expected = adapter_state(adapted, name)
    values = {
        key: t.to(expected[key].dtype) if t.is_floating_point() and expected[key].is_floating_point() else t
        for key, t in tensors.items()
    }
    with _as_checkpoint(hint):
        check_state(expected, values, what)
        write_state(adapted, name, values)
    return adapted


@contextmanager
def _as_checkpoint(hint: str) -> Iterator[None]:
    try:
        yield
    except AdapterError as error:
        raise CheckpointError(f"{error}. {hint}") from error
