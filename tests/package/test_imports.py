"""The shape of the package: who imports whom, what setup.cfg lists, what `import fxgraft` loads and offers."""

from __future__ import annotations

import ast
import configparser
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "fxgraft"
# A layer may import itself and the layers before it.
LAYERS = ("rewriter", "passes", "backends", "exporters")
# Folders that hold Python files without being part of the package.
NOT_PACKAGED = {"tests", "examples", "benchmarks", "build", "dist", "__pycache__"}
# Loaded when they are needed, never by `import fxgraft`: slow, optional, or both.
LAZY = ("transformers", "onnxruntime", "onnx", "triton")


def package_folders(root: Path) -> dict[str, Path]:
    """Dotted name -> folder, of every folder of the tree that belongs to the package because it has Python files."""
    found = {PACKAGE: root}
    waiting = [(PACKAGE, root)]
    while waiting:
        name, folder = waiting.pop()
        for child in sorted(folder.iterdir()):
            if not child.is_dir() or child.name.startswith(".") or child.suffix == ".egg-info":
                continue
            if child.name in NOT_PACKAGED or (child / "pyvenv.cfg").exists():
                continue
            waiting.append((f"{name}.{child.name}", child))
            if any(child.glob("*.py")):
                found[f"{name}.{child.name}"] = child
    return found


def package_files(root: Path) -> list[tuple[str, Path]]:
    """(module name, file) of every Python file of the package; a package is named without `.__init__`."""
    files = []
    for package, folder in package_folders(root).items():
        for file in sorted(folder.glob("*.py")):
            files.append((package if file.stem == "__init__" else f"{package}.{file.stem}", file))
    return files


def imported_modules(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of all that a source imports, inside functions and `TYPE_CHECKING` blocks too.

    `from a import b` counts as `a.b`: b may be a module. `import_module` and `__import__` count when given a literal.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts: list[str] = []
            if node.level:
                parts = module.split(".")
                up = node.level - 1 if is_package else node.level
                parts = parts[: len(parts) - up]
            base = ".".join(parts + ([node.module] if node.module else []))
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            given = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(given, str):
                if given.startswith("."):
                    up = len(given) - len(given.lstrip("."))
                    parts = module.split(".")
                    parts = parts[: len(parts) - (up - 1 if is_package else up)]
                    given = ".".join([*parts, given.lstrip(".")])
                found.append((node.lineno, given))
    return found


def wrong_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of a source of the package that go against the direction, each with its reason."""
    parts = module.split(".")
    if len(parts) == 1:
        return []  # the root re-exports from every layer
    layer = parts[1]
    wrong = []
    for line, name in imported_modules(source, module, is_package):
        target = name.split(".")
        if target[0] != PACKAGE:
            continue
        if len(target) == 1 or target[1] not in LAYERS:
            wrong.append(f"{module}:{line} imports {name}: modules import from a layer, not from the package's root")
        elif layer not in LAYERS:
            wrong.append(f"{module}:{line} is in no layer; the layers are {', '.join(LAYERS)}")
        elif LAYERS.index(target[1]) > LAYERS.index(layer):
            wrong.append(f"{module}:{line} imports {name}: {layer} may not know {target[1]}")
    return wrong


def test_imports_go_one_way():
    files = package_files(ROOT)
    assert {name.split(".")[1] for name, _ in files if "." in name} == set(LAYERS)
    wrong = []
    for name, file in files:
        wrong += wrong_imports(file.read_text(encoding="utf-8"), name, file.stem == "__init__")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fxgraft.rewriter.switch", "from ..passes import merge"),
        ("fxgraft.rewriter.switch", "from .. import passes"),
        ("fxgraft.rewriter.switch", "import fxgraft.backends.compile.inductor"),
        ("fxgraft.rewriter.switch", "from fxgraft import exporters"),
        ("fxgraft.rewriter.switch", "def f():\n    from ..exporters.onnx import export_onnx"),
        (
            "fxgraft.rewriter.switch",
            "from importlib import import_module\nimport_module('fxgraft.passes.models.merge')",
        ),
        ("fxgraft.rewriter.switch", "import importlib\nimportlib.import_module('..passes.merge', __package__)"),
        (
            "fxgraft.rewriter.switch",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..passes import merge",
        ),
        ("fxgraft.passes.methods.lora", "from ...backends import cost"),
        ("fxgraft.passes.models.merge", "from ...exporters import checkpoints"),
        ("fxgraft.backends.compile.inductor", "from ...exporters import checkpoints"),
        ("fxgraft.backends.compile.inductor", "from ... import rewrite"),
        ("fxgraft.backends.compile.inductor", "import fxgraft"),
    ],
)
def test_the_check_sees_a_wrong_import(module, source):
    assert len(wrong_imports(source, module)) == 1


def test_the_check_resolves_packages():
    assert wrong_imports("from .merge import merge", "fxgraft.passes", is_package=True) == []
    assert wrong_imports("from ... import backends", "fxgraft.passes.methods", is_package=True)
    assert wrong_imports("from ...rewriter.spec import Spec", "fxgraft.passes.models.merge") == []
    assert wrong_imports("from ...rewriter import dialect", "fxgraft.passes.methods.lora") == []
    assert wrong_imports("import torch\nfrom fxgraft.backends import inductor", "fxgraft.exporters.onnx.export") == []


def listed_packages(root: Path) -> list[str]:
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    return config["options"]["packages"].split()


def test_setup_cfg_lists_every_package():
    listed = listed_packages(ROOT)
    assert len(listed) == len(set(listed))
    assert set(listed) == set(package_folders(ROOT)), "setup.cfg's list of packages and the tree differ"


def test_every_package_has_an_init():
    missing = [name for name, folder in package_folders(ROOT).items() if not (folder / "__init__.py").exists()]
    assert not missing


def test_folders_are_found_as_a_wheel_needs_them(tmp_path):
    for file in [
        "__init__.py",
        "a/b/c.py",
        "a/notes.txt",
        "tests/t.py",
        ".venv/x.py",
        "env/pyvenv.cfg",
        "env/lib/y.py",
    ]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert set(package_folders(tmp_path)) == {"fxgraft", "fxgraft.a.b"}


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter and another folder, so that only the installed package can be found."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True, timeout=300
    )


# Counts attempts, not loaded modules: a package that this machine lacks (triton, on most) would be loaded elsewhere.
# `importlib.util.find_spec` only asks whether a package exists, so it is no attempt.
WATCH = """
import json, sys, traceback

class Watch:
    attempts = {}

    def find_spec(self, name, path=None, target=None):
        if name in LAZY and name not in self.attempts:
            stack = [f for f in traceback.extract_stack()[:-1] if not f.filename.startswith("<frozen importlib._boot")]
            if not any(f.name == "find_spec" and "importlib" in f.filename for f in stack):
                self.attempts[name] = [f"{f.filename}:{f.lineno}" for f in stack][-6:]

sys.meta_path.insert(0, Watch())
"""


def attempts(statement: str, cwd: Path) -> dict[str, list[str]]:
    done = python(f"LAZY = {LAZY!r}\n{WATCH}\n{statement}\nprint(json.dumps(Watch.attempts))", cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_loads_nothing_heavy(tmp_path):
    found = attempts("import fxgraft", tmp_path)
    report = "\n".join(f"{name} is imported through " + " -> ".join(chain) for name, chain in found.items())
    assert not found, f"`import fxgraft` loads what only some users need\n{report}"


def test_the_watch_sees_an_import(tmp_path):
    (tmp_path / "eager.py").write_text("try:\n    import triton\nexcept ImportError:\n    triton = None\n")
    found = attempts("import eager, importlib.util\nimportlib.util.find_spec('onnx')", tmp_path)
    assert set(found) == {"triton"}
    assert any("eager.py" in step for step in found["triton"])


def test_public_names_are_the_ones_the_root_imports(tmp_path):
    import fxgraft

    assert len(fxgraft.__all__) == len(set(fxgraft.__all__))
    missing = [name for name in fxgraft.__all__ if not hasattr(fxgraft, name)]
    assert not missing, f"__all__ names what does not exist: {missing}"
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            imported |= {alias.asname or alias.name for alias in node.names}
    public = {name for name in imported if not name.startswith("_")}
    assert not public - set(fxgraft.__all__), "imported by the root, but not offered in __all__"


def test_star_import_gives_the_spine(tmp_path):
    """The names of the first stage, as documented; the methods of later stages join them as they come."""
    spine = {
        *("LoRA", "UniLoRA", "Spec", "Target", "FxgraftError"),
        *("rewrite", "merge", "set_active", "active", "disabled", "swap", "remove", "explain"),
        *("save_adapter", "load_adapter", "adapter_state", "compile"),
        *("export_onnx", "OnnxExport", "export_ort_adapter", "OrtSession"),
    }
    done = python("import json\nfrom fxgraft import *\nprint(json.dumps(sorted(dir())))", tmp_path)
    assert done.returncode == 0, done.stderr
    assert spine <= set(json.loads(done.stdout))
