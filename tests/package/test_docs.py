"""What docs/ shows and points at is there: code is in the file it names, links lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_code_is_the_code_in_use(page):
    """A block that begins with `# path` has lines of that file only, in their order."""
    for path, shown in re.findall(r"```python\n# (\S+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        lines = iter((ROOT / path).read_text(encoding="utf-8").splitlines())
        lost = [line for line in shown.splitlines() if line not in lines]
        assert not lost, f"{page.name} shows what is not (or not in this order) in {path}: {lost}"


def test_a_method_is_known_in_four_files():
    """docs/adding_a_method.md counts the files that VeRA touches: those, and no other, name it in code."""
    named = set()
    for folder in ("rewriter", "passes", "backends", "exporters"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                words = [getattr(node, attribute, None) for attribute in ("id", "attr", "name", "module")]
                if any(isinstance(word, str) and "vera" in re.split(r"[._]", word.lower()) for word in words):
                    named.add(file.relative_to(ROOT).as_posix())
    assert named == {
        "passes/methods/vera.py", "passes/methods/__init__.py", "exporters/checkpoints/formats/peft_vera.py",
    }  # fmt: skip
