"""The matrix as a page and as Markdown."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence

from .cells import BASE, CRASHED, FAILURES, NONE, OK, REFUSED, WRONG, Cell

_MARKS = {OK: "✓", NONE: "", BASE: "base", REFUSED: "refused", WRONG: "wrong", CRASHED: "error"}
_COLOURS = {OK: "#d9f2dd", NONE: "#f5f5f5", BASE: "#e3e3ea", REFUSED: "#fdf0c4", WRONG: "#f3a3a3", CRASHED: "#f7c2b0"}
_LEGEND = {
    OK: "works, with the numbers compared",
    BASE: "the base model or its library cannot do it either",
    REFUSED: "refused by fxgraft, with the reason",
    WRONG: "other numbers than expected",
    CRASHED: "an error that is not one of fxgraft's own",
}
Rows = Mapping[str, Sequence[Cell]]


def columns_of(rows: Rows) -> list[str]:
    """Every column, in the order of the longest row."""
    longest = max(rows.values(), key=len, default=())
    return [cell.column for cell in longest]


def counted(rows: Rows) -> str:
    """How many rows are without a failure, and without a refusal too."""
    whole = sum(not any(cell.kind in FAILURES for cell in cells) for cells in rows.values())
    all_of_it = sum(not any(cell.kind in (*FAILURES, REFUSED) for cell in cells) for cells in rows.values())
    return f"{whole} of {len(rows)} architectures without a failure of ours, {all_of_it} of them without a refusal too."


def _by_column(rows: Rows) -> dict[str, Counter[str]]:
    found = {column: Counter[str]() for column in columns_of(rows)}
    for cells in rows.values():
        for cell in cells:
            found[cell.column][cell.kind] += 1
    return found


def markdown(rows: Rows, versions: str) -> str:
    """Counts per verb, and every cell that is not fine with its reason."""
    kinds = (OK, BASE, REFUSED, WRONG, CRASHED)
    lines = ["# Every model as it is", "", counted(rows), "", versions, ""]
    lines += ["| | " + " | ".join(_MARKS[kind] for kind in kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for column, count in _by_column(rows).items():
        lines.append(f"| {column} | " + " | ".join(str(count[kind] or "") for kind in kinds) + " |")
    lines += ["", "| architecture | reached | not as it should be |", "|---|---|---|"]
    for name, cells in rows.items():
        bad = [f"{cell.column}: {_MARKS[cell.kind]}, {cell.note}" for cell in cells if cell.kind not in (OK, NONE)]
        reached = cells[0].note if cells and cells[0].kind == OK else ""
        lines.append(f"| {name} | {reached} | {'<br>'.join(text.replace('|', '/') for text in bad)} |")
    return "\n".join(lines) + "\n"


def page(rows: Rows, versions: str) -> str:
    """One HTML page: a line for each architecture, a reason behind every cell."""
    columns = columns_of(rows)
    head = "".join(f"<th><div>{html.escape(column)}</div></th>" for column in columns)
    body = []
    for name, cells in rows.items():
        known = {cell.column: cell for cell in cells}
        tds = []
        for column in columns:
            cell = known.get(column, Cell(column, NONE))
            note = html.escape(cell.note, quote=True)
            tds.append(f'<td style="background:{_COLOURS[cell.kind]}" title="{note}">{_MARKS[cell.kind]}</td>')
        reached = html.escape(cells[0].note) if cells and cells[0].kind == OK else ""
        body.append(f"<tr><th>{html.escape(name)}</th><td class=reached>{reached}</td>{''.join(tds)}</tr>")
    legend = "".join(
        f'<span style="background:{_COLOURS[kind]}">{_MARKS[kind]}</span> {text} &nbsp; '
        for kind, text in _LEGEND.items()
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>fxgraft: every model as it is</title>
<style>
body {{ font: 13px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }}
table {{ border-collapse: collapse }} td, tbody th {{ border: 1px solid #fff; padding: 2px 6px; text-align: center }}
tbody th {{ text-align: left; font-weight: 500; white-space: nowrap }}
td.reached {{ text-align: left; white-space: nowrap }}
thead th {{ height: 11em; vertical-align: bottom; padding: 0; position: sticky; top: 0; background: #fff }}
thead th div {{ writing-mode: vertical-rl; transform: rotate(180deg); padding: 4px 2px; font-weight: 500 }}
p span {{ padding: 1px 8px }}
</style>
<h1>Every model as it is</h1><p>{html.escape(counted(rows))}</p><p>{html.escape(versions)}</p><p>{legend}</p>
<table><thead><tr><th></th><th><div>reached by all-linear</div></th>{head}</tr></thead>
<tbody>{"".join(body)}</tbody></table>
</html>
"""
