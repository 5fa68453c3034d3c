"""Writers killed at random moments leave one whole adapter: the last one finished, or the next.

A writer writes adapters 0 to 19 over the same files in turn. They differ in values, rank and alpha, so that files of
two of them would show.

`pytest -s -m campaign tests/campaigns/test_kills.py`: 200 kills, `FXGRAFT_CAMPAIGN_SCALE=2` for twice as many.
"""

import itertools
import os
import random
import signal
import time

import pytest
import torch
from torch import nn

import fxgraft as fg
from fxgraft.exporters.adapterfiles.adapter_format import read_adapter

SCALE = float(os.environ.get("FXGRAFT_CAMPAIGN_SCALE", "1"))
WRITERS = ("native", "native with a head", "peft", "onnx_adapter", "onnx_adapter with a frozen part")
STEPS = 20

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(x))))


def base():
    torch.manual_seed(0)
    return Net().eval()


def numbered(step, writer):
    rank, alpha = 4 + step % 2, 3.0 + step % 2
    method = fg.LoRAXS(rank, alpha) if "frozen" in writer else fg.LoRA(rank, alpha)
    adapted = fg.rewrite(base(), fg.Spec(method, ["up", "down"], train=["head"] if "head" in writer else []))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.fill_((step + 1) / 100)
    return adapted


def write(adapted, path, writer):
    if "onnx" in writer:
        frozen = "frozen" in writer
        fg.export_ort_adapter(adapted, path, expanded=not frozen, share_frozen=frozen)
    else:
        fg.save_adapter(adapted, path, format="peft" if writer == "peft" else "fxgraft")


def read(path, writer):
    """What a reader gets: the tensors, and the method."""
    if "onnx" in writer:
        content = read_adapter(path)
        return content.values, content.described
    loaded = fg.load_adapter(base(), path)
    return fg.adapter_state(loaded), fg.rewriter.state.record_of(loaded, "default").groups[0].method


def same(one, other):
    (ours, method), (theirs, other_method) = one, other
    alike = method == other_method and set(ours) == set(theirs)
    return alike and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def killed(ready, path, writer, start, delay):
    """Kill a process after `delay` seconds of writing from step `start` on; the last step it finished."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        for step in itertools.count(start):
            write(ready[step % STEPS], path, writer)
            os.write(into, bytes([step % STEPS]))
    os.close(into)
    done = os.read(out, 1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(out, 4096):
        done = more
    os.close(out)
    return done[-1]


def kills(tmp_path, writer, times, seed):
    rng = random.Random(seed)
    path = tmp_path / ("a.onnx_adapter" if "onnx" in writer else "a")
    ready = [numbered(step, writer) for step in range(STEPS)]
    expected = []
    for step in range(STEPS):
        example = tmp_path / f"example{step}" / path.name
        example.parent.mkdir()
        write(ready[step], example, writer)
        expected.append(read(example, writer))
    counts = {"the finished": 0, "the next": 0, "cut short": 0}
    for _ in range(times):
        last = killed(ready, path, writer, rng.randrange(STEPS), rng.uniform(0.0, 0.05))
        home = path if path.is_dir() else tmp_path
        counts["cut short"] += any(p.name.startswith(".") for p in home.iterdir())
        found = read(path, writer)
        if same(found, expected[last]):
            counts["the finished"] += 1
        else:
            assert same(found, expected[(last + 1) % STEPS]), f"{writer}: no adapter that was written"
            counts["the next"] += 1
    write(ready[0], path, writer)
    assert not [p.name for p in home.iterdir() if p.name.startswith(".")], "what killed writers left was not cleaned"
    return counts


@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_writer_leaves_one_whole_adapter(tmp_path, writer):
    kills(tmp_path, writer, 2, seed=0)


@pytest.mark.campaign
@pytest.mark.parametrize("writer", WRITERS)
def test_kills_over_every_writer(tmp_path, writer):
    counts = kills(tmp_path, writer, int(40 * SCALE), seed=1)
    print(f"\n{writer}: {counts}")
    assert counts["cut short"] > 0, "no writer was killed at work"


@pytest.mark.campaign
@pytest.mark.parametrize("writer", ["native", "native with a head", "peft"])
def test_readers_beside_a_writer(tmp_path, writer):
    """Another process writes all the time; every read is one of its adapters, and none is an error."""
    ready, path = [numbered(step, writer) for step in range(STEPS)], tmp_path / "a"
    expected = []
    for adapted in ready:
        write(adapted, path, writer)
        expected.append(read(path, writer))
    child = os.fork()
    if child == 0:
        for step in itertools.count():
            write(ready[step % STEPS], path, writer)
    seen = set()
    try:
        for _ in range(int(500 * SCALE)):
            found = read(path, writer)
            fits = [step for step in range(STEPS) if same(found, expected[step])]
            assert fits, "files of two adapters"
            seen.update(fits)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(f"\n{writer}: {len(seen)} adapters seen in {int(500 * SCALE)} reads")
    assert len(seen) > 1
