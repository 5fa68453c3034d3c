"""`OrtSession`: one graph in ONNX Runtime, many adapters, any or none of them per run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...rewriter.errors import AdapterError, SessionError, listing, path_of
from ...rewriter.method import ADAPTER_IDS
from ..adapterfiles.export_adapter import export_ort_adapter
from ..adapterfiles.fit import one_slot
from ..adapterfiles.ort_values import Device, to_array, to_ort
from ..onnx.cache.cache_plan import CachePlan
from ..onnx.checks.ort_graph import OrtGraph
from ..onnx.verify import verify as repeat_checks
from .active import active_values
from .adapter_cache import AdapterCache, AdapterStats, LoadedAdapter, Source
from .feeds import Array, check_ids, check_inputs
from .generate import check_embeds, check_prompt, check_source, greedy, greedy_from, source_sizes
from .providers import Provider, device_of, start
from .read_adapters import AdapterReader
from .session_bank import Bank, room
from .weighted import Combiner


class OrtSession:
    """A graph of `export_onnx`, ready to run with or without adapters.

    session = OrtSession("model.onnx")
    session.load("a", "a.onnx_adapter")
    session.run({"input_ids": ids, "attention_mask": mask}, adapter="a")["logits"]

    Everything may be called from several threads at once. A run keeps the adapters it began with, also where another
    thread replaces, unloads or evicts them meanwhile.

    `inputs`, `outputs` and `adapter_inputs` describe the graph ({name: TensorInfo}), `providers` is what runs it,
    `stats` counts loads, hits and evictions.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[Provider] | None = None,
        *,
        max_bytes: int | None = None,
        threads: int | None = None,
        strict: bool = False,
        binding: bool | None = None,
        capacity: int | None = None,
        rank: int | None = None,
        verify: bool = False,
    ):
        """Open a graph.

        providers   None is CUDA where this onnxruntime has it and it starts (a warning where it does not start), the
                    CPU otherwise. Providers asked for are the ones used, in order, or it is a `SessionError`.
        max_bytes   budget for the adapters in memory: the least recently used are dropped, and read from their files
                    again when a run asks for them. None keeps all.
        threads     bounds the threads of one operator.
        strict      no node may run on the CPU; a graph with one that has no other kernel does not start.
        binding     run with inputs bound to the device. None does so on CUDA and TensorRT, where it is the only way.
        capacity    of a graph with a bank: how many tenants have a slot at a time; None is what it was exported for.
        rank        of a graph with a bank: the largest rank a slot takes; None as for `capacity`. A slot takes
                    `rank * (in + out)` numbers per site.
        verify      repeat the checks of `fg.verify` first, or it is a `VerifyError`: the hash of every byte, and that
                    the graph gives what it gave at the export.

        Raises `SessionError` where the graph cannot be opened, or has lost its adapter inputs.
        """
        self.path = path_of(path, "OrtSession(path)", SessionError)
        if not self.path.is_file():
            raise SessionError(f"there is no graph {str(path)!r}")
        if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1):
            raise SessionError(f"max_bytes={max_bytes!r}: give a whole number of bytes from 1 up, or None for no limit")
        for what, size in (("capacity", capacity), ("rank", rank), ("threads", threads)):
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise SessionError(f"{what}={size!r}: give a whole number from 1 up, or None to leave it out")
        if verify:
            repeat_checks(self.path)
        self._graph = OrtGraph(start(self.path, providers, threads, strict))
        self._session = self._graph.session
        self.providers: list[str] = self._session.get_providers()
        self.device: Device = device_of(self._session)
        if binding is False and self.device.type != "cpu":
            raise SessionError(f"binding=False: runs on {self.providers[0]} are always bound to the device")
        self.binding = self.device.type != "cpu" if binding is None else bool(binding)
        self.manifest, self.inputs, self.outputs = self._graph.manifest, self._graph.inputs, self._graph.outputs
        self.adapter_inputs = self._graph.adapter_inputs
        told = self.manifest or {}
        if lost := self._graph.lost():
            raise SessionError(
                f"{str(path)!r} was exported {told['adapters']!r}, and has no inputs any more for {listing(lost)}: a "
                "tool that wrote it anew (a quantiser, an optimiser) has taken them for constants, and adapters would "
                "have no effect. fg.quantize_onnx keeps them; with other tools leave out the nodes that read them"
            )
        self._bank: Bank | None = None
        self._combine = Combiner(self.device, self.adapter_inputs)
        if ADAPTER_IDS in self.inputs and told.get("adapters", "bank") == "bank":
            capacity = told.get("capacity") if capacity is None else capacity
            rank = told.get("rank") if rank is None else rank
            stacks, bases = room(self.path, self.adapter_inputs, capacity, rank)
            reader = AdapterReader(self.path, told, one_slot(self.adapter_inputs), self.device, stacks)
            self._cache = AdapterCache(reader, max_bytes)
            self._bank = Bank(stacks, self._cache, self.device, told.get("tenants", {}), bases)
        elif capacity is not None or rank is not None:
            raise SessionError(
                f"capacity= and rank= are for a graph with a bank of adapters (adapters='bank'); {str(path)!r} has none"
            )
        else:
            reader = AdapterReader(self.path, told, self.adapter_inputs, self.device)
            self._cache = AdapterCache(reader, max_bytes)

    @property
    def checked(self) -> bool | None:
        """Whether the graph was compared with torch when it was exported; None where no manifest says."""
        return None if self.manifest is None else bool(self.manifest.get("checked", True))

    # -- adapters ----------------------------------------------------------------------------------------------------
    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """The adapters in memory by name (a copy)."""
        return self._cache.loaded()

    @property
    def registered(self) -> dict[str, Path]:
        """Every name the session knows, in memory or not, and its file (a copy)."""
        return {name: source.path for name, source in self._cache.sources().items()}

    @property
    def slots(self) -> dict[str, int]:
        """Of a graph with a bank: the tenants that sit in a slot now, and the slot. Tenants move; names stay."""
        return self._bank.tenants() if self._bank is not None else {}

    @property
    def stats(self) -> AdapterStats:
        """Counters since the session began, and what is in memory now."""
        stats = self._cache.stats
        if self._bank is None:
            return stats
        return dataclasses.replace(stats, slot_fills=self._bank.fills, slot_evictions=self._bank.evictions)

    def load(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        replace: bool = False,
        partial: bool = False,
        check_base: bool = True,
    ) -> LoadedAdapter:
        """Read an `.onnx_adapter` file, expand it where it is structured, and keep it under `name`.

        replace      take the place of an adapter of that name (otherwise an error).
        partial      allow whole sites (or trained tensors) to be missing; they stay as in the base model.
        check_base   compare the base weights' fingerprint in the file with the graph's.

        Floating tensors narrower than the graph's are widened, which is exact (float16 into a float32 graph); wider
        ones would be rounded, and are refused.

        Raises `CheckpointError` for a file that is damaged or something else, `AdapterError` where it does not fit the
        graph (see `adapterfiles.fit.check_fit`) or the byte budget. Nothing is changed then.
        """
        self._check_new(name, replace)
        adapter = self._cache.add(
            name, Source(path_of(path, "load", AdapterError), partial, check_base), load=True, fresh=not replace
        )
        assert adapter is not None
        if self._bank is not None:
            self._bank.forget(name)
            with self._bank.batch([name]):
                pass  # it has a slot from here on, until others need the slot
        return adapter

    def register(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        replace: bool = False,
        partial: bool = False,
        check_base: bool = True,
    ) -> None:
        """Like `load`, but the file is read by the first run that asks for it; what is wrong with it is raised there.

        Raises `AdapterError` where the name is taken or there is no such file.
        """
        if not path_of(path, "register", AdapterError).is_file():
            raise AdapterError(f"register({name!r}, ...): there is no adapter file {str(path)!r}")
        self._check_new(name, replace)
        self._cache.add(name, Source(Path(path), partial, check_base), load=False, fresh=not replace)
        if self._bank is not None:
            self._bank.forget(name)

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises `AdapterError` where none has that name."""
        if self._bank is not None and name in self._bank.baked and name not in self._cache.sources():
            self._bank.forget(name)
            return
        self._cache.remove(name)
        if self._bank is not None:
            self._bank.forget(name)

    def _check_new(self, name: str, replace: bool) -> None:
        if not replace and name in self.slots:
            raise AdapterError(f"the graph has a tenant {name!r} already; pass replace=True, or unload it first")
        if self._bank is not None:
            self._bank.check_room_for(name)

    # -- running -----------------------------------------------------------------------------------------------------
    def run(
        self,
        inputs: Mapping[str, Any],
        adapter: str | Sequence[str] | Mapping[str, float] | None = None,
        adapter_ids: Sequence[str | int | None] | np.ndarray | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run the graph once and return {output name: array}.

        inputs       {name: numpy array, torch tensor or nested list} for every name in `inputs` (but for
                     `adapter_ids`), of the graph's dtypes.
        adapter      a loaded or registered adapter's name, None for the base model; a sequence of names for partial
                     adapters that set different tensors; {name: weight} for the weighted sum of adapters with
                     low-rank factors, in a graph without a bank.
        adapter_ids  of a graph with a bank: the adapter of every sample, by name, or None for the base model. Tenants
                     that are in no slot are brought into one; the least recently used make room, never one that
                     another run is using. Slot numbers as in `slots` are taken as long as no slot has changed hands.
        outputs      the outputs to compute; None is all.

        Raises `SessionError` for inputs or outputs that do not fit, `AdapterError` for adapters.
        """
        wanted = list(self.outputs) if outputs is None else list(outputs)
        unknown = [name for name in wanted if name not in self.outputs]
        if unknown or not wanted:
            raise SessionError(f"unknown outputs {listing(unknown)}; the graph has {listing(self.outputs)}")
        arrays = check_inputs(inputs, self.inputs, bank=self._bank is not None)
        with self._chosen(arrays, adapter, adapter_ids) as (ids, values):
            given = {name: to_ort(array, self.device) for name, array in {**arrays, **ids}.items()}
            results = self._call(given, values, wanted)
        return {name: to_array(value) for name, value in zip(wanted, results, strict=True)}

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        decoder_input_ids: Any = None,
        inputs_embeds: Any = None,
        max_new_tokens: int = 64,
        adapter: str | Sequence[str] | Mapping[str, float] | None = None,
        adapter_ids: Sequence[str | int | None] | np.ndarray | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> np.ndarray:
        """Continue prompts with the most likely token, as `model.generate(do_sample=False)` does.

        input_ids       (batch, sequence) token ids, shorter prompts padded on the left; `attention_mask` has zeros
                        there. Of an encoder-decoder the source, padded on either side, or its features.
        decoder_input_ids  what an encoder-decoder has said already, (batch, sequence); None is its first token.
        inputs_embeds   of a graph that takes embeddings: the text before `input_ids` (batch, embedded, width), image
                        features in their places. The mask covers both.
        max_new_tokens  how many tokens to add at most.
        adapter         as for `run`, for the whole generation: an adapter replaced meanwhile is used to the end.
        adapter_ids     as for `run`, of a graph with a bank.
        eos_token_id    a row ends with any of these and is filled with `pad_token_id` (None: the first of them).

        Needs a graph of `export_onnx(cache=True)`. The cache stays on the session's device from one token to the next.
        Returns the prompts (of an encoder-decoder what it has said) and what follows them, (batch, sequence + new)
        int64.
        """
        told = CachePlan.told((self.manifest or {}).get("cache", 0))
        if told.cross:
            source, ids = check_source(told, input_ids, attention_mask, decoder_input_ids, max_new_tokens, self.inputs)
        elif decoder_input_ids is not None:
            raise SessionError("decoder_input_ids is for an encoder-decoder; give the whole prompt as input_ids")
        else:
            source, embeds = {}, check_embeds(inputs_embeds, input_ids, self.inputs)
            before = 0 if embeds is None else embeds.shape[1]
            ids, mask = check_prompt(input_ids, attention_mask, max_new_tokens, self.inputs, before)
        ends = [] if eos_token_id is None else list(np.atleast_1d(eos_token_id))
        pad = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
        with self._chosen(source or {"input_ids": ids}, adapter, adapter_ids) as (slots, values):

            def step(inputs: Mapping[str, Array], cache: Mapping[str, Any], kept: Sequence[str], said: bool) -> Any:
                given = {name: to_ort(array, self.device) for name, array in {**inputs, **slots}.items()}
                wanted = ["logits"] if said else []
                results = self._call({**given, **cache}, values, wanted, kept)
                logits = to_array(results[0]) if said else None
                return logits, dict(zip(kept, results[len(wanted) :], strict=True))

            if source:
                held = {name: to_ort(array, self.device) for name, array in source.items()}
                sizes = source_sizes(told, source)
                return greedy_from(held, sizes, step, self.inputs, self.device, ids, max_new_tokens, ends, pad)
            return greedy(step, self.inputs, self.device, ids, mask, max_new_tokens, ends, pad, embeds)

    @contextmanager
    def _chosen(
        self, arrays: Mapping[str, Array], adapter: Any, adapter_ids: Any
    ) -> Iterator[tuple[dict[str, Array], dict[str, Any]]]:
        """What is fed beside the inputs: the slots of a bank, and the adapter tensors; theirs inside the block."""
        if self._bank is not None:
            ids = check_ids(arrays, self.inputs, adapter, adapter_ids)
            with self._bank.batch(ids) as (slots, stacks):
                yield {ADAPTER_IDS: slots}, stacks
            return
        if adapter_ids is not None:
            raise SessionError(
                "adapter_ids needs a graph with a bank of adapters (adapters='bank'); this one takes one adapter for "
                "the whole batch (adapter=)"
            )
        yield {}, active_values(adapter, self._cache, self._combine, own="own" in (self.manifest or {}))

    def _call(
        self, inputs: Mapping[str, Any], values: Mapping[str, Any], wanted: Sequence[str], kept: Sequence[str] = ()
    ) -> list[Any]:
        """The outputs `wanted`, on the CPU, and those `kept` on the device, as OrtValues."""
        try:
            return self._graph.run(inputs, values, wanted, kept, self.device if self.binding else None)
        except Exception as error:  # onnxruntime's classes share no base
            raise SessionError(f"onnxruntime failed on {str(self.path)!r}: {error}") from error


__all__ = ["AdapterStats", "LoadedAdapter", "OrtSession", "export_ort_adapter"]
