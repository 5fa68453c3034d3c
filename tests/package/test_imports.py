"""The shape of the tree: who imports whom, in one direction and no circle; names, tests and setup.cfg follow it."""

from __future__ import annotations

import ast
import collections
import configparser
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "fxgraft"
# A layer may import itself and the layers before it.
LAYERS = ("rewriter", "passes", "backends", "exporters")
# What a folder of a layer may import of its own layer, beside itself. A file that stands in the layer may import any.
ROOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "passes": {"methods": (), "graph": ("methods",), "models": ("methods",)},
    "backends": {"artifact": (), "triton": (), "compile": ("triton",), "aot": ("artifact",)},
    "exporters": {"checkpoints": (), "adapterfiles": (), "onnx": ("adapterfiles",), "ort": ("adapterfiles", "onnx")},
}
SCRIPTS = ("benchmarks", "examples")
# Folders of tests that are laid out by what they are, not by what they test.
OTHER_TESTS = {"package", "examples", "benchmarks", "campaigns", "helpers"}
# Folders that hold Python files without being part of the package.
NOT_PACKAGED = {"tests", "examples", "benchmarks", "build", "dist", "__pycache__"}


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
        elif target[1] == layer and len(parts) > 2 and len(target) > 2 and parts[2] != target[2]:
            rooms = ROOMS.get(layer, {})
            if parts[2] in rooms and target[2] in rooms and target[2] not in rooms[parts[2]]:
                wrong.append(f"{module}:{line} imports {name}: {layer}/{parts[2]} may not know {layer}/{target[2]}")
    return wrong


def test_imports_go_one_way():
    files = package_files(ROOT)
    assert {name.split(".")[1] for name, _ in files if "." in name} == set(LAYERS)
    wrong = []
    for name, file in files:
        wrong += wrong_imports(file.read_text(encoding="utf-8"), name, file.stem == "__init__")
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_a_layer_has_its_place():
    for layer, rooms in ROOMS.items():
        assert set(rooms) == {
            name.split(".")[2] for name in package_folders(ROOT) if name.startswith(f"{PACKAGE}.{layer}.")
        }


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fxgraft.exporters.adapterfiles.fit", "from ..onnx.graph_rewrites import name_transposes"),
        ("fxgraft.exporters.onnx.export", "def f():\n    from ..ort.session import OrtSession"),
        ("fxgraft.exporters.ort.session", "from ..checkpoints import folder"),
        ("fxgraft.backends.artifact.parity", "from ..aot import package"),
        ("fxgraft.backends.triton.lower", "import fxgraft.backends.compile.inductor"),
        ("fxgraft.passes.methods.lora", "from ..graph.cost import flops"),
        ("fxgraft.passes.models.merge", "from ..graph import pipelines"),
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


def circles(sources: dict[str, str], packages: frozenset[str] = frozenset()) -> list[list[str]]:
    """The modules that import each other, directly or round about, of module name -> source; `packages` of them are
    an `__init__.py`. A name's own package is no step: importing it comes before every module of it anyhow."""
    graph = nx.DiGraph()
    for module, source in sources.items():
        for _, target in imported_modules(source, module, module in packages):
            while target and target not in sources:
                target = target.rpartition(".")[0]
            if target and target != module:
                graph.add_edge(module, target)
    return sorted(sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1)


def test_no_circle_of_imports():
    files = dict(package_files(ROOT))
    sources = {name: file.read_text(encoding="utf-8") for name, file in files.items() if name != PACKAGE}
    packages = frozenset(name for name, file in files.items() if file.stem == "__init__")
    assert circles(sources, packages) == []


def test_no_circle_of_scripts():
    sources = {
        file.stem: file.read_text(encoding="utf-8") for folder in SCRIPTS for file in (ROOT / folder).rglob("*.py")
    }
    assert {"harness", "quickstart", "study"} <= set(sources)
    assert circles(sources) == []


@pytest.mark.parametrize(
    "back",
    [
        "from .a import f",
        "from . import a",
        "def g():\n    from .a import f",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import F",
        "import importlib\nimportlib.import_module('.a', __package__)",
    ],
)
def test_the_check_sees_a_circle(back):
    sources = {"p": "", "p.a": "from .b import g", "p.b": "from .c import h", "p.c": back, "p.d": "from .a import f"}
    assert circles(sources, frozenset({"p"})) == [["p.a", "p.b", "p.c"]]
    assert circles({**sources, "p.c": "import torch"}, frozenset({"p"})) == []
    assert circles({"a": "import b", "b": "def f():\n    import a"}) == [["a", "b"]]


def test_no_two_files_of_one_name():
    """A name finds one file; scripts and test helpers are even imported by their bare names."""
    found = collections.defaultdict(list)
    scripts = [file for folder in (*SCRIPTS, "tests") for file in (ROOT / folder).rglob("*.py")]
    for file in [file for _, file in package_files(ROOT)] + scripts:
        if file.name != "__init__.py":
            found[file.name].append(str(file.relative_to(ROOT)))
    assert not [files for files in found.values() if len(files) > 1]


def test_tests_are_laid_out_like_the_tree():
    folders = {file.parent.relative_to(ROOT / "tests") for file in (ROOT / "tests").rglob("*.py")}
    strange = [f for f in folders if f.parts and f.parts[0] not in OTHER_TESTS and not (ROOT / f).is_dir()]
    assert not strange, "tests of what does not exist"
