"""Every relative link of the README and of docs/ leads somewhere, and the pass shown there does its work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fxgraft as fg

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)")


def links(text: str) -> list[str]:
    """The targets of a page's links to files, without their anchors; code is not looked at."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return [t.partition("#")[0] for t in LINK.findall(prose) if "://" not in t and not t.startswith(("#", "mailto:"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in links(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"


def test_links_are_found() -> None:
    assert links("[a](x.py) and [`b`](y/z.md#part), [c](https://x.y), [d](#here)\n```\n[e](f)\n```\n") == [
        "x.py",
        "y/z.md",
    ]
    assert len(links((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))) > 40


def test_the_pass_that_the_architecture_shows() -> None:
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text("utf-8"), flags=re.S)
    shown: dict[str, type] = {"__name__": __name__}  # type: ignore[dict-item]
    exec(source, shown)
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(rank=2, dropout=0.1), targets=["0"]))
    program = fg.capture(adapted, (x,))
    result = shown["DropNothing"]()(program)
    assert result.count == 1
    torch.testing.assert_close(result.program.graph_module(x), program.graph_module(x))
