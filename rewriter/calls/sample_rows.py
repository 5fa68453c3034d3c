"""How the rows of a site's input belong to the samples of a batch, where a call gives every sample its own adapter.

    bank_<...>(x, ids, ...)  ->  in_place(bank_<...>(samples_first(x), ids, ...))

`None` is a first dimension of samples, `(batch, ...)` or `(batch * tokens, ...)` with a sample's rows one after the
other. Otherwise `(axis, inner)`: that dimension is the batch, alone, or outside of something else (`inner` False) or
inside (`inner` True: neighbouring rows are of different samples).
"""

from __future__ import annotations

from torch import Tensor

from ..errors import AdapterError

Rows = tuple[int, bool] | None | str
UNPROVEN = "unproven"  # nobody has looked yet


def samples_first(x: Tensor, ids: Tensor | None, rows: Rows) -> Tensor:
    """x with the samples in its first dimension.

    Raises:
        AdapterError: it is not proved how the samples lie in x; with one sample there is nothing to prove.
    """
    if rows is None or ids is None or ids.shape[0] == 1:
        return x
    if isinstance(rows, str):
        raise AdapterError(
            f"a layer with adapters was reached that was not when the bank tried which rows of {tuple(x.shape)} belong "
            "to which sample: call the bank itself, with all of its inputs, before you compile or export it or call "
            "parts of it; or give fg.bank example_inputs that reach every adapter. If the input's data decide which "
            "layers run (experts), serve each tenant on its own"
        )
    axis, inner = rows
    batch = ids.shape[0]
    if x.shape[axis] % batch:
        raise AdapterError(_does_not_fit(x, axis, batch))
    if inner:
        return x.unflatten(axis, (-1, batch)).movedim(axis + 1, 0)
    return x.unflatten(axis, (batch, -1)).movedim(axis, 0)


def in_place(delta: Tensor, ids: Tensor | None, rows: Rows) -> Tensor:
    """The inverse of `samples_first`, for what was made of it."""
    if rows is None or isinstance(rows, str) or ids is None or ids.shape[0] == 1:
        return delta
    axis, inner = rows
    return delta.movedim(0, int(axis) + int(inner)).flatten(axis, int(axis) + 1)  # type: ignore[arg-type]


def check_first(x: Tensor, batch: int) -> None:
    """Raise `AdapterError` where the first dimension of x cannot be `batch` samples."""
    if x.shape[0] % batch:
        raise AdapterError(_does_not_fit(x, 0, batch))


def _does_not_fit(x: Tensor, axis: int, batch: int) -> str:
    return (
        f"a layer with adapters got {tuple(x.shape)}, whose dimension {axis} holds no {batch} samples of adapter_ids: "
        "the samples' rows were regrouped since the bank looked how they lie. Serve each tenant on its own "
        "(fg.merge, or a batch with one tenant)"
    )
