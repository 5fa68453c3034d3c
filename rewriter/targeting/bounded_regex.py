"""Regular expressions that a file may bring: matched in bounded time.

Python's `re` cannot be stopped, and `(a+)+$` takes a lifetime for forty letters. Expressions that may cost more than
their length says go to the `regex` package, which can.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import Any

from ..errors import SpecError

_SECONDS = 2.0  # one expression's, over all names
_LONGEST = 1 << 22  # characters
_LITERAL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)  # escapes and classes: one character each
_LAZY = re.compile(r"(?<=[*+?}])[?+]|\(\?[:=!<P]?")  # what looks like a quantifier and is none
_REPEAT, _GROUP_REPEAT = re.compile(r"[*+{]"), re.compile(r"\)[*+{]")


def full_match(pattern: str, text: str) -> Any:
    """The match of the whole text, or None.

    Raises:
        SpecError: it is no regular expression, or one that takes too long.
    """
    return _matcher(pattern)(text)


@functools.lru_cache(maxsize=512)
def _matcher(pattern: str) -> Callable[[str], Any]:
    if len(pattern) > _LONGEST:
        raise SpecError(f"a regular expression of {len(pattern)} characters; allowed are {_LONGEST}")
    try:
        plain = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise SpecError(f"{pattern!r} is not a regular expression: {error}") from error
    return plain.fullmatch if _cheap(pattern) else _Guarded(pattern)


def _cheap(pattern: str) -> bool:
    """Whether trying every way to match costs little: few repeats, none of a group, few choices."""
    bare = _LAZY.sub("(", _LITERAL.sub("x", pattern))
    choices = bare.count("?") + bare.count("(")
    return len(_REPEAT.findall(bare)) <= 3 and choices <= 8 and not _GROUP_REPEAT.search(bare)


class _Guarded:
    """An expression with the time it may still take."""

    def __init__(self, pattern: str) -> None:
        import regex

        try:
            self.compiled = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise SpecError(f"{pattern!r} is not a regular expression: {error}") from error
        self.left = _SECONDS

    def __call__(self, text: str) -> Any:
        started = time.perf_counter()
        try:
            found = self.compiled.fullmatch(text, timeout=max(self.left, 1e-3))
        except TimeoutError as error:
            self.left = 0.0
            raise SpecError(
                f"the regular expression {self.compiled.pattern!r} takes too long to match {text!r}: repeats of "
                "repeats try too many ways; write it without them, or name the layers"
            ) from error
        spent = time.perf_counter() - started
        if spent > 0.01:  # what is quick may go on for the life of a process
            self.left -= spent
        return found
