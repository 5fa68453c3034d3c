"""Patterns of names: `query`, `layer.*.attention`, `re:...`."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from ..errors import TargetError, listing, near_misses
from .bounded_regex import full_match


def exactly(names: Iterable[str]) -> str:
    """A pattern that matches these names and no other."""
    return "re:" + "|".join(map(re.escape, names))


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name matches: `re:` the whole name, globs from any component on, else a name ending.

    The name of a part, `qkv[0]`, is itself before it is a glob.
    """
    if pattern.startswith("re:"):
        return full_match(pattern[3:], name) is not None
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    is_glob = any(c in pattern for c in "*?[")
    return is_glob and (fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}"))


def is_name(pattern: str) -> bool:
    return not pattern.startswith("re:") and not any(c in pattern for c in "*?[")


def names_only(pattern: str) -> bool:
    """Whether a pattern is a name, or an expression that lists whole names (`exactly`)."""
    if not pattern.startswith("re:"):
        return is_name(pattern)
    return all(re.escape(re.sub(r"\\(.)", r"\1", one)) == one for one in pattern[3:].split("|"))


def inside(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def no_match(what: str, pattern: str, known: Iterable[str]) -> TargetError:
    known = list(known)
    close = near_misses(pattern.removeprefix("re:"), known) or sorted({n.rpartition(".")[2] for n in known})[:8]
    return TargetError(f"{what} {pattern!r} matches nothing in this model. Close names: {listing(close)}")
