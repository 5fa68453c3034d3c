"""What `import fxgraft` loads, and what it offers."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import fxgraft as fg

ROOT = Path(__file__).resolve().parents[2]
# Loaded when they are needed, never by `import fxgraft`: slow, optional, or both.
LAZY = ("transformers", "onnxruntime", "onnx", "triton")


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
    imported = imported - {"*"} | set(fxgraft.passes.methods.__all__)  # the one star
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


def test_pickles_of_methods_open_under_the_names_they_were_written_with():
    """A method is at home where its folder is: configs and estimates that were pickled when it was a file open."""
    homes = {"lora": "LoRA", "lora_xs": "LoRAXS", "lora_sb": "LoRASB", "unilora": "UniLoRA", "prolora": "PRoLoRA"}
    homes |= {"hydralora": "HydraLoRA", "glora": "GLoRA"}
    for home, name in [*homes.items(), ("lora_sb", "UpdateEstimate")]:
        named = f"cfxgraft.passes.methods.{home}\n{name}\n.".encode()  # the pickle of a class
        assert pickle.loads(named) is getattr(fg, name)
