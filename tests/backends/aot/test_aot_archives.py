"""Archives that `fg.package` did not write are refused before native code sees them; a full disk is an error."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from small_models import perturb
from torch import nn

import fxgraft as fg
from fxgraft.backends.aot import package as aot
from fxgraft.backends.aot import package_manifest as aot_manifest


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def adapted(alpha=5, seed=3):
    torch.manual_seed(0)
    net = Net().eval()
    torch.manual_seed(seed)
    return perturb(fg.rewrite(net, fg.Spec(fg.LoRA(2, alpha), ["up", "down"])))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    fg.package(adapted(), path, (torch.randn(3, 6),))
    return path


@pytest.fixture
def no_native_code(monkeypatch):
    def never(*args):
        raise AssertionError("native code was loaded")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", never)


def rewritten(source, target, change):
    """A copy whose members `change` may edit ({name: bytes}), with the hash computed anew."""
    with zipfile.ZipFile(source) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    (manifest_name,) = [name for name in members if name.endswith(aot_manifest.MANIFEST)]
    manifest = json.loads(members.pop(manifest_name))
    change(members, manifest)
    with zipfile.ZipFile(target, "w") as new:
        for name, data in members.items():
            new.writestr(zipfile.ZipInfo(name), data)
        manifest["content"] = aot_manifest.content(new)
        new.writestr(zipfile.ZipInfo(manifest_name), json.dumps(manifest))
    return target


def test_a_rewritten_archive_with_nothing_changed_still_opens(package, tmp_path):
    x = torch.randn(5, 6)
    same = fg.load_package(rewritten(package, tmp_path / "same.pt2", lambda members, manifest: None))
    torch.testing.assert_close(same(x), adapted()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["{}/../../evil", "/etc/evil", "{}/data/aotinductor/model/../../../../evil", "evil",
                                  "{}//evil", "{}/a\\..\\evil", "other/evil", "C:/evil", "{}/./evil"])  # fmt: skip
def test_members_outside_of_the_archive(package, tmp_path, no_native_code, name):
    root = zipfile.ZipFile(package).namelist()[0].split("/")[0]
    file = rewritten(package, tmp_path / "a.pt2", lambda members, _: members.update({name.format(root): b"evil"}))
    with pytest.raises(fg.PackageError, match="damaged or was changed"):
        fg.load_package(file)


def bomb(package: Path, target: Path) -> Path:
    def change(members, manifest):
        members[f"{next(iter(members)).split('/')[0]}/data/aotinductor/model/weights.bin"] = bytes(1 << 20)

    rewritten(package, target, change)
    with zipfile.ZipFile(target) as old, zipfile.ZipFile(target.with_name("b.pt2"), "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return target.with_name("b.pt2")


def appended(package, target):
    target.write_bytes(package.read_bytes() + b"appended")
    return target


def in_front(package, target):
    target.write_bytes(b"in front" + package.read_bytes())
    return target


def commented(package, target):
    target.write_bytes(package.read_bytes())
    with zipfile.ZipFile(target, "a") as archive:
        archive.comment = b"a comment"
    return target


def between(package, target):
    """Bytes between two members: the directory's offsets are moved along."""
    data = bytearray(package.read_bytes())
    with zipfile.ZipFile(package) as archive:
        second, start = archive.infolist()[1].header_offset, archive.start_dir
        count = len(archive.infolist())
    hole = b"\x90" * 64
    data[second:second] = hole
    at = start + len(hole)
    for index in range(count):
        name, extra, comment = struct.unpack("<HHH", data[at + 28 : at + 34])
        (offset,) = struct.unpack("<I", data[at + 42 : at + 46])
        if index:
            data[at + 42 : at + 46] = struct.pack("<I", offset + len(hole))
        at += 46 + name + extra + comment
    data[-6:-2] = struct.pack("<I", start + len(hole))
    target.write_bytes(data)
    assert zipfile.ZipFile(target).testzip() is None
    return target


@pytest.mark.parametrize("change", [appended, in_front, commented, between, bomb])
def test_bytes_that_belong_to_no_member(package, tmp_path, no_native_code, change):
    with pytest.raises(fg.PackageError, match=r"damaged or was changed|is no \.pt2"):
        fg.load_package(change(package, tmp_path / "a.pt2"))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("machine"),
        lambda m: m.update(machine=[]),
        lambda m: m["machine"].pop("cpu"),
        lambda m: m.update(inputs=None),
        lambda m: m["adapters"].update(default=None),
        lambda m: m["adapters"]["default"].update(tensors=3),
        lambda m: next(iter(m["adapters"]["default"]["tensors"].values())).update(dtype="float99"),
        lambda m: next(iter(m["adapters"]["default"]["tensors"].values())).update(shape=["x"]),
        lambda m: m["adapters"]["default"].update(methods={"up": 3}),
    ],
)
def test_a_manifest_that_says_nonsense(package, tmp_path, no_native_code, change):
    file = rewritten(package, tmp_path / "a.pt2", lambda members, manifest: change(manifest))
    with pytest.raises(fg.PackageError, match="damaged or was changed"):
        fg.load_package(file)


def test_a_full_disk_is_an_error_and_no_end_of_the_process(package, tmp_path, monkeypatch):
    """torch's writer ends the process (std::terminate) where a write fails; ours never tells it."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    opened = open

    def full(file, mode="r", *args, **kwargs):
        return opened("/dev/full" if str(file).endswith(".pt2") and mode == "wb" else file, mode, *args, **kwargs)

    with zipfile.ZipFile(package) as archive:  # compiled once is enough
        archive.extractall(tmp_path / "compiled")
    files = [str(file) for file in (tmp_path / "compiled").rglob("model/*")]
    monkeypatch.setattr("torch._inductor.aot_compile", lambda *args, **kwargs: files)
    target = tmp_path / "out"
    target.mkdir()
    (target / "model.pt2").write_text("what was there")
    monkeypatch.setattr(aot, "open", full, raising=False)
    with pytest.raises(fg.rewriter.errors.ExportError, match="No space left"):
        fg.package(adapted(), target / "model.pt2", (torch.randn(3, 6),))
    assert (target / "model.pt2").read_text() == "what was there" and os.listdir(target) == ["model.pt2"]


def test_swap_takes_states_models_and_folders_of_the_same_method(package, tmp_path):
    loaded, x = fg.load_package(package), torch.randn(4, 6)
    other, wrong = adapted(seed=8), adapted(alpha=9)
    fg.save_adapter(other, tmp_path / "a")
    fg.save_adapter(wrong, tmp_path / "wrong")
    fg.save_adapter(other, tmp_path / "peft", format="peft")
    before = loaded(x)
    for state in (fg.adapter_state(wrong), wrong, tmp_path / "wrong"):
        with pytest.raises(fg.AdapterError, match="alpha"):
            loaded.swap(state)
    with pytest.raises(fg.CheckpointError, match="not in fxgraft's own format"):
        loaded.swap(tmp_path / "peft")
    with pytest.raises(fg.CheckpointError, match="not an adapter folder"):
        loaded.swap(tmp_path / "nothing")
    with pytest.raises(fg.CheckpointError, match="holds 3 adapters"):
        loaded.swap(tmp_path)
    assert torch.equal(loaded(x), before)
    for state in (fg.adapter_state(other), other, tmp_path / "a", str(tmp_path / "a"), dict(fg.adapter_state(other))):
        loaded.swap(fg.adapter_state(adapted()))
        assert torch.equal(loaded(x), before)
        loaded.swap(state)
        torch.testing.assert_close(loaded(x), other(x), rtol=1e-4, atol=1e-5)
    fg.swap(wrong := adapted(), loaded.adapter_state())
    torch.testing.assert_close(wrong(x), other(x))
