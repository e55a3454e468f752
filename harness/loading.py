"""Files of interactions as large as they come: how long `recsys.data.load` takes, and how much memory.

    python -m harness.loading --output results/loading

Rows are pairs drawn at random, a hundred a user. Each kind of file is written, then read and split in a process of its
own. Linux only (reads /proc).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from scipy import sparse

from harness.command import fail, new_results, run_main
from recsys.results import save_results

__all__ = ["KINDS", "main", "measure"]

_PIECE = 1 << 21  # rows that are written at once

_PROGRAM = """
import json, sys, time
from pathlib import Path
from recsys.data import load
import recsys.data.formats

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

base, begun = status("VmRSS"), time.perf_counter()
data = load(sys.argv[1])
print(json.dumps({
    "seconds": time.perf_counter() - begun,
    "peak": status("VmHWM") - base,
    "kept": status("VmRSS") - base,
    "pairs": data.train.nnz + data.validation.targets.nnz + data.test.targets.nnz,
    "users": data.train.shape[0],
    "items": data.train.shape[1],
    "notes": list(data.notes),
}))
"""


def _pieces(rows: int, users: int, items: int) -> Any:
    draw = np.random.default_rng(0)
    for first in range(0, rows, _PIECE):
        n = min(_PIECE, rows - first)
        # Popular items as in real data: the square of a uniform number.
        yield draw.integers(0, users, n), (draw.random(n) ** 2 * items).astype(np.int64), first


def _text(path: Path, rows: int, users: int, items: int, row: str, header: str = "") -> None:
    """``row`` formats a user, an item, a rating and a timestamp."""
    with path.open("w") as file:
        file.write(header)
        for left, right, first in _pieces(rows, users, items):
            pairs = zip(left.tolist(), right.tolist(), strict=True)
            file.writelines([row % (u, i, 5, 10**9 + first + k) for k, (u, i) in enumerate(pairs)])


def _csv(path: Path, rows: int, users: int, items: int) -> None:
    _text(path, rows, users, items, "%d,%d,%d,%d\n", "user,item,rating,timestamp\n")


def _names(path: Path, rows: int, users: int, items: int) -> None:
    _text(path, rows, users, items, "u%07d,item-%06d,%d,%d\n", "user,item,rating,timestamp\n")


def _dat(path: Path, rows: int, users: int, items: int) -> None:
    _text(path, rows, users, items, "%d::%d::%d::%d\n")


def _lists(path: Path, rows: int, users: int, items: int) -> None:
    """A line for each user, of as many items."""
    draw, each = np.random.default_rng(0), -(-rows // users)
    with path.open("w") as file:
        for user in range(users):
            found = np.unique((draw.random(each) ** 2 * items).astype(np.int64))
            file.write(f"{user} {' '.join(map(str, found))}\n")


def _parquet(path: Path, rows: int, users: int, items: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("user", pa.int64()), ("item", pa.int64()), ("timestamp", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for left, right, first in _pieces(rows, users, items):
            columns = [left, right, np.arange(first, first + len(left))]
            writer.write_table(pa.table(columns, schema=schema))


def _matrix(path: Path, rows: int, users: int, items: int) -> None:
    parts = list(_pieces(rows, users, items))
    left, right = (np.concatenate([part[k] for part in parts]).astype(np.int32) for k in (0, 1))
    values = np.ones(len(left), np.float32)
    sparse.save_npz(path, sparse.csr_array((values, (left, right)), shape=(users, items)), compressed=False)


KINDS: dict[str, tuple[str, Callable[[Path, int, int, int], None]]] = {
    "csv": ("interactions.csv", _csv),
    "csv, ids are text": ("names.csv", _names),
    "MovieLens dat": ("ratings.dat", _dat),
    "lists of items": ("lists.txt", _lists),
    "parquet": ("interactions.parquet", _parquet),
    "scipy npz": ("interactions.npz", _matrix),
}


def measure(kind: str, rows: int, folder: Path) -> dict[str, Any]:
    """Write a file of a kind, load it in another process, remove it; bytes and seconds.

    Raises:
        RuntimeError: if the process fails; its output is in the message.
    """
    name, write = KINDS[kind]
    path = folder / name
    write(path, rows, max(2, rows // 100), max(2, rows // 1000))
    size = path.stat().st_size
    try:
        arguments = [sys.executable, "-c", _PROGRAM, str(path.resolve())]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    finally:
        path.unlink()
    if done.returncode:
        raise RuntimeError(f"{kind}: the reading process ended with {done.returncode}: {done.stderr[-2000:]}")
    return {"file": size, **json.loads(done.stdout)}


def _page(rows: int, found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        f"# Loading {rows:,} interactions",
        "",
        f"Of {rows // 100:,} users and {rows // 1000:,} items, drawn at random, so that some pairs repeat and are",
        "merged; split by ratio as by default. Peak: growth of the process, as the operating system counts it; kept:",
        "what of it is still there when the data is ready, data and what the allocator has not given back.",
        "",
        "| kind | file, MB | distinct pairs | seconds | peak, GB | bytes a row | kept, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {kind} | {row['file'] / 1e6:,.0f} | {row['pairs']:,} | {row['seconds']:.1f} | {row['peak'] / 1e9:.2f} "
        f"| {row['peak'] / rows:.0f} | {row['kept'] / 1e9:.2f} |"
        for kind, row in found.items()
    ]
    return lines


def main(
    output: Annotated[
        Path, typer.Option(callback=new_results, help="Results are written to OUTPUT.json and OUTPUT.md.")
    ],
    rows: Annotated[int, typer.Option(min=1000)] = 100_000_000,
    only: Annotated[str, typer.Option(help="Kinds, with semicolons between them; all without.")] = "",
    scratch: Annotated[Path | None, typer.Option(help="Where files are written; a temporary folder.")] = None,
) -> None:
    """Load large files of every kind: seconds, and the most memory that it takes."""
    chosen = [kind.strip() for kind in only.split(";") if kind.strip()] or list(KINDS)
    for kind in chosen:
        if kind not in KINDS:
            fail(
                f"--only: unknown kind {kind!r}; expected some of {'; '.join(KINDS)}, with semicolons between them"
            )
    found = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for kind in chosen:
            found[kind] = measure(kind, rows, Path(folder))
            # After each kind: what was measured stays if a later one is interrupted.
            save_results(
                output, "python -m harness.loading", _page(rows, found), {"rows": rows, "kinds": found}
            )
            Console(markup=False, stderr=True).print(f"{kind}: {found[kind]}")


if __name__ == "__main__":
    if not os.path.exists("/proc/self/status"):
        fail("reads /proc, which is Linux's")
    run_main(main)
