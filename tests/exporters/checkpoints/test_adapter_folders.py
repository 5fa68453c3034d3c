"""The two files of an adapter folder are one adapter for every reader: while they are written, after a kill, when they
are damaged or changed."""

import json
import os
import shutil
import threading

import pytest
import torch
from adapter_files import CONFIG, WEIGHTS
from safetensors.torch import load_file, save_file
from small_models import perturb

import fxgraft as fg

FORMATS = ["fxgraft", "peft"]


def made(mlp, rank, value, alpha=8):
    """An adapter whose config and values both say which it is."""
    adapted = fg.rewrite(mlp, fg.Spec(fg.LoRA(rank, alpha), ["up", "down"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)
    return adapted


@pytest.mark.parametrize("format", FORMATS)
def test_a_writer_killed_between_the_two_files(mlp, tmp_path, format):
    """Rank and alpha of the new adapter stand in the tensors' file, which is there first."""
    x = torch.randn(3, 7)
    old, new = made(mlp, 2, 0.1), made(mlp, 2, 0.2, alpha=3)
    fg.save_adapter(old, tmp_path / "a", format=format)
    config = (tmp_path / "a" / CONFIG).read_bytes()
    fg.save_adapter(new, tmp_path / "a", format=format)
    (tmp_path / "a" / CONFIG).write_bytes(config)
    assert torch.equal(fg.load_adapter(mlp, tmp_path / "a")(x), new(x))
    # and what is written next is whole again
    fg.save_adapter(old, tmp_path / "a", format=format)
    assert torch.equal(fg.load_adapter(mlp, tmp_path / "a")(x), old(x))


@pytest.mark.parametrize("format", FORMATS)
def test_a_reader_beside_a_writer_sees_the_old_or_the_new_one(mlp, tmp_path, format):
    x = torch.randn(3, 7)
    models = [made(mlp, 2, 0.1), made(mlp, 3, 0.2, alpha=3)]
    expected = [model(x) for model in models]
    fg.save_adapter(models[0], tmp_path / "a", format=format)
    done = threading.Event()

    def writing():
        for step in range(60):
            fg.save_adapter(models[step % 2], tmp_path / "a", format=format)
        done.set()

    thread = threading.Thread(target=writing)
    thread.start()
    seen = [0, 0]
    try:
        while not done.is_set():
            found = fg.load_adapter(mlp, tmp_path / "a")(x)
            which = [torch.equal(found, y) for y in expected]
            assert any(which)
            seen[which.index(True)] += 1
    finally:
        thread.join()
    assert sum(seen)


def test_writers_of_one_folder_take_turns(mlp, tmp_path):
    x = torch.randn(3, 7)
    models = [made(mlp, 2, 0.1), made(mlp, 3, 0.2, alpha=3)]

    def writing(model):
        for _ in range(15):
            fg.save_adapter(model, tmp_path / "a")

    threads = [threading.Thread(target=writing, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = fg.load_adapter(mlp, tmp_path / "a")(x)
    assert any(torch.equal(found, model(x)) for model in models)
    assert sorted(os.listdir(tmp_path / "a")) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("format", FORMATS)
def test_config_and_tensors_of_two_adapters(mlp, tmp_path, format):
    fg.save_adapter(made(mlp, 2, 0.1), tmp_path / "a", format=format)
    fg.save_adapter(made(mlp, 2, 0.1, alpha=3), tmp_path / "b", format=format)
    shutil.copy(tmp_path / "a" / CONFIG, tmp_path / "b" / CONFIG)
    with pytest.raises(fg.CheckpointError, match="is not what it was saved with"):
        fg.load_adapter(mlp, tmp_path / "b")


@pytest.mark.parametrize("format", FORMATS)
def test_a_config_written_anew_by_another_program(mlp, tmp_path, format):
    """Order, spaces, line ends, a byte order mark and what only describes may change."""
    x, adapted = torch.randn(3, 7), made(mlp, 2, 0.1)
    fg.save_adapter(adapted, tmp_path, format=format)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["versions" if format == "fxgraft" else "base_model_name_or_path"] = "x"
    text = json.dumps(dict(reversed(config.items()))).replace(",", ",\r\n")
    (tmp_path / CONFIG).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert torch.equal(fg.load_adapter(mlp, tmp_path)(x), adapted(x))


@pytest.mark.parametrize("format", FORMATS)
def test_one_changed_bit_of_the_tensors(mlp, tmp_path, format):
    fg.save_adapter(made(mlp, 2, 0.1), tmp_path, format=format)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-2] ^= 1
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(fg.CheckpointError, match=r"damaged or was changed.*save_file"):
        fg.load_adapter(mlp, tmp_path)
    # tensors written without the record are anybody's
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    fg.load_adapter(mlp, tmp_path)


def test_files_have_the_mode_of_the_umask(mlp, tmp_path):
    before = os.umask(0o027)
    try:
        fg.save_adapter(made(mlp, 2, 0.1), tmp_path / "a")
        fg.export_ort_adapter(made(mlp, 2, 0.1), tmp_path / "a.onnx_adapter")
    finally:
        os.umask(before)
    files = [tmp_path / "a" / CONFIG, tmp_path / "a" / WEIGHTS, tmp_path / "a.onnx_adapter"]
    assert [oct(file.stat().st_mode & 0o777) for file in files] == ["0o640"] * 3


def test_what_a_killed_writer_left_is_removed(mlp, tmp_path):
    folder = tmp_path / "a"
    left = [folder / ".adapter-abcd_123", tmp_path / ".a.onnx_adapter.abcd_123"]
    others = [folder / ".adapter-notes", tmp_path / ".b.onnx_adapter.abcd_123"]
    for place in left + others:
        place.mkdir(parents=True)
        (place / WEIGHTS).write_bytes(b"half")
    adapted = perturb(fg.rewrite(mlp, fg.Spec(fg.LoRA(2), ["up"])))
    fg.save_adapter(adapted, folder)
    fg.export_ort_adapter(adapted, tmp_path / "a.onnx_adapter")
    assert not any(place.exists() for place in left) and all((place / WEIGHTS).exists() for place in others)


def test_the_folder_of_a_living_writer_is_not_removed(tmp_path):
    from fxgraft.backends.artifact.staging import workspace

    with workspace(".adapter-", tmp_path) as first:
        (first / "x").write_text("x")
        with workspace(".adapter-", tmp_path) as second:
            assert first != second and (first / "x").read_text() == "x"
    assert not list(tmp_path.iterdir())


NO_PATHS = ["a\0b", None, 3, b"x", "x" * 300, "/dev/null/x"]


@pytest.mark.parametrize("path", NO_PATHS)
def test_what_is_no_path(mlp, path):
    adapted = made(mlp, 2, 0.1)
    for attempt in (
        lambda: fg.save_adapter(adapted, path),
        lambda: fg.save_adapter(adapted, path, format="peft"),
        lambda: fg.load_adapter(mlp, path),
        lambda: fg.export_ort_adapter(adapted, path),
        lambda: fg.load_package(path),
        lambda: fg.swap(adapted, path),
    ):
        with pytest.raises(fg.FxgraftError):
            attempt()


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def endless(file):
    file.unlink()
    file.symlink_to("/dev/zero")


def huge(file):
    os.truncate(file, 1 << 30)  # without a byte on the disk


def many(file):
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"x{i}": nothing for i in range(140_000)}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)


PLACES = {
    "a pipe as config": (CONFIG, pipe, "not a regular file"),
    "a pipe as weights": (WEIGHTS, pipe, "not a regular file"),
    "a device as config": (CONFIG, endless, "not a regular file"),
    "a device as weights": (WEIGHTS, endless, "not a regular file"),
    "a loop": (CONFIG, lambda f: (f.unlink(), f.symlink_to(f.name)), "cannot be read"),
    "a config of 1 GB": (CONFIG, huge, "1073741824 bytes"),
    "weights with 1 GB behind them": (WEIGHTS, huge, "damaged"),
    "more tensors than any adapter has": (WEIGHTS, many, "140000 tensors"),
    "nested lists": (CONFIG, lambda f: f.write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "too deeply"),
    "5000 digits": (CONFIG, lambda f: f.write_text('{"a": ' + "9" * 5000 + "}"), "5000 digits"),
    "UTF-16": (CONFIG, lambda f: f.write_bytes(f.read_text().encode("utf-16")), "Save it as UTF-8"),
    "a key twice": (CONFIG, lambda f: f.write_text('{"a": 1, "a": 2}'), "'a' stands twice"),
    "not a number": (CONFIG, lambda f: f.write_text('{"a": NaN}'), "no finite number"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and devices")
@pytest.mark.parametrize("case", PLACES)
def test_what_nobody_should_read(mlp, tmp_path, case):
    name, change, says = PLACES[case]
    fg.save_adapter(made(mlp, 2, 0.1), tmp_path)
    change(tmp_path / name)
    with pytest.raises(fg.CheckpointError, match=says):
        fg.load_adapter(mlp, tmp_path)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({"lora_nums": 2**24, "r": 1, "lora_alpha": 1}, {"base_model.model.up.lora_route.weight": (2, 7)}),
        (
            {"unshared_r": 0, "r": 2, "lora_alpha": 1, "enable_lora_rotation": False, "reduce_lora_A_x": 2**40,
             "reduce_lora_B_x": 2**40},
            {"base_model.model.up.lora_A.weight": (2, 1), "base_model.model.up.lora_B.weight": (1, 2)},
        ),
        ({"peft_type": "UNILORA", "theta_d_length": 2**50, "r": 2}, {"base_model.unilora_theta_d": (5,)}),
        ({"peft_type": "UNILORA", "theta_d_length": 5, "r": 2**40}, {"base_model.unilora_theta_d": (5,)}),
        ({"method": "unilora", "rank": 2**40, "vector_length": 2**50}, {"vector_bank": (5,)}),
    ],
)  # fmt: skip
def test_sizes_that_only_the_config_of_another_program_claims(mlp, tmp_path, config, tensors):
    config = {"target_modules": ["up"], **({} if "method" in config else {"peft_type": "LORA"}), **config}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / WEIGHTS)
    with pytest.raises(fg.CheckpointError):
        fg.load_adapter(mlp, tmp_path)


def test_a_supernet_with_fewer_ranks_than_its_path(mlp, tmp_path):
    paths = {"A": "LoRA_1", "B": f"LoRA_{2**40}", "C": "none", "D": "none", "E": "none"}
    (tmp_path / CONFIG).write_text(json.dumps({"method": "glora", "rank": 2**40, "paths": {"up": paths}}))
    shapes = {"Ad": (11, 3), "Au": (3, 7), "Bd": (11, 3), "Bu": (3, 7)}
    save_file({f"up.{name}": torch.ones(shape) for name, shape in shapes.items()}, tmp_path / WEIGHTS)
    with pytest.raises(fg.CheckpointError, match=r"LoRA_1099511627776 of Bd, which is \(11, 3\)"):
        fg.load_adapter(mlp, tmp_path)
