"""The kernels: every file declares an operator, and registers what it is for. Importing the folder imports them all."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
