"""The examples: the asset cache (with a wheel built here, no network), the quickstart's parts, and one real run."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # the examples are scripts and import each other as such

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

import assets  # noqa: E402
import quickstart  # noqa: E402
import transformers  # noqa: E402

import fxgraft as fg  # noqa: E402


# -- assets --------------------------------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a pip that sees one local folder and no index."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("FXGRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in [n for n in os.environ if n.startswith("PIP_") and n != "PIP_CONFIG_FILE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return tmp_path / "cache"


def build_wheel(index: Path, text: str = "hello") -> assets.Wheel:
    """Write a wheel `tiny-asset` with two data files, and describe it as `assets` does."""
    path = index / "tiny_asset-1.0-py3-none-any.whl"
    info = "tiny_asset-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_asset/data/wanted.txt", text)
        archive.writestr("tiny_asset/data/sub/also.txt", "also")
        archive.writestr("tiny_asset/data/unwanted.bin", "x" * 100)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return assets.Wheel("tiny-asset", "1.0", digest, 1, "tiny_asset/data", ("wanted.txt", "sub/also.txt"))


def entries(folder: Path) -> list[str]:
    """Every file and folder below a folder, hidden ones included."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) if folder.exists() else []


def test_fetch_unpacks_only_what_is_named_and_downloads_once(cache, capsys):
    wheel = build_wheel(cache.parent / "index")
    folder = assets.fetch(wheel)
    assert (folder / "wanted.txt").read_text() == "hello"
    assert entries(cache) == [f"tiny-asset-1.0{tail}" for tail in ("", "/sub", "/sub/also.txt", "/wanted.txt")]
    assert "Downloading tiny-asset==1.0" in capsys.readouterr().out
    (cache.parent / "index" / "tiny_asset-1.0-py3-none-any.whl").unlink()
    assert assets.fetch(wheel) == folder  # a second download could not succeed any more
    assert capsys.readouterr().out == ""


def test_fetch_refuses_another_file_than_the_published_one(cache):
    wheel = build_wheel(cache.parent / "index")
    build_wheel(cache.parent / "index", text="tampered")
    with pytest.raises(assets.AssetError, match="not the published file"):
        assets.fetch(wheel)
    assert entries(cache) == []


def test_fetch_tells_what_could_not_be_downloaded(cache):
    wheel = assets.Wheel("no-such-asset", "1.0", "", 1, "", ())
    with pytest.raises(assets.AssetError) as raised:
        assets.fetch(wheel)
    text = str(raised.value)
    assert "no-such-asset==1.0" in text and str(cache) in text and "No matching distribution" in text
    assert entries(cache) == []


def test_fetch_tells_which_file_the_wheel_lacks(cache):
    whole = build_wheel(cache.parent / "index")
    wheel = assets.Wheel(whole.name, whole.version, whole.sha256, 1, whole.prefix, ("wanted.txt", "absent.txt"))
    with pytest.raises(assets.AssetError, match=r"absent\.txt"):
        assets.fetch(wheel)
    assert entries(cache) == []  # not even the file that was there


def test_create_once_keeps_nothing_of_an_interrupted_fill(tmp_path):
    target = tmp_path / "asset"

    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets.create_once(target, interrupted)
    assert entries(tmp_path) == []
    assets.create_once(target, lambda folder: (folder / "file").write_text("whole"))
    assert entries(tmp_path) == ["asset", "asset/file"]


def test_create_once_keeps_the_first_of_two_processes(tmp_path):
    target = tmp_path / "asset"

    def late(folder: Path) -> None:
        assets.create_once(target, lambda other: (other / "file").write_text("first"))
        (folder / "file").write_text("second")

    assets.create_once(target, late)
    assert (target / "file").read_text() == "first"
    assert entries(tmp_path) == ["asset", "asset/file"]


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("FXGRAFT_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
    monkeypatch.setenv("FXGRAFT_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert assets.cache_dir() == tmp_path / "home" / ".cache" / "fxgraft"


def test_sarcasm_returns_each_headline_once(cache):
    folder = cache / f"{assets.SARCASM.name}-{assets.SARCASM.version}"
    folder.mkdir(parents=True)
    rows = [("a", "1"), ("b", "0"), ("a", "1"), ("c", "1")]
    lines = [json.dumps({"input": [{}, {"content": t}], "ideal": y}) for t, y in rows]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    assert assets.sarcasm() == (["a", "b", "c"], [1, 0, 1])


# -- the quickstart's parts ------------------------------------------------------------------------------------------
def headlines(count: int, seed: int = 0) -> quickstart.Headlines:
    """Random token rows of 3 to 12 tokens; sarcastic ones hold token 7, serious ones token 8."""
    rng = random.Random(seed)
    labels = [rng.randrange(2) for _ in range(count)]
    tokens = [[1, 7 if y else 8, *(rng.randrange(10, 30) for _ in range(rng.randrange(1, 11)))] for y in labels]
    return quickstart.Headlines([f"text {i}" for i in range(count)], tokens, torch.tensor(labels))


def test_split_is_disjoint_and_the_same_every_time():
    parts = quickstart.split(100, [20, 10, 50])
    assert [len(part) for part in parts] == [20, 10, 50]
    assert len({row for part in parts for row in part}) == 80
    assert parts == quickstart.split(100, [20, 10, 50])
    # Other amounts to train on must leave the held-out rows alone.
    assert quickstart.split(100, [20, 10, 5])[0] == parts[0]
    with pytest.raises(SystemExit, match="101 headlines"):
        quickstart.split(100, [51, 50])


def test_training_batches_hold_every_row_once_and_similar_lengths():
    rng = random.Random(3)
    lengths = [rng.randrange(5, 33) for _ in range(1001)]
    batches = quickstart.training_batches(lengths, 32, random.Random(0))
    assert sorted(row for batch in batches for row in batch) == list(range(1001))
    assert max(len(batch) for batch in batches) == 32
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)
    assert batches == quickstart.training_batches(lengths, 32, random.Random(0))
    assert batches != quickstart.training_batches(lengths, 32, random.Random(1))
    widths = [max(lengths[row] for row in batch) for batch in batches]
    assert widths != sorted(widths)  # short headlines first would be a curriculum nobody asked for


def test_learning_rate_rises_then_falls_to_almost_zero():
    factors = [quickstart.warmup_then_linear(step, 200) for step in range(200)]
    assert factors[0] == pytest.approx(1 / 12) and max(factors) == factors[11] == 1.0
    assert factors[:12] == sorted(factors[:12]) and factors[12:] == sorted(factors[12:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert quickstart.warmup_then_linear(0, 1) == 1.0


def test_batch_pads_to_its_longest_row():
    data = quickstart.Headlines(["a", "b", "c"], [[5, 6], [5, 6, 7], [5] * 9], torch.tensor([0, 1, 0]))
    batch = data.batch([1, 0])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 6, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_collect_returns_the_headlines_own_order():
    data = headlines(150)

    def second_token(batch):
        assert len(batch["input_ids"]) <= quickstart.EVAL_BATCH
        return batch["input_ids"][:, 1]

    assert quickstart.collect(second_token, data).tolist() == [row[1] for row in data.tokens]


@pytest.mark.parametrize(
    ("quota", "expected"), [("150000 100000", 1), ("300000 100000", 3), ("max 100000", 6), ("", 6)]
)
def test_usable_cores_follow_the_containers_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self: quota)
    assert quickstart.usable_cores() == expected


@pytest.mark.parametrize("text", ["0", "-3", "many"])
def test_sizes_on_the_command_line_are_positive(text, capsys):
    with pytest.raises(SystemExit):
        quickstart.parse(["--epochs", text])
    assert "--epochs" in capsys.readouterr().err


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def tiny_adapted() -> tuple[torch.nn.Module, torch.nn.Module]:
    base = tiny_model()
    spec = fg.Spec(fg.UniLoRA(rank=2, vector_length=64, seed=0), targets=["query", "value"], train=["classifier"])
    return base, fg.rewrite(base, spec)


def training(*options: str) -> argparse.Namespace:
    return quickstart.parse(["--batch-size", "16", "--epochs", "3", *options])


def test_training_learns_a_plain_task_and_leaves_the_base_alone():
    base, adapted = tiny_adapted()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    data = headlines(400)
    predict = quickstart.torch_predict(adapted)
    start = quickstart.accuracy(quickstart.collect(predict, data), data.labels)
    seconds = quickstart.train_adapter(adapted, data, headlines(32, 1), training("--head-lr", "2e-2", "--epochs", "6"))
    assert seconds > 0
    end = quickstart.accuracy(quickstart.collect(predict, data), data.labels)
    assert start < 0.7 < 0.9 < end
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("still", ["vector", "head"])
def test_vector_and_head_have_learning_rates_of_their_own(still):
    _, adapted = tiny_adapted()
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(name.endswith(".theta") for name in before) == 1 and len(before) == 3
    quickstart.train_adapter(adapted, headlines(32), headlines(16, 1), training(f"--{still}-lr", "0"))
    changed = {name for name, p in adapted.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.endswith(".theta") != (still == "vector")}


def test_latencies_are_paired_with_the_first_variant():
    found = quickstart.latencies({"base": lambda b: b["x"], "slow": lambda b: time.sleep(0.02)}, {"x": torch.ones(1)})
    assert found["base"][1] == 1.0
    assert found["slow"][0] >= 20 and found["slow"][1] > 10


# -- the whole quickstart --------------------------------------------------------------------------------------------
@pytest.mark.real
@pytest.mark.slow
def test_quickstart_runs_as_the_readme_says(tmp_path):
    """Small sizes, real model and data: the program's own figures must hold together."""
    sizes = ["--train-size", "512", "--validation-size", "64", "--test-size", "200", "--epochs", "1"]
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), *sizes, "--out", str(out)],
        cwd=tmp_path, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr and "Loading weights" not in done.stderr
    figures = json.loads((out / "figures.json").read_text())
    rows = {row["name"]: row for row in figures["results"]}
    assert figures["vector"] == 2304 and figures["trainable"] == 2304 + 384 * 2 + 2
    assert figures["adapter_bytes"] == sum(f.stat().st_size for f in (out / "adapter").iterdir()) < 20_000
    assert figures["onnx_adapter_bytes"] == (out / "sarcasm.onnx_adapter").stat().st_size
    scored = [row for row in rows.values() if row["difference"] is not None]
    assert len(scored) == 4
    # The four are one function computed four ways: at most a headline on the very boundary may flip.
    assert max(row["difference"] for row in scored) < 1e-4
    assert max(row["accuracy"] for row in scored) - min(row["accuracy"] for row in scored) <= 1 / 200
    assert all(row["ratio"] > 0 for row in scored)
    assert "bit for bit: yes" in done.stdout


# -- many tenants --------------------------------------------------------------------------------------------------
def serving(monkeypatch, tmp_path, *extra: str) -> None:
    """Run the example on a small random encoder and made-up headlines."""
    import serve_tenants

    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=2
    )
    rng = random.Random(0)
    tokens = [[1, *(rng.randrange(3, 60) for _ in range(rng.randrange(2, 9))), 2] for _ in range(20)]
    data = quickstart.Headlines([""] * 20, tokens, torch.zeros(20, dtype=torch.long))
    monkeypatch.setattr(serve_tenants, "minilm_dir", lambda: tmp_path)
    monkeypatch.setattr(serve_tenants, "read_headlines", lambda folder, sizes: [data])
    monkeypatch.setattr(
        transformers.AutoModelForSequenceClassification,
        "from_pretrained",
        lambda folder, num_labels: transformers.BertForSequenceClassification(config),
    )
    monkeypatch.setattr(
        serve_tenants, "METHODS", (fg.LoRA(rank=3), fg.LoRA(rank=1), fg.UniLoRA(rank=2, vector_length=64))
    )
    monkeypatch.setattr(sys, "argv", ["serve_tenants.py", "--threads", "1", "--out", str(tmp_path / "out"), *extra])
    serve_tenants.main()


def test_tenants_come_and_go_and_every_answer_is_checked(monkeypatch, tmp_path, capsys):
    serving(monkeypatch, tmp_path, "--tenants", "6", "--slots", "3", "--requests", "12", "--batch", "2")
    text = capsys.readouterr().out
    assert "24 headlines in 12 mixed batches from 2 threads" in text
    assert len(list((tmp_path / "out").glob("tenant-*.onnx_adapter"))) == 6
    assert "tenants that had to leave one" in text and "difference from PyTorch" in text


def test_a_wrong_answer_is_not_served_silently(monkeypatch, tmp_path):
    import serve_tenants

    good = serve_tenants.tenant
    calls = []

    def other(base, index):  # from the check on, PyTorch has other values
        calls.append(index)
        return good(base, index + (100 if len(calls) > 7 else 0))

    monkeypatch.setattr(serve_tenants, "tenant", other)
    with pytest.raises(SystemExit, match="answers differ from PyTorch's"):
        serving(monkeypatch, tmp_path, "--tenants", "6", "--slots", "3", "--requests", "12", "--batch", "2")
