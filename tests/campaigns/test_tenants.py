"""Tenants, threads and evictions for minutes, every answer checked, and memory flat: the torch bank and onnxruntime's.

`pytest -m campaign tests/campaigns/test_tenants.py -s`: seconds each; `FXGRAFT_CAMPAIGN_MINUTES=5` for five minutes
each, `FXGRAFT_CAMPAIGN_SCALE=10` for ten times the default.

Askers name a tenant, a mover gives tenants other values, removes and adds them. An answer is right if it is, row by
row, what a version alone gives that the tenant had between the beginning and the end of the call.
"""

from __future__ import annotations

import os
import random
import resource
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

import fxgraft as fg

pytestmark = [pytest.mark.campaign, pytest.mark.filterwarnings("ignore")]

SCALE = float(os.environ.get("FXGRAFT_CAMPAIGN_SCALE", "1"))
SECONDS = 60 * float(os.environ.get("FXGRAFT_CAMPAIGN_MINUTES", 0.1 * SCALE))
NAMES = [f"t{i}" for i in range(8)]
VERSIONS = 3
LAYERS = 4
GROWTH = 48  # MB that a run may need more at its end than after its first third


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x.transpose(0, 1)).transpose(0, 1))  # the samples are not in front
        return x


@dataclass
class History:
    """Which version of a tenant was asked for, and which is there: counted up, `None` for a removal."""

    versions: list[int | None] = field(default_factory=list)
    done: int = 0  # changes that are through


@dataclass
class Books:
    histories: dict[str, History]
    stop: threading.Event = field(default_factory=threading.Event)
    wrong: list[str] = field(default_factory=list)
    calls: int = 0
    rows: int = 0
    refused: int = 0
    moves: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def change(self, name: str, version: int | None, do) -> None:
        history = self.histories[name]
        history.versions.append(version)
        do()
        history.done = len(history.versions)
        self.moves += 1

    def possible(self, name: str, since: int) -> set[int | None]:
        """Versions the tenant may have had since `done` was `since`: that one, and all that were begun later."""
        return set(self.histories[name].versions[max(since - 1, 0) :])


def adapters(model: nn.Module, scale: float) -> dict[tuple[str, int], nn.Module]:
    found = {}
    for name in NAMES:
        for version in range(VERSIONS):
            one = fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets=["re:layers.*"])).eval()
            state = fg.adapter_state(one)
            fg.swap(one, {key: torch.randn_like(value) * scale for key, value in state.items()})
            found[name, version] = one
    return found


def peak() -> float:
    """The most memory this process has had, in MB."""
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value / 2**20 if sys.platform == "darwin" else value / 2**10


def serve(books: Books, ask, move, askers: int) -> None:
    """Let threads ask and one move until the time is over; memory after a third of it is all there is to be."""
    errors: list[BaseException] = []

    def until_stopped(step, seed):
        chance = random.Random(seed)
        try:
            while not books.stop.is_set():
                step(chance)
        except BaseException as error:
            errors.append(error)
            books.stop.set()
            raise

    threads = [threading.Thread(target=until_stopped, args=(ask, i)) for i in range(askers)]
    threads.append(threading.Thread(target=until_stopped, args=(move, -1)))
    for thread in threads:
        thread.start()
    books.stop.wait(SECONDS / 3)
    before = peak()
    books.stop.wait(SECONDS * 2 / 3)
    books.stop.set()
    for thread in threads:
        thread.join()
    after = peak()
    print(
        f"\n{books.calls} calls, {books.rows} rows, {books.moves} moves, {books.refused} refused, "
        f"{len(books.wrong)} wrong; peak {before:.0f} MB after a third of {SECONDS:.0f} s, {after:.0f} MB at the end"
    )
    assert not errors, errors
    assert not books.wrong, books.wrong[:5]
    assert books.calls > 20 and books.moves > 5
    assert after - before < GROWTH


def check(books: Books, names, since, got, alone) -> None:
    """Every row against the versions of its tenant alone: `alone[name, version]` is the whole batch of that version."""
    for i, name in enumerate(names):
        allowed = [(name, v) for v in books.possible(name, since[name])] if name else [(None, 0)]
        if not any(key in alone and np.allclose(got[i], alone[key][i], rtol=1e-4, atol=1e-4) for key in allowed):
            books.wrong.append(f"row {i} of {name!r}, versions {allowed}")
    with books.lock:
        books.calls += 1
        books.rows += len(names)


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_a_bank_of_torch(form):
    torch.manual_seed(0)
    model = Deep().double().eval()
    own = adapters(model, 0.1)
    x = torch.randn(6, 5, 24, dtype=torch.float64)
    with torch.no_grad():
        alone = {key: one(x).numpy() for key, one in own.items()} | {(None, 0): model(x).numpy()}
    books = Books({name: History() for name in NAMES})
    start = NAMES[:4]
    banked = fg.bank(model, {name: own[name, 0] for name in start}, capacity=5)
    for name in start:
        books.change(name, 0, lambda: None)
    run = fg.compile(banked) if form == "compiled" else banked
    with torch.no_grad():
        run(x, adapter_ids=fg.adapter_ids(banked, [None] * 6))
        run(x)

    def ask(chance):
        some = [*fg.tenants(banked), None] if chance.random() < 0.9 else NAMES
        names = [chance.choice(some) for _ in range(6)]
        if chance.random() < 0.1:
            names = [None] * 6
        since = {name: books.histories[name].done for name in names if name}
        try:
            given = {"adapter_ids": fg.adapter_ids(banked, names)} if any(names) else {}
            if chance.random() < 0.3:
                time.sleep(chance.random() * 0.002)  # ids that are old when they are used
            with torch.no_grad():
                got = run(x, **given)
        except fg.AdapterError as error:
            assert "no tenant" in str(error) or "when these ids were made" in str(error), error
            books.refused += 1
            return
        check(books, names, since, got.numpy(), alone)

    def move(chance):
        name, version = chance.choice(NAMES), chance.randrange(VERSIONS)
        there = fg.tenants(banked)
        if name in there and chance.random() < 0.4:
            books.change(name, None, lambda: fg.remove_tenant(banked, name))
        elif name in there or len(there) < 5:
            tenant = own[name, version] if chance.random() < 0.5 else fg.adapter_state(own[name, version])
            books.change(name, version, lambda: fg.add_tenant(banked, name, tenant))

    serve(books, ask, move, askers=3)


@pytest.mark.parametrize("binding", [False, True])
def test_a_bank_of_onnxruntime(tmp_path, binding):
    torch.manual_seed(0)
    model = Deep().eval()
    own = adapters(model, 0.1)
    x = torch.randn(6, 5, 24)
    with torch.no_grad():
        alone = {key: one(x).numpy() for key, one in own.items()} | {(None, 0): model(x).numpy()}
    files = {key: fg.export_ort_adapter(one, tmp_path / f"{key[0]}-{key[1]}.onnx_adapter") for key, one in own.items()}
    bank = fg.bank(model, {"own": own["t0", 0]})
    fg.export_onnx(bank, tmp_path / "bank.onnx", (x,), adapters="bank", capacity=6, rank=2)
    session = fg.OrtSession(tmp_path / "bank.onnx", threads=1, binding=binding)
    session.unload("own")
    books = Books({name: History() for name in NAMES})
    for name in NAMES:
        books.change(name, 0, lambda name=name: session.register(name, files[name, 0]))
    array = x.numpy()

    def ask(chance):
        some = [*chance.sample(NAMES, 2), None]
        names = [chance.choice(some) for _ in range(6)]
        since = {name: books.histories[name].done for name in names if name}
        try:
            (got,) = session.run({"x": array}, adapter_ids=names).values()
        except fg.AdapterError as error:
            assert "no adapter" in str(error), error
            books.refused += 1
            return
        check(books, names, since, got, alone)

    def move(chance):
        time.sleep(0.002)
        name, version = chance.choice(NAMES), chance.randrange(VERSIONS)
        if name not in session.registered:
            books.change(name, version, lambda: session.register(name, files[name, version]))
        elif chance.random() < 0.3:
            books.change(name, None, lambda: session.unload(name))
        else:
            books.change(name, version, lambda: session.load(name, files[name, version], replace=True))

    serve(books, ask, move, askers=3)
