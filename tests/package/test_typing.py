"""mypy accepts what users write: the README's own lines and the uses in typed_use.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Run mypy as a user would, against the package under its own name whatever the clone's folder is called."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "fxgraft").symlink_to(ROOT, target_is_directory=True)

    def run(code: str) -> str:
        file = folder / "use.py"
        file.write_text(code, encoding="utf-8")
        command = [sys.executable, "-m", "mypy", "--warn-unused-ignores", "--follow-imports", "silent"]
        done = subprocess.run(
            [*command, "--config-file=", "--cache-dir", str(ROOT / ".mypy_cache"), str(file)],
            cwd=folder, env={"MYPYPATH": str(folder), "PATH": ""}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        return done.stdout + done.stderr

    return run


def test_mypy_accepts_the_readmes_lines_and_every_verbs_class(check):
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    uses = (ROOT / "tests/package/typed_use.py").read_text(encoding="utf-8")
    found = check("\n".join([uses, *readme]))
    assert found.startswith("Success"), found


def test_the_check_sees_a_wrong_argument(check):
    found = check("import fxgraft as fg\nfg.Spec(fg.LoRA(), targets=3)\n")
    assert "arg-type" in found
