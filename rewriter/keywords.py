"""Keyword arguments of the configs: a name that another library uses is answered with ours."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from .errors import SpecError, listing

#: names of PEFT's configs -> ours; those of one method stand in its `elsewhere`
_ELSEWHERE = {
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "train",
    "rank_pattern": "overrides",
    "alpha_pattern": "overrides",
}


class Config:
    """Base of the frozen dataclasses a user writes: an unknown keyword is a `SpecError` that says which one is meant.

    The check stands in `__new__`, which runs before the generated `__init__` and leaves its signature to type checkers.
    """

    #: names of this config's fields in PEFT and in the authors' code -> ours
    elsewhere: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
        for name in kwargs:
            if name not in known:
                raise SpecError(f"{cls.__name__}({name}=...): {_meant(name, known, cls.elsewhere)}")
        return super().__new__(cls)


def _meant(name: str, known: list[str], elsewhere: Mapping[str, str]) -> str:
    ours = (_ELSEWHERE | dict(elsewhere)).get(name.lower())
    close = [ours] if ours in known else difflib.get_close_matches(name, known, n=1)
    allowed = f"the arguments are {listing(known, 20)}"
    return f"the argument is called {close[0]!r} here; {allowed}" if close else f"there is no such argument; {allowed}"
