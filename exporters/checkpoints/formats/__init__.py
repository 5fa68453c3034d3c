"""The formats of other programs, a file each; `foreign/format.py` tells how one is added."""

from importlib import import_module
from pkgutil import iter_modules

from ..foreign.format import Format


def find_formats() -> tuple[Format, ...]:
    """Those of this folder's files, forks first: they kept the `peft_type` of the method they were made of."""
    found: list[Format] = [import_module(f"{__name__}.{module.name}").FORMAT for module in iter_modules(__path__)]
    return tuple(sorted(found, key=lambda format: bool(format.peft_type)))


FORMATS = find_formats()
