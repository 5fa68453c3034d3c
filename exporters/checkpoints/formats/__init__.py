"""The formats of other programs, a file each; `foreign/format.py` tells how one is added."""

from importlib import import_module
from pkgutil import iter_modules

from ..foreign.format import Format

_found: list[Format] = [import_module(f"{__name__}.{module.name}").FORMAT for module in iter_modules(__path__)]
#: forks first: they kept the `peft_type` of the method they were made of
FORMATS = tuple(sorted(_found, key=lambda format: bool(format.peft_type)))
