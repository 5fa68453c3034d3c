"""Every published parameter count, on models of the published structure: the table of examples/parameter_table.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from parameter_table import ROWS, count


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}-{row.method.key}-{row.published}")
def test_published_counts(row):
    assert count(row) == (row.published, row.virtual)
