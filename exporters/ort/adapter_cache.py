"""The adapters of a session: which file each name stands for, and which of them are in memory, under a byte budget."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...rewriter.errors import AdapterError, listing


@dataclass(frozen=True)
class Source:
    """Where an adapter comes from, and how it is to be checked. `digest` is of the content it was accepted with,
    `serial` counts the adapters that names were given to."""

    path: Path
    partial: bool = False
    check_base: bool = True
    digest: str | None = None
    serial: int = 0


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in memory: the rank of every site, its size, and its tensors on the session's device."""

    name: str
    ranks: dict[str, int]
    bytes: int
    values: dict[str, Any]
    serial: int = 0


@dataclass(frozen=True)
class AdapterStats:
    """Counters since the session began, and what is there now.

    Args:
        loads: files read (and expanded), first uses and reloads.
        hits: uses of an adapter that was in memory.
        evictions: adapters dropped from memory for the byte budget; `unload` and `replace` do not count.
        bytes: of the adapters in memory. One that was evicted during a run is freed when the run ends.
        loaded, registered: how many are in memory, and how many names the session knows.
        slot_fills, slot_evictions: of a graph with a bank, tenants written into a slot, and tenants put out of one.
    """

    loads: int = 0
    hits: int = 0
    evictions: int = 0
    bytes: int = 0
    loaded: int = 0
    registered: int = 0
    slot_fills: int = 0
    slot_evictions: int = 0


# Reads a source: the adapter, and the digest of what was read.
Read = Callable[[str, Source], tuple[LoadedAdapter, str]]


class AdapterCache:
    """Names, files, and an LRU of loaded adapters. Every method may be called from any thread.

    A caller keeps the adapter it was given alive; being evicted only means that the next one has to load it again.
    """

    def __init__(self, read: Read, max_bytes: int | None = None) -> None:
        self._read = read
        self._max_bytes = max_bytes
        self._sources: dict[str, Source] = {}
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self._gates: dict[str, threading.Lock] = {}
        self._lock = threading.RLock()
        self._stats = AdapterStats()
        self._serials = itertools.count(1)

    @property
    def stats(self) -> AdapterStats:
        with self._lock:
            return replace(self._stats, loaded=len(self._loaded), registered=len(self._sources))

    def loaded(self) -> dict[str, LoadedAdapter]:
        with self._lock:
            return dict(self._loaded)

    def sources(self) -> dict[str, Source]:
        with self._lock:
            return dict(self._sources)

    def add(self, name: str, source: Source, load: bool, fresh: bool) -> LoadedAdapter | None:
        """Give a name to a file and, with `load`, bring it into memory. `fresh`: the name must be new."""
        self._check_name(name, fresh)
        source = replace(source, serial=next(self._serials))
        adapter = None
        if load:
            adapter, digest = self._read(name, source)
            self._check_size(adapter)
            source = replace(source, digest=digest)
        with self._lock:
            self._check_name(name, fresh)  # another thread may have come first
            self._drop(name)
            self._sources[name] = source
            if adapter is not None:
                self._keep(adapter)
        return adapter

    def get(self, name: str) -> LoadedAdapter:
        """The adapter of a name, from memory or from its file. Raises `AdapterError` for unknown names, and where the
        file is no longer the one that was accepted."""
        with self._lock:
            found = self._hit(name)
            if found is not None:
                return found
            gate = self._gates.setdefault(name, threading.Lock())
        with gate:  # of many threads that miss the same adapter one reads the file
            with self._lock:
                found = self._hit(name)
                if found is not None:
                    return found
                source = self._sources[name]
            adapter, digest = self._read(name, source)
            if source.digest not in (None, digest):
                raise AdapterError(
                    f"the file of adapter {name!r}, {str(source.path)!r}, has changed since it was loaded; "
                    f"load({name!r}, path, replace=True) takes the new content"
                )
            self._check_size(adapter)
            with self._lock:
                if self._sources.get(name) is source:  # not unloaded or replaced meanwhile
                    self._sources[name] = replace(source, digest=digest)
                    self._keep(adapter)
            return adapter

    def serial(self, name: str) -> int:
        """Which of all adapters the name stands for now."""
        with self._lock:
            self._known(name)
            return self._sources[name].serial

    def remove(self, name: str) -> None:
        """Forget a name. Raises `AdapterError` where nothing has it."""
        with self._lock:
            self._known(name)
            self._drop(name)
            del self._sources[name]
            self._gates.pop(name, None)

    def _hit(self, name: str) -> LoadedAdapter | None:
        self._known(name)
        found = self._loaded.get(name)
        if found is not None:
            self._loaded.move_to_end(name)
            self._stats = replace(self._stats, hits=self._stats.hits + 1)
        return found

    def _keep(self, adapter: LoadedAdapter) -> None:
        stats = self._stats
        self._loaded[adapter.name] = adapter
        used, evictions = stats.bytes + adapter.bytes, stats.evictions
        while self._max_bytes is not None and used > self._max_bytes:
            _, oldest = self._loaded.popitem(last=False)
            used -= oldest.bytes
            evictions += 1
        self._stats = replace(stats, loads=stats.loads + 1, evictions=evictions, bytes=used)

    def _drop(self, name: str) -> None:
        adapter = self._loaded.pop(name, None)
        if adapter is not None:
            self._stats = replace(self._stats, bytes=self._stats.bytes - adapter.bytes)

    def _check_size(self, adapter: LoadedAdapter) -> None:
        if self._max_bytes is not None and adapter.bytes > self._max_bytes:
            raise AdapterError(
                f"adapter {adapter.name!r} takes {adapter.bytes:,} bytes in memory, the session's budget is "
                f"{self._max_bytes:,}: give OrtSession a larger max_bytes"
            )

    def _check_name(self, name: str, fresh: bool) -> None:
        if not isinstance(name, str) or not name:
            raise AdapterError(f"an adapter's name is a non-empty string, not {name!r}")
        with self._lock:
            if fresh and name in self._sources:
                raise AdapterError(f"an adapter {name!r} is loaded already; pass replace=True, or unload it first")

    def _known(self, name: str) -> None:
        if name not in self._sources:
            known = listing(self._sources) if self._sources else "none"
            raise AdapterError(
                f"no adapter {name!r} is loaded; loaded: {known}. Use load({name!r}, '<file>.onnx_adapter')"
            )
