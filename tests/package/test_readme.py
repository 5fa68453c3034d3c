"""The README's example runs as written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_first_example_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(compile(code, str(README), "exec"), {})
    assert {"adapter", "model.onnx", "a.onnx_adapter"} <= {p.name for p in tmp_path.iterdir()}
    assert "[" in capsys.readouterr().out
    size = sum(p.stat().st_size for p in (tmp_path / "adapter").iterdir())
    assert size < 20_000, "the README says 16 kB"


def test_every_name_the_readme_uses_exists():
    import fxgraft as fg

    used = set(re.findall(r"fg\.(\w+)", README.read_text(encoding="utf-8")))
    assert used and used <= set(fg.__all__)
