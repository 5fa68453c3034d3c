"""Every verb and every method on 150 architectures at tiny size, each in a process of its own, as one table.

    python examples/model_matrix.py                                 # all of it: hours on two cores
    python examples/model_matrix.py --only bert "timm: .*" --without compile "ONNX .*"

Needs `pip install -e ".[test]" timm torchvision diffusers sentence-transformers`; a library that is missing shows as
such. Writes matrix.html, matrix.md and matrix.json; rows that matrix.json already has are kept with --resume.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from matrix.architectures import ARCHITECTURES
from matrix.cells import CRASHED, Cell, said
from matrix.row import Row
from matrix.table import counted, markdown, page
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_MARK = "cell:"  # of the lines that a child writes for its parent


def one(name: str, without: list[str]) -> None:
    """In a process of its own: print the cells of a row as they come."""
    try:
        row = Row(ARCHITECTURES[name])
    except ImportError as error:
        cells = [Cell("rewrite", "none", f"not installed: {error}")]
    except Exception as error:  # the model itself does not run here
        cells = [Cell("rewrite", "base", said(error))]
    else:
        columns = [column for column, _ in row.columns()]
        cells = row.cells([c for c in columns if any(re.fullmatch(pattern, c) for pattern in without)])  # type: ignore[assignment]
    for cell in cells:
        print(_MARK + json.dumps(dataclasses.asdict(cell)), flush=True)


def in_a_process(name: str, without: list[str], limit: float) -> list[Cell]:
    """The cells of a row; the last says so where the process died or took too long."""
    command = [sys.executable, __file__, "--one", name, "--without", *without]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        output, died = (
            done.stdout,
            f"the process ended with {done.returncode}: {done.stderr[-200:]}" * bool(done.returncode),
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        died = f"took more than {limit:.0f} s"
    lines = [line.removeprefix(_MARK) for line in output.splitlines() if line.startswith(_MARK)]
    cells = [Cell(**json.loads(line)) for line in lines]
    return [*cells, Cell("the process", CRASHED, " ".join(died.split()))] if died else cells


def versions() -> str:
    names = (
        "torch",
        "transformers",
        "timm",
        "torchvision",
        "diffusers",
        "sentence-transformers",
        "peft",
        "onnxruntime",
    )
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="rows whose name has a match")
    parser.add_argument("--without", nargs="*", default=[], metavar="PATTERN", help="columns to leave out")
    parser.add_argument("--out", type=Path, default=Path("matrix"), help="folder for the three files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=900, help="seconds that a row may take")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the folder has")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return one(given.one, given.without)
    names = [n for n in ARCHITECTURES if not given.only or any(re.search(pattern, n) for pattern in given.only)]
    if not names:
        parser.error(f"no architecture matches {given.only}; they are {', '.join(ARCHITECTURES)}")
    given.out.mkdir(parents=True, exist_ok=True)
    stored, rows = given.out / "matrix.json", {}
    if given.resume and stored.exists():
        rows = {name: [Cell(**cell) for cell in cells] for name, cells in json.loads(stored.read_text()).items()}
    waiting = [name for name in names if name not in rows]
    bar = Progress(TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with bar, concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        task = bar.add_task("rows", total=len(waiting))
        made = {pool.submit(in_a_process, name, given.without, given.limit): name for name in waiting}
        for future in concurrent.futures.as_completed(made):
            rows[made[future]] = future.result()
            bar.update(task, advance=1, description=made[future])
            stored.write_text(json.dumps({n: [dataclasses.asdict(c) for c in cells] for n, cells in rows.items()}))
    rows = {name: rows[name] for name in ARCHITECTURES if name in rows}
    (given.out / "matrix.html").write_text(page(rows, versions()), encoding="utf-8")
    (given.out / "matrix.md").write_text(markdown(rows, versions()), encoding="utf-8")
    Console().print(f"{counted(rows)} {given.out / 'matrix.html'}")


if __name__ == "__main__":
    main()
