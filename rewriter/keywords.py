"""Keyword arguments of the configs: a name that another library uses is answered with ours."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from .errors import SpecError, listing

#: names in PEFT's configs and in the authors' code -> ours
_ELSEWHERE = {
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "lora_nums": "experts",
    "num_experts": "experts",
    "theta_d_length": "vector_length",
    "proj_seed": "seed",
    "init_theta_d_bound": "init_bound",
    "unshared_rank": "unshared",
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

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
        for name in kwargs:
            if name not in known:
                raise SpecError(f"{cls.__name__}({name}=...): {_meant(name, known)}")
        return super().__new__(cls)


def _meant(name: str, known: list[str]) -> str:
    ours = _ELSEWHERE.get(name.lower())
    close = [ours] if ours in known else difflib.get_close_matches(name, known, n=1)
    allowed = f"the arguments are {listing(known, 20)}"
    return f"the argument is called {close[0]!r} here; {allowed}" if close else f"there is no such argument; {allowed}"
