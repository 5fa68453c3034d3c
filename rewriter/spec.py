"""`Spec`: which method goes where. Immutable, checked at construction, JSON round trip."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import SpecError
from .keywords import Config
from .method import Method, method_from_dict
from .targeting.patterns import matches

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Target(Config):
    """Parts of a fused weight, such as q and v of a fused qkv projection.

    Args:
        pattern: as in `Spec.targets`.
        parts: into how many equal parts the output dimension is cut, or the size of each part.
        select: the parts that get an adapter, counted from 0; or, without `parts`, their names in an architecture whose
            cut is known (`"q_proj"`, `"v_proj"`).
        groups: into how many stretches the output dimension is cut first, each of which has a piece of every part: the
            heads where q, k and v of a head lie together. Sizes of parts are those inside one stretch.
    """

    pattern: str
    parts: int | Sequence[int] = 1
    select: Sequence[int | str] | str = (0,)
    groups: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "select", _names(self.select, "Target(select=...)"))
        _check_pattern(self.pattern, "Target.pattern")
        if not isinstance(self.parts, int):
            object.__setattr__(self, "parts", _names(self.parts, "Target(parts=...)"))
        counts = (self.parts,) if isinstance(self.parts, int) else self.parts
        if not counts or any(type(size) is not int or size < 1 for size in counts):
            raise SpecError(
                f"Target(parts={self.parts!r}): allowed are whole numbers from 1 up, the number of equal parts or the "
                "sizes of all parts"
            )
        if type(self.groups) is not int or self.groups < 1:
            raise SpecError(f"Target(groups={self.groups!r}): allowed are whole numbers from 1 up")
        if not self.select:
            raise SpecError(f"Target(select={self.select!r}): name at least one part")
        if self.by_name and (self.parts != 1 or self.groups != 1):
            raise SpecError(
                f"Target(select={self.select!r}, parts={self.parts!r}): parts are selected by name where the "
                "architecture's own cut is known, and by number where parts= says how to cut"
            )
        for part in () if self.by_name else self.select:
            if type(part) is not int or not 0 <= part < self.count:
                raise SpecError(
                    f"Target(select={self.select!r}): with parts={self.parts} allowed are 0..{self.count - 1}"
                )
        if len(set(self.select)) != len(self.select):
            raise SpecError(f"Target(select={self.select!r}): name each part once")

    @property
    def by_name(self) -> bool:
        return all(isinstance(part, str) and part for part in self.select)

    @property
    def count(self) -> int:
        """How many parts there are."""
        return self.parts if isinstance(self.parts, int) else len(self.parts)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        parts = self.parts if isinstance(self.parts, int) else list(self.parts)
        groups = {} if self.groups == 1 else {"groups": self.groups}
        return {"pattern": self.pattern, "parts": parts, "select": list(self.select), **groups}


def _check_pattern(pattern: Any, where: str) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise SpecError(
            f"{where}: {pattern!r} is not a pattern; give a name ending, a glob, 're:...' or {ALL_LINEAR!r}"
        )
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise SpecError(f"{where}: {pattern!r} is not a regular expression: {error}") from error


def _names(value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, (str, Target)):
        return (value,)
    if not isinstance(value, Sequence):
        raise SpecError(f"{where}: {value!r} is not a name or a list of names")
    return tuple(value)


@dataclass(frozen=True)
class Spec(Config):
    """One adapter: a method and the places it is grafted to.

    Args:
        method: the config of the method, e.g. `LoRA(rank=8)`.
        targets: name endings (`"query"`), globs (`"encoder.layer.0.*"`), regular expressions that match the whole
            name (`"re:.*layer\\.[0-5]\\..*query"`), `"all-linear"` (every linear but the output head, and no
            convolution), or `Target` for parts of a fused weight. Each must match something.
        exclude: patterns taken out of the matches.
        train: modules that are trained in full and saved with the adapter (task heads, embeddings, lists of modules);
            where a pattern matches no module, single parameters (`"*.bias"` is BitFit).
        keep_ties: what is tied to a parameter of a trained module (the embedding of a tied head) computes with the
            trained one too. False unties it: it keeps the base's values.
        overrides: pattern -> another method config for the matched sites; the first matching pattern counts.
    """

    method: Method
    targets: Sequence[str | Target] | str = (ALL_LINEAR,)
    exclude: Sequence[str] | str = ()
    train: Sequence[str] | str = ()
    overrides: Mapping[str, Method] = field(default_factory=dict)
    keep_ties: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise SpecError(f"Spec(method={self.method!r}): give a method config such as LoRA(rank=8)")
        for name in ("targets", "exclude", "train"):
            object.__setattr__(self, name, _names(getattr(self, name), f"Spec({name}=...)"))
        if not self.targets:
            raise SpecError(f"Spec(targets=()): name at least one target, or {ALL_LINEAR!r}")
        for target in self.targets:
            if not isinstance(target, Target):
                _check_pattern(target, "Spec(targets=...)")
        for pattern in (*self.exclude, *self.train):
            _check_pattern(pattern, "Spec(exclude/train=...)")
        if not isinstance(self.keep_ties, bool):
            raise SpecError(f"Spec(keep_ties={self.keep_ties!r}): allowed are True and False")
        object.__setattr__(self, "overrides", dict(self.overrides))
        for pattern, method in self.overrides.items():
            _check_pattern(pattern, "Spec(overrides=...)")
            if not isinstance(method, Method):
                raise SpecError(f"Spec(overrides={{{pattern!r}: {method!r}}}): the value must be a method config")

    def method_at(self, names: Iterable[str]) -> Method:
        """The config that is asked for at a site of these names."""
        names = tuple(names)
        hits = (method for pattern, method in self.overrides.items() if any(matches(name, pattern) for name in names))
        return next(hits, self.method)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        ties = {"keep_ties": self.keep_ties} if self.train else {}
        return {
            "method": self.method.to_dict(),
            "targets": [t.to_dict() if isinstance(t, Target) else t for t in self.targets],
            "exclude": list(self.exclude),
            "train": list(self.train),
            "overrides": {pattern: method.to_dict() for pattern, method in self.overrides.items()},
            **ties,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spec:
        """The inverse of `to_dict`. Raises `SpecError` on anything it does not understand."""
        known = {"method", "targets", "exclude", "train", "overrides", "keep_ties"}
        if not isinstance(data, Mapping) or not {"method"} <= set(data) <= known:
            raise SpecError(f"a spec has the keys {sorted(known)} (method is required), given was {data!r}")
        overrides = data.get("overrides", {})
        if not isinstance(overrides, Mapping):
            raise SpecError(f"a spec's overrides are pattern -> method, given was {overrides!r}")
        return cls(
            method=method_from_dict(data["method"]),
            targets=tuple(map(_target_from, _names(data.get("targets", [ALL_LINEAR]), "targets"))),
            exclude=_names(data.get("exclude", ()), "exclude"),
            train=_names(data.get("train", ()), "train"),
            keep_ties=data.get("keep_ties", not data.get("train")),  # written before there were ties: untied
            overrides={p: method_from_dict(m) for p, m in overrides.items()},
        )


def _target_from(given: Any) -> Any:
    """A `Target` from its dict; patterns as they are."""
    if not isinstance(given, Mapping):
        return given
    if not {"pattern"} <= set(given) <= {"pattern", "parts", "select", "groups"}:
        raise SpecError(f"a target has the keys pattern, parts, select and groups, given was {given!r}")
    return Target(**{**given, "select": _names(given.get("select", (0,)), "Target(select=...)")})
