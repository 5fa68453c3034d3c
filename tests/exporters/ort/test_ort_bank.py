"""Banks in a session: mixed batches, tenants that come and go over few slots, ids that are refused."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, save

import fxgraft as fg
from fxgraft.exporters.adapterfiles import graph_manifest as manifest
from fxgraft.exporters.ort.session import OrtSession
from fxgraft.rewriter.errors import SessionError

IN, OUT, RANK, SLOTS = 6, 5, 3, 4  # three tenants at a time
NAMES = [f"t{i}" for i in range(7)]
X = np.random.default_rng(0).standard_normal((8, IN)).astype(np.float32)


def write(path, arrays):
    made = onnxruntime.AdapterFormat()
    made.set_parameters({key: onnxruntime.OrtValue.ortvalue_from_numpy(value) for key, value in arrays.items()})
    made.export_adapter(str(path))
    return path


def factors(seed: int, rank: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "up.A": rng.standard_normal((IN, rank)).astype(np.float32),
        "up.B": rng.standard_normal((rank, OUT)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """`y = x W + (x A[ids]) B[ids]` with one tenant that came with the graph, seven adapter files, and W."""
    folder = tmp_path_factory.mktemp("bank")
    weight = np.random.default_rng(9).standard_normal((IN, OUT)).astype(np.float32)
    # The file has the graph's own tenant only: rank 2, in slot 2 of 3. The session makes the room it is told to make.
    stacks = {"up.A": np.zeros((3, IN, 2), np.float32), "up.B": np.zeros((3, 2, OUT), np.float32)}
    for name, value in factors(100, 2).items():
        stacks[name][(2, *(slice(size) for size in value.shape))] = value
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["base"]),
        helper.make_node("Gather", ["up.A", "adapter_ids"], ["a"], axis=0),
        helper.make_node("Gather", ["up.B", "adapter_ids"], ["b"], axis=0),
        helper.make_node("Unsqueeze", ["x", "one"], ["row"]),
        helper.make_node("MatMul", ["row", "a"], ["z"]),
        helper.make_node("MatMul", ["z", "b"], ["wide"]),
        helper.make_node("Squeeze", ["wide", "one"], ["delta"]),
        helper.make_node("Add", ["base", "delta"], ["y"]),
    ]
    f = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "bank",
        [
            helper.make_tensor_value_info("x", f, ["batch", IN]),
            helper.make_tensor_value_info("adapter_ids", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("up.A", f, ["slots", IN, "up.rank"]),
            helper.make_tensor_value_info("up.B", f, ["slots", "up.rank", OUT]),
        ],
        [helper.make_tensor_value_info("y", f, ["batch", OUT])],
        [numpy_helper.from_array(value, name) for name, value in {**stacks, "W": weight, "one": np.array([1])}.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    said = {"adapters": "bank", "tenants": {"built-in": 2}, "fingerprint": 1, "capacity": SLOTS - 1, "rank": RANK}
    text = manifest.dump(said)
    helper.set_model_props(model, {manifest.KEY: text})
    save(model, folder / "bank.onnx")
    for i, name in enumerate(NAMES):
        write(folder / f"{name}.onnx_adapter", factors(i, 1 + i % RANK))
    return folder, weight


def answer(bank, names, x=X):
    _, weight = bank
    rows = []
    for row, name in zip(x, names, strict=True):
        delta = 0
        if name is not None:
            f = factors(100, 2) if name == "built-in" else factors(int(name[1:]), 1 + int(name[1:]) % RANK)
            delta = row.astype(np.float64) @ f["up.A"].astype(np.float64) @ f["up.B"].astype(np.float64)
        rows.append(row.astype(np.float64) @ weight.astype(np.float64) + delta)
    return np.stack(rows)


def opened(bank, names=NAMES, **options) -> OrtSession:
    folder, _ = bank
    session = OrtSession(folder / "bank.onnx", threads=1, **options)
    for name in names:
        session.register(name, folder / f"{name}.onnx_adapter", check_base=False)
    return session


def check(session, bank, names, x=X):
    np.testing.assert_allclose(session.run({"x": x}, adapter_ids=names)["y"], answer(bank, names, x), 2e-5, 2e-5)


@pytest.mark.parametrize("binding", [False, True])
def test_mixed_batches(bank, binding):
    session = opened(bank, binding=binding)
    assert session.slots == {"built-in": 2}
    check(session, bank, ["t0", None, "t1", "built-in", "t0", "t1", None, "built-in"])
    assert session.slots == {"built-in": 2, "t0": 1, "t1": 3}
    check(session, bank, [None] * 8)
    check(session, bank, ["t1"], X[:1])
    for adapter in ("t1", None, "built-in"):
        got = session.run({"x": X}, adapter=adapter)["y"]
        np.testing.assert_allclose(got, answer(bank, [adapter] * 8), 2e-5, 2e-5)
    assert (session.stats.slot_fills, session.stats.slot_evictions, session.stats.loads) == (2, 0, 2)


def test_least_recently_used_tenants_make_room_and_the_graphs_own_stay(bank):
    session = opened(bank)
    for names, there, evictions in [
        (["t0", "t1"], {"t0", "t1"}, 0),
        (["t0", "t0"], {"t0", "t1"}, 0),
        (["t2", None], {"t0", "t2"}, 1),  # t1 was used longest ago
        (["t3", "t4"], {"t3", "t4"}, 3),
        (["t4", "t5"], {"t4", "t5"}, 4),  # t4 stays: the batch names it
        (["built-in", "t5"], {"t4", "t5"}, 4),
    ]:
        check(session, bank, names, X[:2])
        assert set(session.slots) == {"built-in", *there}
        assert session.stats.slot_evictions == evictions
    # Tenants out of their slots are still in memory: nothing is read again.
    check(session, bank, ["t0", "t1"], X[:2])
    assert session.stats.loads == 6 and session.stats.hits == 2


def test_a_byte_budget_reads_files_again(bank):
    folder, _ = bank
    size = opened(bank).load("t2", folder / "t2.onnx_adapter", replace=True, check_base=False).bytes
    session = opened(bank, max_bytes=size)
    for names in (["t2", "t5"], ["t0", "t1"], ["t2", "t5"]):
        check(session, bank, names, X[:2])
    assert session.stats.loads == 6 and session.stats.bytes <= size


def test_more_tenants_than_slots_in_one_batch(bank):
    session = opened(bank)
    for names, said in (
        (["t0", "t1", "t2"], r"3 tenants besides the graph's own 'built-in' and the graph has 3 slots for them: split"),
        (["t0", "t1", "t2", "built-in"], r"4 tenants and the graph has 3 slots"),
    ):
        with pytest.raises(fg.AdapterError, match=f"the batch names {said}"):
            session.run({"x": X[: len(names)]}, adapter_ids=names)
    assert session.stats.loads == 0
    session.unload("built-in")
    assert session.slots == {}
    check(session, bank, ["t0", "t1", "t2"], X[:3])
    assert set(session.slots.values()) == {1, 2, 3}
    check(opened(bank, capacity=9, rank=4), bank, [*NAMES, "built-in"])
    with pytest.raises(fg.AdapterError, match="own tenants take 2 slots, and rank 3"):
        opened(bank, capacity=1)


def test_a_graph_full_of_its_own_tenants(bank):
    session = opened(bank, names=[])
    for name in ("x", "y"):  # two more tenants that no file brings back
        session._bank._held[name, 0] = session._bank._free.pop()
    with pytest.raises(
        fg.AdapterError, match="no slot for 't0': the graph has 3, and its own 'built-in', 'x', 'y' keep"
    ):
        session.load("t0", bank[0] / "t0.onnx_adapter", check_base=False)
    assert session.registered == {}
    session.load("built-in", bank[0] / "t0.onnx_adapter", check_base=False, replace=True)


@pytest.mark.parametrize(
    ("ids", "error", "said"),
    [
        (["t0", "who"], fg.AdapterError, "no adapter 'who' is loaded; loaded: 't0', 't1'"),
        ([0, -1], fg.AdapterError, r"there is no slot -1; slots go from 0 \(no adapter\) to 3"),
        ([4, 0], fg.AdapterError, "there is no slot 4"),
        (np.array([0, -1]), fg.AdapterError, "there is no slot -1"),
        ([1, 0], fg.AdapterError, "nobody is in slot '1'; tenants: 'built-in' in 2"),
        ([1.0, 0], fg.AdapterError, "1.0 is neither a tenant's name, nor a slot, nor None"),
        ([True, 0], fg.AdapterError, "True is neither"),
        (["t0"], SessionError, "adapter_ids has 1 entries, the batch has 2 samples"),
        ([None] * 3, SessionError, "adapter_ids has 3 entries, the batch has 2 samples"),
        ("t0", SessionError, "adapter_ids='t0': give a list"),
        (7, SessionError, "adapter_ids=7: give a list"),
        (np.array(0), SessionError, "give a list"),
        (np.array([[0], [0]]), fg.AdapterError, r"\[0\] is neither"),
    ],
)
def test_ids_that_are_refused(bank, ids, error, said):
    session = opened(bank)
    with pytest.raises(error, match=said):
        session.run({"x": X[:2]}, adapter_ids=ids)
    assert session.slots == {"built-in": 2}
    check(session, bank, ["t0", "t1"], X[:2])


def test_ids_elsewhere(bank):
    session = opened(bank)
    with pytest.raises(SessionError, match="give adapter_ids as run"):
        session.run({"x": X, "adapter_ids": np.zeros(8, np.int64)})
    with pytest.raises(SessionError, match="not both"):
        session.run({"x": X}, adapter="t0", adapter_ids=["t0"] * 8)
    with pytest.raises(SessionError, match="give adapter_ids, one name"):
        session.run({"x": X}, adapter=["t0", "t1"])


def test_slot_numbers_hold_until_slots_change_hands(bank):
    session = opened(bank, names=[])
    folder, _ = bank
    for name in ("t0", "t1"):
        session.load(name, folder / f"{name}.onnx_adapter", check_base=False)
    slots = session.slots
    ids = np.array([slots["t1"], 0, slots["t0"], 2])
    want = answer(bank, ["t1", None, "t0", "built-in"], X[:4])
    np.testing.assert_allclose(session.run({"x": X[:4]}, adapter_ids=ids)["y"], want, 2e-5, 2e-5)
    mixed = ["t1", 0, slots["t0"], None]
    got = session.run({"x": X[:4]}, adapter_ids=mixed)["y"]
    np.testing.assert_allclose(got, answer(bank, ["t1", None, "t0", None], X[:4]), 2e-5, 2e-5)
    session.load("t2", folder / "t2.onnx_adapter", check_base=False)
    with pytest.raises(fg.AdapterError, match="1 have changed hands since the session began; use names"):
        session.run({"x": X[:4]}, adapter_ids=ids)
    check(session, bank, ["t1", "t2"], X[:2])


def test_replacing_and_unloading(bank):
    folder, _ = bank
    session = opened(bank)
    check(session, bank, ["t0", "t1"], X[:2])
    session.load("t0", folder / "t3.onnx_adapter", replace=True, check_base=False)
    got = session.run({"x": X[:2]}, adapter_ids=["t0", "t1"])["y"]
    np.testing.assert_allclose(got, answer(bank, ["t3", "t1"], X[:2]), 2e-5, 2e-5)
    session.unload("t1")
    with pytest.raises(fg.AdapterError, match="no adapter 't1'"):
        session.run({"x": X[:2]}, adapter_ids=["t0", "t1"])
    with pytest.raises(fg.AdapterError, match="the graph has a tenant 'built-in' already"):
        session.register("built-in", folder / "t4.onnx_adapter")
    session.register("built-in", folder / "t4.onnx_adapter", replace=True, check_base=False)
    got = session.run({"x": X[:1]}, adapter_ids=["built-in"])["y"]
    np.testing.assert_allclose(got, answer(bank, ["t4"], X[:1]), 2e-5, 2e-5)
    # A smaller adapter in a slot a larger one had: nothing of that one is left.
    small = opened(bank, names=["t2", "t0", "t3"])
    small.unload("built-in")
    for names in (["t2"], ["t0"], ["t3"], ["t0"]):
        check(small, bank, names * 2, X[:2])


def test_adapters_that_do_not_fit_a_slot(bank, tmp_path):
    session = opened(bank, names=[])
    wide = write(tmp_path / "wide.onnx_adapter", factors(1, RANK + 1))
    said = r"'up.A' is \(6, 4\) and a slot of the bank takes up to \(6, 3\): give OrtSession a larger rank"
    with pytest.raises(fg.AdapterError, match=said):
        session.load("wide", wide, check_base=False)
    arrays = factors(1, 2)
    del arrays["up.B"]
    with pytest.raises(fg.AdapterError, match="incomplete"):
        session.load("half", write(tmp_path / "half.onnx_adapter", arrays), check_base=False)
    arrays = factors(1, 2)
    arrays["up.A"] = arrays["up.A"][:, :1].copy()
    with pytest.raises(fg.AdapterError, match="different ranks"):
        session.load("odd", write(tmp_path / "odd.onnx_adapter", arrays), check_base=False)
    assert session.slots == {"built-in": 2} and session.registered == {}


@pytest.mark.parametrize("binding", [False, True])
def test_threads_with_more_tenants_than_slots(bank, binding):
    """Slots are rewritten all the time, and never under a run that reads them."""
    session = opened(bank, binding=binding)
    jobs = []
    for i in range(300):
        rng = random.Random(i)
        some = rng.sample(NAMES, rng.choice([1, 2])) + [None, "built-in"]
        jobs.append([rng.choice(some) for _ in range(8)])

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda names: session.run({"x": X}, adapter_ids=names)["y"], jobs))
    for names, got in zip(jobs, results, strict=True):
        np.testing.assert_allclose(got, answer(bank, names), 2e-5, 2e-5)
    stats = session.stats
    assert stats.loads == 7 and stats.slot_evictions > 20
    assert stats.slot_fills == stats.slot_evictions + 2


def test_a_slot_in_use_is_waited_for(bank):
    session = opened(bank)
    held = session._bank.batch(["t0", "t1"])
    ids, _ = held.__enter__()
    assert sorted(ids.tolist()) == [1, 3]
    done = threading.Event()

    def other() -> None:
        check(session, bank, ["t2"], X[:1])
        done.set()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(other)
        assert not done.wait(0.2) and set(session.slots) == {"t0", "t1", "built-in"}
        session.unload("t0")  # while a run uses it: the slot is not free yet
        assert not done.wait(0.2)
        held.__exit__(None, None, None)
        future.result(10)
    assert set(session.slots) in ({"t1", "t2", "built-in"}, {"t2", "built-in"})
