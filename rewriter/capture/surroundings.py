"""What a forward reads and changes outside of its module: globals, closures, random numbers, modes, the clock.

A profiler sees every function that runs while torch.fx traces. The code of those that belong neither to Python nor to
torch names the globals and the closed-over variables they read.
"""

from __future__ import annotations

import copy
import datetime
import dis
import enum
import functools
import gc
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import _create_wrapped_func

from .library_code import is_library_name, runs_library_code
from .reads import Read
from .value_keys import Opaque, Same, freeze, is_comparable, is_fixed, is_plain

#: what is asked at a call and would be answered once and for all
_QUESTIONS = {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled",
              "get_autocast_dtype", "get_autocast_gpu_dtype", "get_autocast_cpu_dtype", "get_default_dtype",
              "_get_tracing_state", "is_tracing", "is_scripting", "is_compiling", "is_dynamo_compiling",
              "is_exporting", "is_in_onnx_export", "is_deterministic_algorithms_warn_only_enabled",
              "are_deterministic_algorithms_enabled", "getenv"}  # fmt: skip
_MODES = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode, torch.autocast)
#: the code of what torch.fx puts in a function's place that it is to keep whole
_WRAPPED = _create_wrapped_func(len).__code__
_CLOCKS = {"time", "datetime", "secrets", "uuid"}


def _entering() -> dict[types.CodeType, str]:
    """The functions that switch a mode of torch."""
    found = {cls.__enter__.__code__: f"enters torch.{cls.__name__}" for cls in _MODES}
    return {**found, torch.set_grad_enabled.__init__.__code__: "enters torch.set_grad_enabled"}  # type: ignore[misc]


class Surroundings:
    """A context in which a trace runs; afterwards `reads` says what it read outside, `refusals` why it cannot stand."""

    def __init__(self, twin: nn.Module) -> None:
        self.reads: dict[tuple[Any, ...], Read] = {}
        self.refusals: list[str] = []
        self._own = {id(part) for part in twin.modules()}
        self._frames: dict[types.CodeType, None] = {}
        self._entering = _entering()

    def __enter__(self) -> Surroundings:
        self._random = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        self._collected = gc.isenabled()
        gc.disable()  # what a library runs when garbage is collected is not the forward's doing
        self._before = sys.getprofile()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)
        if self._collected:
            gc.enable()
        python, numpy, default = self._random
        drawn = random.getstate() != python or not torch.equal(torch.get_rng_state(), default)
        now = np.random.get_state()
        if drawn or now[2] != numpy[2] or not np.array_equal(now[1], numpy[1]):  # type: ignore[index]
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(default)
            self.refusals.append("it draws random numbers in Python, which a graph would hold fixed")
        for read in self.reads.values():
            if read.now(None) != read.frozen:  # type: ignore[arg-type]
                _restore(read)
                self.refusals.append(f"it changes {read.text}")

    def _event(self, frame: types.FrameType, event: str, function: Any) -> None:
        if event == "c_call":
            if not runs_library_code(frame):
                self._asked(getattr(function, "__name__", ""), function)
            return
        if event != "call":
            return
        code = frame.f_code
        caller = frame.f_back
        if code in self._entering:
            self._refuse(f"it {self._entering[code]}, which a graph would lose")
        elif runs_library_code(frame):
            if caller is not None and not runs_library_code(caller):
                self._asked(code.co_name, frame)
        elif code not in self._frames:
            self._frames[code] = None
            self._names(frame)  # Python calls no profiler inside of one
            self._method(frame)

    def _refuse(self, why: str) -> None:
        if why not in self.refusals:
            self.refusals.append(why)

    def _asked(self, name: str, function: Any) -> None:
        owner = getattr(function, "__self__", None)
        home = getattr(function, "__module__", None) or type(owner).__module__
        if name in _QUESTIONS:
            self._refuse(f"it asks {name}(), and a graph would keep the answer of today")
        elif home in _CLOCKS or owner is datetime.datetime or owner is datetime.date:
            self._refuse(f"it reads the clock ({name}), and a graph would keep the time of today")

    # -- functions, globals and closures -------------------------------------------------------------------------
    def _method(self, frame: types.FrameType) -> None:
        """Note where in a class a function that runs stands: the class may get another."""
        code = frame.f_code
        if not code.co_argcount:
            return
        first = frame.f_locals.get(code.co_varnames[0])
        for cls in type.mro(first if isinstance(first, type) else type(first)):
            for name, held in () if is_library_name(cls.__module__) else list(vars(cls).items()):
                if getattr(_function(held), "__code__", None) is code:
                    value: Any = getattr(cls, name)
                    path: tuple[str, ...] = (name,)
                    if isinstance(value, types.MethodType):  # made anew at every look
                        value, path = value.__func__, (name, "__func__")
                    return self._count_as_itself(cls, path, value)

    def _names(self, frame: types.FrameType) -> None:
        code = frame.f_code
        nested = any(code in other.co_consts for other in self._frames)
        for variable, name, chain in _loads(code):
            if variable == "global" and name in frame.f_globals:
                home: Any = sys.modules.get(frame.f_globals.get("__name__", ""))
                if home is None or vars(home) is not frame.f_globals:
                    home = _Globals()
                    home.__dict__ = frame.f_globals
                self._follow(home, (name,), frame.f_globals[name], chain)
            elif variable == "closure" and not nested and name in frame.f_locals:
                value = frame.f_locals[name]
                self._follow((code, name), (name,), value, chain)

    def _follow(self, root: Any, path: tuple[str, ...], value: Any, chain: tuple[str, ...]) -> None:
        """Note what a chain of names leads to: `CONFIG.scale` in a namespace or an object, all of a container."""
        while chain and isinstance(value, (types.ModuleType, type)) and not is_library_name(_home(value)):
            if not hasattr(value, chain[0]):
                return
            root, path, value, chain = value, (chain[0],), getattr(value, chain[0]), chain[1:]
        if getattr(value, "__code__", None) is _WRAPPED and not chain:
            value = value.__wrapped__  # torch.fx keeps it whole (`torch.fx.wrap`), and puts it back
        if isinstance(value, (Tensor, fx.Proxy, fx.Node)) or id(value) in self._own:
            return
        if isinstance(value, nn.Module):
            return self._refuse(f"it reads the module {path[-1]!r} from outside of itself")
        if isinstance(root, tuple):
            code, name = root
            root = _cell(code, name, value)
        if isinstance(value, (types.ModuleType, type)) and is_library_name(_home(value)):
            return
        if isinstance(value, (types.ModuleType, type)) or (callable(value) and not is_plain(type(value))):
            return self._count_as_itself(root, path, value)
        while chain and is_plain(type(value)) and chain[0] in getattr(value, "__dict__", {}):
            path, value, chain = (*path, chain[0]), value.__dict__[chain[0]], chain[1:]
        if is_plain(type(value)) and is_library_name(_home(type(value))):
            return  # a logger, a lock: no data of the model
        for place, part in _parts(path, value):
            self._add(root, place, part)

    def _count_as_itself(self, root: Any, path: tuple[str, ...], value: Any) -> None:
        self.reads[(id(root), *path)] = Read(path, Same(value), root, value)

    def _add(self, root: Any, path: tuple[str, ...], value: Any) -> None:
        if (id(root), *path) in self.reads:
            return
        name = ".".join(path)
        try:
            snapshot = copy.deepcopy(value) if is_comparable(value) else value
            self.reads[(id(root), *path)] = Read(path, freeze(value), root, snapshot)
        except Opaque as opaque:
            return self._refuse(f"it reads {name}, and what that holds, {opaque}, cannot be followed")
        if not is_fixed(value) and not is_comparable(value):
            self._refuse(f"it reads {name}, and whether that {type(value).__name__} changes later cannot be seen")


def _function(held: Any) -> Any:
    """The function behind what a class holds."""
    kinds = {staticmethod: "__func__", classmethod: "__func__", property: "fget", functools.cached_property: "func"}
    return getattr(held, kinds[type(held)]) if type(held) in kinds else held


class _Globals:
    """The globals of code that belongs to no module."""


def _parts(path: tuple[str, ...], value: Any, depth: int = 4) -> Iterator[tuple[tuple[str, ...], Any]]:
    """An object as what it holds, so that a change of any part is seen; anything else as itself."""
    held = getattr(value, "__dict__", None)
    if held is None or not is_plain(type(value)) or isinstance(value, enum.Enum) or depth == 0:
        if type(value) is not object:
            yield path, value
        return
    for name, part in held.items():
        yield from _parts((*path, name), part, depth - 1)


def _home(value: types.ModuleType | type) -> str:
    return value.__name__ if isinstance(value, types.ModuleType) else value.__module__


def _loads(code: types.CodeType) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """`(kind, name, attributes read of it)` for every global and closed-over variable a code names."""
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PRECALL", "COPY_FREE_VARS")]
    for index, instruction in enumerate(instructions):
        kinds = {"LOAD_GLOBAL": "global", "LOAD_NAME": "global", "LOAD_DEREF": "closure", "LOAD_CLASSDEREF": "closure",
                 "LOAD_FROM_DICT_OR_DEREF": "closure"}  # fmt: skip
        kind = kinds.get(instruction.opname)
        if kind is None or (kind == "closure" and instruction.argval not in code.co_freevars):
            continue
        chain = []
        for following in instructions[index + 1 :]:
            if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            chain.append(str(following.argval))
        yield kind, str(instruction.argval), tuple(chain)


_functions: dict[int, weakref.WeakSet[types.FunctionType]] = {}  # id of a code -> functions that had it
_MAX_FUNCTIONS = 4096


def _cell(code: types.CodeType, name: str, value: Any) -> types.CellType:
    """The cell a running function reads a variable from."""

    def found() -> types.CellType | None:
        for function in _functions.get(id(code), ()):
            if function.__code__ is code:
                cell = (function.__closure__ or ())[code.co_freevars.index(name)]
                if cell.cell_contents is value:
                    return cell
        return None

    if (cell := found()) is None:  # gc looks through all that lives, a tenth of a second beside big libraries
        if len(_functions) >= _MAX_FUNCTIONS:
            _functions.clear()
        _functions[id(code)] = weakref.WeakSet(f for f in gc.get_referrers(code) if isinstance(f, types.FunctionType))
        cell = found()
    return types.CellType(value) if cell is None else cell


def _restore(read: Read) -> None:
    """Put back what a trace has changed outside."""
    owner: Any = read.root
    for name in read.path[:-1]:
        owner = owner.cell_contents if isinstance(owner, types.CellType) else getattr(owner, name)
    if isinstance(owner, types.CellType):
        current, owner_is_cell = owner.cell_contents, True
    else:
        current, owner_is_cell = getattr(owner, read.path[-1], None), False
    if isinstance(current, (list, deque)) and type(current) is type(read.value):
        current.clear()
        current.extend(read.value)
    elif isinstance(current, (dict, set)) and type(current) is type(read.value):
        current.clear()
        current.update(read.value)
    elif owner_is_cell:
        owner.cell_contents = read.value
    else:
        setattr(owner, read.path[-1], read.value)
