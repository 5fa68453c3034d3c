"""A loaded package: call it like the model, give its adapters other values. Needs none of the model's Python."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...rewriter.adapter_state import AdapterState, SiteMethod, check_same_function, methods_from_dict
from ...rewriter.errors import AdapterError, PackageError, listing, near_misses
from ...rewriter.tensors import state_from
from .package_manifest import State, check_machine, read

_TRIES = 5  # of a load that finds its file replaced
_FOLDER_READERS: list[Callable[[str | os.PathLike[str]], AdapterState]] = []


def register_folder_reader(reader: Callable[[str | os.PathLike[str]], AdapterState]) -> None:
    """Who reads adapter folders for `Package.swap`: the exporters, which nothing here imports."""
    _FOLDER_READERS[:] = [reader]


class Outputs(dict[str, Any]):
    """The named outputs of a model, in order: `out["logits"]`, `out.logits` or `out[0]`.

    Stands for the model's own output class, which a package does without.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(f"the outputs are {listing(self)}; there is no {name!r}") from None

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values, in order."""
        return tuple(self.values())


class Package:
    """A compiled model, loaded. Made by `load_package`.

    Calls and swaps may come from several threads: they take turns, and a swap never falls into a call.

    Args:
        manifest: what the package says about itself: `inputs`, `axes`, `outputs`, `adapters` (method, spec, tensors),
            `machine`, `versions`, `parity` (the comparisons with torch made when it was written).
    """

    def __init__(self, file: Path, manifest: Mapping[str, Any], states: Mapping[str, State]):
        # The loader itself, without torch's wrappers: those look for a C++ compiler, and for the model's output class.
        from torch.export.pt2_archive._package import AOTICompiledModel

        self.manifest = dict(manifest)
        self._lock = threading.Lock()
        self._states = dict(states)
        self._device = torch.device(manifest["machine"]["device"])
        try:
            self._loader = torch._C._aoti.AOTIModelPackageLoader(os.fspath(file), "model", False, 1, -1)  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise PackageError(f"torch cannot load the code of {str(file)!r}: {error}") from error
        self._model = AOTICompiledModel(self._loader)
        present = set(self._model.get_constant_fqns())
        if lost := [c for c in self._constants() if c not in present]:
            raise PackageError(f"the compiler folded {listing(lost)}, which must stay swappable")

    def _constants(self) -> Iterator[str]:
        for adapter in self.manifest["adapters"].values():
            yield from (entry["constant"] for entry in adapter["tensors"].values() if entry["constant"])

    # -- running ---------------------------------------------------------------------------------------------------
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model: the arguments it was packaged with, by position or by name.

        Tensors have the dtype, device and sizes that `str(package)` lists; axes of one name have one size. Returns what
        the model returned: a tensor, tuples and lists, and `Outputs` for mappings and model output classes.

        Raises:
            PackageError: an input is missing, unknown, or of another dtype, device or size; all are listed.
        """
        tensors = self._bind(args, kwargs)
        with self._lock:
            flat = self._loader.boxed_run(tensors)
        return _structured(self.manifest["outputs"], dict(zip(self.manifest["output_names"], flat, strict=True)))

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        positional = self.manifest["positional"]
        if len(args) > len(positional):
            raise PackageError(f"{len(args)} positional arguments were given; the package takes {listing(positional)}")
        given = dict(zip(positional, args, strict=False))
        if twice := [name for name in kwargs if name in given]:
            raise PackageError(f"{listing(twice)} given by position and by name")
        given.update(kwargs)
        inputs, constants = self.manifest["inputs"], self.manifest["constants"]
        problems = [f"{name!r} is missing" for name in inputs if given.get(name) is None]
        for name, value in given.items():
            if name in inputs:
                continue
            if name in constants:
                if isinstance(value, Tensor) or value != constants[name]:
                    problems.append(f"{name!r} was packaged as {constants[name]!r} and cannot be {value!r}")
            elif value is not None:
                problems.append(f"{name!r} was not among the example inputs")
        sizes: dict[str, tuple[int, str]] = {}
        for name, expected in inputs.items():
            if given.get(name) is not None:
                problems += self._misfits(name, expected, given[name], sizes)
        if problems:
            raise PackageError(f"wrong inputs: {'; '.join(problems)}. The package takes {self._signature()}")
        return [_flat(given[name]) for name in inputs]

    def _misfits(
        self, name: str, expected: Mapping[str, Any], value: Any, sizes: dict[str, tuple[int, str]]
    ) -> Iterator[str]:
        if not isinstance(value, Tensor):
            yield f"{name!r} is a {type(value).__name__}, not a tensor"
            return
        shape = expected["shape"]
        if value.dtype != (dtype := _dtype(expected["dtype"])):
            yield f"{name!r} is {value.dtype}, not {dtype}"
        if value.device.type != self._device.type:
            yield f"{name!r} is on {value.device}, not on {self._device}"
        if value.dim() != len(shape):
            yield f"{name!r} has {value.dim()} dimensions, not {len(shape)}"
            return
        for axis, (size, wanted) in enumerate(zip(value.shape, shape, strict=True)):
            if isinstance(wanted, int):
                if size != wanted:
                    yield f"{name!r} has size {size} in dimension {axis}, not {wanted}"
                continue
            low, high = self.manifest["axes"][wanted]["min"], self.manifest["axes"][wanted]["max"]
            if size < low or (high is not None and size > high):
                yield f"{name!r} has size {size} in {wanted!r}, which goes from {low} to {high or 'any size'}"
            elif sizes.setdefault(wanted, (size, name))[0] != size:
                other, first = sizes[wanted]
                yield f"{name!r} has size {size} in {wanted!r}, {first!r} has {other}"

    # -- adapters --------------------------------------------------------------------------------------------------
    @property
    def adapters(self) -> list[str]:
        """Names of the adapters in the package, in the order their deltas are added."""
        return list(self.manifest["adapters"])

    def _name(self, name: str | None) -> str:
        names = self.adapters
        if not names:
            raise AdapterError(
                "this package has no adapter: it was made from a plain or merged model, or with none active. "
                "Package the adapted model to swap adapters"
            )
        if name is None and len(names) > 1:
            raise AdapterError(f"this package has {len(names)} adapters: say which with name=, one of {listing(names)}")
        if name is not None and name not in names:
            raise AdapterError(f"no adapter {name!r} in this package; it has {listing(names)}")
        return names[0] if name is None else name

    def _methods(self, name: str) -> dict[str, SiteMethod]:
        """Site name -> method; empty for packages of versions that did not say so."""
        return methods_from_dict(self.manifest["adapters"][name].get("methods", {}))

    def adapter_state(self, name: str | None = None) -> State:
        """A copy of an adapter's tensors, on the CPU: those packaged, or last swapped in. The dict remembers the
        adapter's methods, as that of `fg.adapter_state` does."""
        name = self._name(name)
        with self._lock:
            tensors = {key: tensor.clone() for key, tensor in self._states[name].items()}
        methods = self._methods(name)
        return AdapterState(tensors, methods) if methods else tensors

    def swap(self, state: Mapping[str, Tensor] | nn.Module | str | os.PathLike[str], name: str | None = None) -> None:
        """Give an adapter other values, for every later call; nothing is compiled.

        Args:
            state: what `fg.adapter_state` gives of a model adapted with the same spec, which remembers its methods; a
                plain dict of such tensors, on any device and in any memory layout; an adapted model with an adapter of
                that name, or one adapter; or a folder that `fg.save_adapter` wrote in fxgraft's format. Values are
                copied.
            name: which adapter; may be left out where the package has one.

        Raises:
            AdapterError: a tensor is missing, unknown, of another shape or dtype, or has values that are not finite
                (all are listed); or the state's method would compute something else (another alpha, seed, ...).
                Nothing has been changed then: the runtime itself would read out of bounds.
            CheckpointError: the folder cannot be read.
        """
        name = self._name(name)
        expected = self.manifest["adapters"][name]["tensors"]
        if isinstance(state, nn.Module):
            state = state_from(state, name)
        elif isinstance(state, (str, os.PathLike)):
            stored = _FOLDER_READERS[0](state)
            state = AdapterState({k: _widened(t, expected.get(k)) for k, t in stored.items()}, stored.methods)
        if methods := self._methods(name):
            check_same_function(methods, state, f"the state for adapter {name!r}")
        if problems := list(_state_problems(expected, state)):
            raise AdapterError(
                f"the state does not fit adapter {name!r}, which is unchanged. {len(problems)} problem(s): "
                + "; ".join(problems[:10])
                + ("; ..." if len(problems) > 10 else "")
            )
        constants, kept = {}, {}
        for key, entry in expected.items():
            # A tensor of its own, of exactly this layout: the runtime copies the whole storage a tensor points into.
            own = torch.empty_strided(entry["shape"], entry["stride"], dtype=_dtype(entry["dtype"]), device="cpu")
            kept[key] = own.copy_(state[key].detach())
            if entry["constant"]:
                constants[entry["constant"]] = own.to(self._device)
        with self._lock:
            self._model.load_constants(constants, check_full_update=False)
            self._states[name] = kept

    def _signature(self) -> str:
        return ", ".join(
            f"{name} {entry['dtype']} ({' x '.join(map(str, entry['shape'])) or 'scalar'})"
            for name, entry in self.manifest["inputs"].items()
        )

    def __repr__(self) -> str:
        about = self.manifest
        lines = [
            f"Package of {about['model']} for {about['machine']['device']}, torch {about['versions']['torch']}",
            f"  inputs    {self._signature()}",
            f"  outputs   {', '.join(about['output_names'])}",
        ]
        for name, adapter in about["adapters"].items():
            lines.append(f"  adapter   {name}: {adapter['method']}, {len(adapter['tensors'])} tensors")
        return "\n".join(lines)


def load_package(path: str | os.PathLike[str]) -> Package:
    """Load a package that `fg.package` wrote. Neither the model's Python nor a C++ compiler is needed.

    Every byte is checked against the manifest's hash before any code of the package runs. That finds damage, not
    malice: a package is a program, load only those you trust.

    Raises:
        PackageError: the file is missing, damaged, no package of fxgraft, or made for another torch or machine.
    """
    for _ in range(_TRIES):
        before = _identity(path)
        manifest, states = read(path)
        check_machine(manifest, Path(path))
        package = Package(Path(path), manifest, states)
        if _identity(path) == before:  # torch opened the file that was checked
            return package
    raise PackageError(f"{str(path)!r} is being replaced all the time")


def _identity(path: Any) -> tuple[int, ...] | None:
    """Which file a path leads to now."""
    try:
        about = os.stat(path)
    except (OSError, TypeError, ValueError):
        return None  # reading it says what is wrong
    return about.st_dev, about.st_ino, about.st_mtime_ns, about.st_size


def _flat(tensor: Tensor) -> Tensor:
    """The tensor as compiled code expects it: contiguous, at an aligned address."""
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _widened(tensor: Tensor, entry: Mapping[str, Any] | None) -> Tensor:
    """A tensor of a folder in the dtype the package has, where that loses nothing."""
    dtype = _dtype(entry["dtype"]) if entry is not None else tensor.dtype
    return tensor.to(dtype) if torch.promote_types(tensor.dtype, dtype) == dtype else tensor


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _structured(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Tensors by name in the form that `describe.form_of` described."""
    if form is None:
        return None
    if isinstance(form, str):
        return tensors[form]
    (kind, entries), *_ = form.items()
    if kind == "mapping":
        return Outputs((key, _structured(entry, tensors)) for key, entry in entries)
    values = [_structured(entry, tensors) for entry in entries]
    return values if kind == "list" else tuple(values)


def _state_problems(expected: Mapping[str, Any], state: Any) -> Iterator[str]:
    if not isinstance(state, Mapping):
        yield f"it is a {type(state).__name__}; give a dict of tensors such as fg.adapter_state returns"
        return
    if missing := [key for key in expected if key not in state]:
        yield f"missing {listing(missing)}"
    if unknown := [key for key in state if key not in expected]:
        close = near_misses(str(unknown[0]), expected, 2)
        yield f"unknown {listing(map(str, unknown))}" + (f" (close are {listing(close)})" if close else "")
    for key, entry in expected.items():
        if key not in state:
            continue
        tensor = state[key]
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.device.type == "meta":
            what = (
                f"a {tensor.layout} tensor on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            )
            yield f"{key!r} is {what}, not a dense tensor with values"
            continue
        if list(tensor.shape) != entry["shape"]:
            yield f"{key!r} has shape {tuple(tensor.shape)}, not {tuple(entry['shape'])}"
        if tensor.dtype != (dtype := _dtype(entry["dtype"])):
            yield f"{key!r} is {tensor.dtype}, not {dtype}"
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            yield f"{key!r} has NaN or infinite values"
