"""Which index encoding is faster, and how large each is: the grounds of `sparsecore.encoding.choose_encoding`.

    python -m harness.encodings --threads 1,2 --output results/encodings

writes ``OUTPUT.json`` and ``OUTPUT.md``. Every operation runs on the same weight in both encodings, in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from harness.command import new_results, run_main, whole_numbers
from recsys.results import save_results
from sparsecore import Pattern, ops
from sparsecore.encoding import choose_encoding, encode
from sparsecore.measure import interleaved

__all__ = ["DENSITIES", "compare", "main"]

DENSITIES = (0.02, 0.04, 0.0625, 0.1, 0.25, 0.5, 0.9)
_TABLE, _LAYER = (500_000, 64), (20_000, 600)
_LOOKUPS, _BATCH, _IN_BAG, _FEW = 16_384, 64, 100, (1, 4, 16)

Index = tuple[Tensor, Tensor | None]
Runs = dict[str, Callable[[], object]]


def _of_table(values: Tensor, index: Index, shape: tuple[int, int]) -> Runs:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(shape[0], (_LOOKUPS,), generator=generator)
    grad, queries = torch.randn(_LOOKUPS, shape[1]), torch.randn(_BATCH, shape[1])
    return {
        "gather": lambda: ops.gather(values, *index, ids, shape[1]),
        "gather_dot": lambda: ops.gather_dot(values, *index, ids, values, *index, ids.flip(0), shape[1]),
        "gradient of rows": lambda: ops.touched(*index, ids, grad, values.numel()),
        "score_topk": lambda: ops.score_topk(queries, values, *index, 20),
    }


def _of_layer(values: Tensor, index: Index, shape: tuple[int, int]) -> Runs:
    runs: Runs = {}
    for batch in (_BATCH, *_FEW):
        x, dy = torch.randn(batch, shape[1]), torch.randn(batch, shape[0])
        suffix = "" if batch == _BATCH else f", B = {batch}"
        runs |= {
            f"spmm{suffix}": partial(ops.spmm, values, *index, x),
            f"spmm_t{suffix}": partial(ops.spmm_t, values, *index, dy, shape[1]),
            f"sddmm{suffix}": partial(ops.sddmm, *index, dy, x, values.numel()),
        }
    return runs


def _of_bags(values: Tensor, index: Index, shape: tuple[int, int]) -> Runs:
    """An encoder's input: each example a bag of rows."""
    generator = torch.Generator().manual_seed(1)
    entries = _BATCH * _IN_BAG
    ids, weights = torch.randint(shape[0], (entries,), generator=generator), torch.randn(entries)
    offsets, grad = torch.arange(0, entries + 1, _IN_BAG), torch.randn(_BATCH, shape[1])
    return {
        "bag": lambda: ops.bag(values, *index, ids, offsets, weights, shape[1]),
        "bag_grad": lambda: ops.bag_grad(*index, ids, offsets, weights, grad, values.numel()),
        "bag_dot": lambda: ops.bag_dot(values, *index, ids, offsets, grad),
    }


def compare(density: float, threads: list[int], seconds: float, shrink: int = 1) -> list[dict[str, Any]]:
    """A row for a table, one for bags and one for a layer, and each number of threads.

    Returns:
        ``ratio`` by operation: time with csr / time with the bitmap; bits of index a position, and the choice.
    """
    rows, before = [], torch.get_num_threads()
    kinds = (("table", _TABLE, _of_table), ("bags of", _LAYER, _of_bags), ("layer", _LAYER, _of_layer))
    for kind, (n_rows, cols), operations in kinds:
        shape = (n_rows // shrink, cols)
        pattern = Pattern.random(shape, density, generator=torch.Generator().manual_seed(0))
        values, bitmap = torch.randn(pattern.nnz), encode(pattern.crow, pattern.col, cols)
        csr = operations(values, (pattern.crow, pattern.col), shape)
        bits = operations(values, (bitmap, None), shape)
        csr_bytes = sum(t.numel() * t.element_size() for t in (pattern.crow, pattern.col))
        try:
            for n in threads:
                torch.set_num_threads(n)
                times = {
                    name: interleaved({"csr": csr[name], "bitmap": bits[name]}, seconds, least=1)
                    for name in csr
                }
                rows.append(
                    {
                        "weight": f"{kind} {shape[0]} x {cols}",
                        "density": density,
                        "threads": n,
                        "csr bits": 8 * csr_bytes / (shape[0] * cols),
                        "bitmap bits": 8 * bitmap.numel() * bitmap.element_size() / (shape[0] * cols),
                        "choice": choose_encoding(pattern.nnz, shape, table=kind == "table"),
                        "ratio": {name: t["csr"].minimum / t["bitmap"].minimum for name, t in times.items()},
                    }
                )
        finally:
            torch.set_num_threads(before)
    return rows


def _page(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "# Index encodings",
        "",
        "Time with csr / time with the bitmap, minima of interleaved samples: above 1 the bitmap is faster. Bits are",
        f"those of the index for each position of the weight. Tables: {_LOOKUPS} lookups or {_BATCH} queries; bags:",
        f"{_BATCH} of {_IN_BAG} rows, as in an encoder's input; layers:",
        f"batch {_BATCH} where no other is named. *Choice* is what a new weight gets on this processor.",
    ]
    for weight in dict.fromkeys(r["weight"] for r in rows):
        part = [r for r in rows if r["weight"] == weight]
        names = list(part[0]["ratio"])
        lines += [
            "",
            f"## {weight}",
            "",
            "| density | threads | csr, bits | bitmap, bits | " + " | ".join(names) + " | choice |",
            "|" + "---|" * (5 + len(names)),
        ]
        lines += [
            f"| {r['density']:g} | {r['threads']} | {r['csr bits']:.2f} | {r['bitmap bits']:.2f} | "
            + " | ".join(f"{r['ratio'][name]:.2f}" for name in names)
            + f" | {r['choice']} |"
            for r in part
        ]
    return lines


def main(
    threads: Annotated[
        str, typer.Option(callback=whole_numbers, help="Numbers of threads, comma-separated.")
    ] = "1,2",
    output: Annotated[
        Path | None, typer.Option(callback=new_results, help="Write OUTPUT.json and OUTPUT.md.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Timing of each operation.")] = 0.5,
    quick: Annotated[bool, typer.Option(help="Tiny shapes: everything runs once.")] = False,
) -> None:
    """Measure every operation in both encodings."""
    console, rows = Console(markup=False, stderr=True), []
    for density in DENSITIES:
        console.print(f"density {density:g}")
        rows += compare(
            density, [int(n) for n in threads.split(",")], 0.0 if quick else seconds, 200 if quick else 1
        )
    page = _page(rows)
    if output is not None:
        save_results(output, "python -m harness.encodings", page, {"rows": rows})
    else:
        print("\n".join(page))


if __name__ == "__main__":
    run_main(main)
