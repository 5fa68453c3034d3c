"""25 rows of the matrix, as far as they need neither a compiler nor an exporter; and the tables it makes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# One of every kind that is built differently, of the libraries that the tests have.
ROWS = [
    "albert", "bart", "bert", "bloom", "convnextv2", "deberta-v2", "falcon", "gemma2", "gpt2", "gpt_neox", "gpt_oss",
    "jetmoe", "llama", "llava", "mamba", "mixtral", "mpt", "phi3", "swin", "t5", "vit", "wav2vec2", "wavlm", "whisper",
]  # fmt: skip
TORCH = ["TransformerEncoder", "LSTM tagger"]
HEAVY = ("compile", "ONNX merged", "ONNX swappable", "ONNX bank", "ONNX with cache")


@pytest.fixture(scope="module")
def matrix():
    sys.path.insert(0, str(EXAMPLES))
    yield {name: importlib.import_module(f"matrix.{name}") for name in ("architectures", "cells", "row", "table")}
    sys.path.remove(str(EXAMPLES))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*(f"transformers: {name}" for name in ROWS), *(f"torch: {name}" for name in TORCH)])
def test_rows(matrix, name):
    pytest.importorskip("transformers")
    row = matrix["row"].Row(matrix["architectures"].ARCHITECTURES[name])
    cells = list(row.cells(without=HEAVY))
    assert len(cells) == len(list(row.columns())) - len(HEAVY), cells
    assert not [cell for cell in cells if cell.kind in matrix["cells"].FAILURES]


def test_there_are_as_many_as_it_says(matrix):
    assert len(matrix["architectures"].ARCHITECTURES) == 150


def test_whose_limit_it_is(matrix):
    import fxgraft as fg

    cells = matrix["cells"]

    def kind(error):
        def verb():
            raise error

        return cells.cell_of("it", verb).kind

    assert cells.cell_of("it", lambda: "note") == cells.Cell("it", cells.OK, "note")
    assert kind(cells.TheirLimit("the base")) == cells.BASE and kind(cells.NotHere()) == cells.NONE
    assert kind(fg.SpecError("no")) == cells.REFUSED and kind(fg.ParityError("off")) == cells.WRONG
    assert kind(cells.Wrong("off")) == cells.WRONG and kind(KeyError("raw")) == cells.CRASHED


def test_the_tables_count_and_escape(matrix):
    cells, table = matrix["cells"], matrix["table"]
    fine, bad = cells.Cell("rewrite", cells.OK, "3 sites"), cells.Cell("rewrite", cells.WRONG, "a < b | c")
    refused = cells.Cell("bank", cells.REFUSED, "rows are shared")
    rows = {"one": [fine, refused], "two": [bad, cells.Cell("bank", cells.NONE)], "three": [fine]}
    assert table.counted(rows).startswith("2 of 3 ") and ", 1 of them" in table.counted(rows)
    page, text = table.page(rows, "torch 2"), table.markdown(rows, "torch 2")
    assert "a &lt; b | c" in page and page.count("<tr>") == 4 and "rows are shared" in page
    assert "| bank |  |  | 1 |  |  |" in text and "rewrite: wrong, a < b / c" in text
