"""A cell of the matrix: what came of one verb on one model, and whose limit it is where it failed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import fxgraft as fg

TEXT = 160  # characters kept of an error

OK, NONE, BASE, REFUSED, WRONG, CRASHED = "ok", "none", "base", "refused", "wrong", "crashed"
#: kinds of cells that are a failure of ours; a refusal says why and is counted apart
FAILURES = (WRONG, CRASHED)


@dataclass(frozen=True)
class Cell:
    """One result. `kind` is `ok`; `none`, does not apply; `base`, the base model or its library cannot do it either;
    `refused`, by us and with a reason; `wrong`, other numbers; or `crashed`, an error that is not one of ours."""

    column: str
    kind: str
    note: str = ""


class Wrong(Exception):
    """Other numbers than expected."""


class NotHere(Exception):
    """The verb does not apply to the row, or needs a package that is not installed."""


class TheirLimit(Exception):
    """The base, or its library, cannot do it either."""


def said(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= TEXT else text[: TEXT - 3] + "..."


def cell_of(column: str, verb: Callable[[], str]) -> Cell:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Cell(column, OK, verb())
    except NotHere:
        return Cell(column, NONE)
    except TheirLimit as error:
        return Cell(column, BASE, str(error))
    except Wrong as error:
        return Cell(column, WRONG, str(error))
    except fg.FxgraftError as error:
        wrong = isinstance(error, fg.ParityError)
        return Cell(column, WRONG if wrong else REFUSED, said(error))
    except Exception as error:  # whatever a model or a library raises is what the table shows
        return Cell(column, CRASHED, said(error))
