"""Many adapters in one session: the byte budget, reloading, counters, and runs from many threads meanwhile."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_models as models
import pytest
import torch

import fxgraft as fg
from fxgraft.exporters.onnx.export import export_onnx
from fxgraft.exporters.ort.adapter_cache import AdapterCache, LoadedAdapter, Source
from fxgraft.exporters.ort.session import OrtSession, export_ort_adapter
from fxgraft.rewriter.errors import SessionError

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
TENANTS = [f"t{i}" for i in range(6)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A graph, six structured tenants of one size, and what each answers."""
    folder = tmp_path_factory.mktemp("cache")
    base = models.classifier()
    for i, name in enumerate(TENANTS):
        method = fg.UniLoRA(rank=4, vector_length=40, init_bound=0.5)
        adapted = models.stir(fg.rewrite(base, fg.Spec(method, targets=["up", "down"])), seed=i)
        if i == 0:
            export_onnx(adapted, folder / "m.onnx", (torch.from_numpy(X),), adapters="swappable")
        export_ort_adapter(adapted, folder / f"{name}.onnx_adapter")
    session = OrtSession(folder / "m.onnx", threads=1)
    for name in TENANTS:
        session.load(name, folder / f"{name}.onnx_adapter")
    answers = {name: session.run({"x": X}, adapter=name)["scores"] for name in [*TENANTS, None]}
    assert len({answer.tobytes() for answer in answers.values()}) == 7
    return folder, answers, session.adapters["t0"].bytes


def opened(served, room: float, **options) -> OrtSession:
    folder, _, size = served
    session = OrtSession(folder / "m.onnx", threads=1, max_bytes=int(size * room), **options)
    for name in TENANTS:
        session.register(name, folder / f"{name}.onnx_adapter")
    return session


def counts(session) -> tuple[int, int, int]:
    return session.stats.loads, session.stats.hits, session.stats.evictions


def test_least_recently_used_goes_first(served):
    _, answers, size = served
    session = opened(served, 2.5)
    assert counts(session) == (0, 0, 0) and session.stats.registered == 6 and session.adapters == {}
    for name, loads, hits, evictions, there in [
        ("t0", 1, 0, 0, "t0"),
        ("t1", 2, 0, 0, "t0 t1"),
        ("t0", 2, 1, 0, "t1 t0"),
        ("t2", 3, 1, 1, "t0 t2"),
        ("t1", 4, 1, 2, "t2 t1"),
        ("t2", 4, 2, 2, "t1 t2"),
    ]:
        assert np.array_equal(session.run({"x": X}, adapter=name)["scores"], answers[name])
        assert counts(session) == (loads, hits, evictions)
        assert list(session.adapters) == there.split()
        assert session.stats.bytes == size * session.stats.loaded
    assert np.array_equal(session.run({"x": X})["scores"], answers[None])
    assert counts(session) == (4, 2, 2)
    session.unload("t2")
    assert session.stats.bytes == size and list(session.registered) == ["t0", "t1", "t3", "t4", "t5"]
    session.unload("t5")  # known, not in memory
    with pytest.raises(fg.AdapterError, match="no adapter 't5' is loaded; loaded: 't0', 't1', 't3', 't4'"):
        session.run({"x": X}, adapter="t5")


def test_an_adapter_larger_than_the_budget(served):
    folder, _, size = served
    session = opened(served, 0.5)
    said = rf"'t0' takes {size} bytes in memory, the session's budget is {size // 2}: give OrtSession a larger max_byt"
    with pytest.raises(fg.AdapterError, match=said):
        session.run({"x": X}, adapter="t0")
    with pytest.raises(fg.AdapterError, match=said):
        session.load("t0", folder / "t0.onnx_adapter", replace=True)
    assert session.stats.bytes == 0
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(SessionError, match=r"max_bytes=.*whole number of bytes"):
            OrtSession(folder / "m.onnx", max_bytes=wrong)


def test_a_file_that_changed_since_it_was_loaded(served, tmp_path):
    folder, answers, _ = served
    session = opened(served, 1.5)
    path = tmp_path / "mine.onnx_adapter"
    path.write_bytes((folder / "t0.onnx_adapter").read_bytes())
    session.load("mine", path)
    session.run({"x": X}, adapter="t1")
    assert list(session.adapters) == ["t1"]
    path.write_bytes((folder / "t2.onnx_adapter").read_bytes())
    with pytest.raises(fg.AdapterError, match=r"file of adapter 'mine'.* has changed since it was loaded; load.'mine'"):
        session.run({"x": X}, adapter="mine")
    session.load("mine", path, replace=True)
    assert np.array_equal(session.run({"x": X}, adapter="mine")["scores"], answers["t2"])
    # The same content written anew is the same adapter.
    session.run({"x": X}, adapter="t1")
    path.write_bytes(path.read_bytes())
    assert np.array_equal(session.run({"x": X}, adapter="mine")["scores"], answers["t2"])
    session.run({"x": X}, adapter="t1")
    path.unlink()
    with pytest.raises(fg.CheckpointError, match="there is no adapter file"):
        session.run({"x": X}, adapter="mine")


def test_registering(served, tmp_path):
    folder, answers, _ = served
    session = opened(served, 2.5)
    with pytest.raises(fg.AdapterError, match=r"register\('x', ...\): there is no adapter file"):
        session.register("x", tmp_path / "x.onnx_adapter")
    with pytest.raises(fg.AdapterError, match="'t0' is loaded already; pass replace=True"):
        session.register("t0", folder / "t1.onnx_adapter")
    session.run({"x": X}, adapter="t0")
    session.register("t0", folder / "t1.onnx_adapter", replace=True)
    assert session.adapters == {} and session.stats.bytes == 0
    assert np.array_equal(session.run({"x": X}, adapter="t0")["scores"], answers["t1"])
    for wrong in ("", None, 3):
        with pytest.raises(fg.AdapterError, match="an adapter's name is a non-empty string"):
            session.register(wrong, folder / "t1.onnx_adapter")


def test_many_threads_many_tenants_little_room(served):
    _, answers, size = served
    session = opened(served, 2.5)
    jobs = [random.Random(i).choice([*TENANTS, None]) for i in range(400)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda name: session.run({"x": X}, adapter=name)["scores"], jobs))
    for name, result in zip(jobs, results, strict=True):
        assert np.array_equal(result, answers[name]), name
    stats = session.stats
    assert stats.loads + stats.hits == sum(name is not None for name in jobs)
    assert stats.evictions == stats.loads - stats.loaded > 0
    assert stats.bytes == size * stats.loaded <= size * 2.5


def test_replacing_and_unloading_while_others_run(served):
    folder, answers, _ = served
    session = opened(served, 6)
    stop = threading.Event()
    seen: set[str] = set()
    allowed = {answers["t0"].tobytes(): "t0", answers["t1"].tobytes(): "t1"}

    def work() -> None:
        while not stop.is_set():
            seen.add(allowed[session.run({"x": X}, adapter="t0")["scores"].tobytes()])

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(work) for _ in range(4)]
        for i in range(10_000):  # until a run has had each of them: on one core that is a matter of luck
            session.load("t0", folder / f"t{i % 2}.onnx_adapter", replace=True)
            if i >= 40 and len(seen) == 2:
                break
        stop.set()
        for worker in workers:
            worker.result()
    assert seen == {"t0", "t1"}


class Gate:
    """Reads adapters one at a time, when told to."""

    def __init__(self):
        self.begun, self.go, self.reads = threading.Event(), threading.Event(), 0

    def __call__(self, name, source):
        self.reads += 1
        self.begun.set()
        assert self.go.wait(10)
        return LoadedAdapter(name, {}, 10, {"v": np.ones(3)}), "digest"


def test_one_of_many_misses_reads_the_file(tmp_path):
    read = Gate()
    cache = AdapterCache(read, 100)
    cache.add("a", Source(tmp_path), load=False, fresh=True)
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(cache.get, "a") for _ in range(6)]
        assert read.begun.wait(10)
        read.go.set()
        found = [one.result() for one in waiting]
    assert read.reads == 1 and len({id(one) for one in found}) == 1
    assert (cache.stats.loads, cache.stats.hits) == (1, 5)


def test_an_adapter_unloaded_while_it_is_read_does_not_come_back(tmp_path):
    read = Gate()
    cache = AdapterCache(read)
    cache.add("a", Source(tmp_path), load=False, fresh=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.get, "a")
        assert read.begun.wait(10)
        cache.remove("a")
        read.go.set()
        assert waiting.result().name == "a"  # the run that began with it
    assert cache.loaded() == {} and cache.stats.bytes == 0


def test_an_evicted_adapter_lives_as_long_as_its_run(tmp_path):
    read = Gate()
    read.go.set()
    cache = AdapterCache(read, 15)
    for name in "ab":
        cache.add(name, Source(tmp_path), load=False, fresh=True)
    held = cache.get("a")
    alive = weakref.ref(held)
    cache.get("b")
    assert list(cache.loaded()) == ["b"] and cache.stats.evictions == 1
    assert held.values["v"].sum() == 3
    del held
    gc.collect()
    assert alive() is None
