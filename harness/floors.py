"""Where sparse may lose: dense products at high density, and torch.sparse on processors without AVX-512.

    python -m harness.floors --output results/floors

writes ``OUTPUT.json`` and ``OUTPUT.md``. Both parts run with and without AVX-512 code (SPARSECORE_SIMD), each in a
process of its own, because kernels are compiled for one of them. Ratio = time of the fastest other form / ours, of the
minima of interleaved samples (higher is better).

*dense*: layers at batches of 256 and more, against the best dense form; the floor is 0.9.
*torch.sparse*: against CSR with int32 indices; the floor is 1. It gets what a layer has, activations with an example a
row and the weight once; its results stay transposed, ours do not. *given transposed*: what the ratio would be if the
activations lay transposed already and, for ``spmm_t``, a second copy of the weight did.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from harness.command import new_results, run_main, some_of, whole_numbers
from harness.operands import Forms, Weight
from recsys.results import save_results
from sparsecore import ops
from sparsecore.measure import interleaved

__all__ = ["FLOORS", "PARTS", "main", "measure"]

GIVEN = "given transposed"
FLOORS = {"dense": 0.9, "torch.sparse": 1.0}
OPERATIONS = ("spmm", "spmm_t", "sddmm")
_LAYERS = ((20_000, 600), (600, 20_000), (1024, 1024), (600, 200))
# Shapes, densities and batches of the parts, and those of a run that only has to run.
PARTS = {
    "dense": (_LAYERS, (0.98, 0.9, 0.7, 0.5), (256, 1024)),
    "torch.sparse": (_LAYERS, (0.01, 0.1, 0.5), (1, 4, 16, 64)),
}
QUICK = {part: (((60, 33),), (0.5,), (3,)) for part in PARTS}


def against_dense(operation: str, weight: Weight, table: Tensor, batch: int) -> Forms:
    """Ours and the dense forms of an operation."""
    x, dy = torch.randn(batch, weight.cols), torch.randn(batch, weight.rows)
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(table)
    dense = {
        "spmm": {
            "mm(out=)": lambda: torch.mm(x, table.t(), out=y),
            "F.linear": lambda: F.linear(x, table),
        },
        "spmm_t": {"mm(out=)": lambda: torch.mm(dy, table, out=dx)},
        "sddmm": {"mm(out=)": lambda: torch.mm(dy.t(), x, out=dw)},
    }
    return Forms(ours=_ours(operation, weight, x, dy), dense=dense[operation])


def against_torch_sparse(operation: str, weight: Weight, csr: Tensor, turned: Tensor, batch: int) -> Forms:
    """Ours and torch.sparse's form of an operation; ``turned`` is the transposed weight."""
    x, dy = torch.randn(batch, weight.cols), torch.randn(batch, weight.rows)
    xt, dyt = x.t().contiguous(), dy.t().contiguous()
    # torch turns operands by itself, or is given them turned: whichever is faster.
    others = {
        "spmm": {"CSR @ X.T": lambda: csr @ x.t(), "CSR @ copy of X.T": lambda: csr @ x.t().contiguous()},
        "spmm_t": {"CSR.T @ dY.T": lambda: csr.t() @ dy.t()},
        "sddmm": {"sampled_addmm": lambda: torch.sparse.sampled_addmm(csr, dy.t(), x, beta=0.0)},
    }
    given = {
        "spmm": lambda: csr @ xt,
        "spmm_t": lambda: turned @ dyt,
        "sddmm": lambda: torch.sparse.sampled_addmm(csr, dyt, x, beta=0.0),
    }
    if batch == 1:  # a vector has a faster path than a matrix of one column
        others["spmm"]["CSR @ x"] = lambda: csr @ x[0]
        others["spmm_t"]["CSR.T @ dy"] = lambda: csr.t() @ dy[0]
    forms = {**others[operation], GIVEN: given[operation]}
    return Forms(ours=_ours(operation, weight, x, dy), dense={}, others=forms)


def _ours(operation: str, weight: Weight, x: Tensor, dy: Tensor) -> Any:
    return {
        "spmm": lambda: ops.spmm(weight.values, *weight.index, x),
        "spmm_t": lambda: ops.spmm_t(weight.values, *weight.index, dy, weight.cols),
        "sddmm": lambda: ops.sddmm(*weight.index, dy, x, weight.nnz),
    }[operation]


def _forms(part: str, weight: Weight, batches: tuple[int, ...]) -> Iterator[tuple[str, int, Forms]]:
    if part == "dense":
        table = weight.dense()
        for operation, batch in itertools.product(OPERATIONS, batches):
            yield operation, batch, against_dense(operation, weight, table, batch)
    else:
        csr, turned = weight.csr(), weight.turned_csr()
        for operation, batch in itertools.product(OPERATIONS, batches):
            yield operation, batch, against_torch_sparse(operation, weight, csr, turned, batch)


def measure(part: str, threads: list[int], seconds: float, quick: bool = False) -> list[dict[str, Any]]:
    """Time a part in this process.

    Returns:
        A row for each shape, density, operation, batch and number of threads: the ``ratio`` to the fastest ``other``
        form, the ratio ``given transposed`` operands, ``ms``, and the ``floor``.
    """
    rows: list[dict[str, Any]] = []
    shapes, densities, batches = (QUICK if quick else PARTS)[part]
    before = torch.get_num_threads()
    try:
        for shape, density in itertools.product(shapes, densities):
            weight = Weight(*shape, density)
            for operation, batch, forms in _forms(part, weight, batches):
                for n_threads in threads:
                    torch.set_num_threads(n_threads)
                    others = {**forms.dense, **forms.others}
                    times = interleaved(
                        {"ours": forms.ours, **others}, seconds=seconds, least=1 if quick else 5
                    )
                    best = min(others.keys() - {GIVEN}, key=lambda name: times[name].minimum)
                    rows.append(
                        {
                            "part": part,
                            "operation": operation,
                            "shape": f"{shape[0]} x {shape[1]}",
                            "density": density,
                            "batch": batch,
                            "encoding": "bitmap" if weight.index[1] is None else "csr",
                            "threads": n_threads,
                            "ratio": times[best].minimum / times["ours"].minimum,
                            "median ratio": times[best].median / times["ours"].median,
                            "other": best,
                            GIVEN: times[GIVEN].minimum / times["ours"].minimum if GIVEN in times else None,
                            "ms": 1e3 * times["ours"].minimum,
                            "floor": FLOORS[part],
                        }
                    )
            if not quick:  # large operands must not wait for the collector
                gc.collect()
    finally:
        torch.set_num_threads(before)
    return rows


def _page(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "# Floors",
        "",
        "Ratio: time of the fastest other form / ours, minima of interleaved samples (*of medians* beside it).",
        "Rows below their floor are marked. *Given transposed*: if torch.sparse found its activations transposed",
        "already.",
    ]
    for part, simd in dict.fromkeys((r["part"], r["simd"]) for r in rows):
        chosen = [r for r in rows if (r["part"], r["simd"]) == (part, simd)]
        below = sum(r["ratio"] < r["floor"] for r in chosen)
        lines += [
            "",
            f"## Against {part}, {simd} code",
            "",
            f"{below} of {len(chosen)} below {FLOORS[part]:g}; the lowest {min(r['ratio'] for r in chosen):.2f}.",
            "",
            "| operation | shape | density | batch | encoding | threads | ratio | of medians | given transposed "
            "| other | ms | |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['operation']} | {r['shape']} | {r['density']:g} | {r['batch']} | {r['encoding']} | {r['threads']} "
            f"| {r['ratio']:.2f} | {r['median ratio']:.2f} | {format(r[GIVEN], '.2f') if r[GIVEN] else ''} "
            f"| {r['other']} | {r['ms']:.3g} "
            f"| {'below' if r['ratio'] < r['floor'] else ''} |"
            for r in chosen
        ]
    return lines


def main(
    threads: Annotated[
        str, typer.Option(callback=whole_numbers, help="Numbers of threads, comma-separated.")
    ] = "1,2",
    output: Annotated[
        Path | None, typer.Option(callback=new_results, help="Write OUTPUT.json and OUTPUT.md.")
    ] = None,
    simd: Annotated[
        str, typer.Option(callback=some_of(("native", "portable")), help="Code to measure, comma-separated.")
    ] = "native,portable",
    part: Annotated[
        str, typer.Option(callback=some_of(PARTS), help="Comparisons, comma-separated.")
    ] = ",".join(PARTS),
    seconds: Annotated[float, typer.Option(help="Timing of each row, at least.")] = 0.2,
    quick: Annotated[
        bool, typer.Option(help="Tiny shapes: everything runs once, nothing is judged.")
    ] = False,
) -> None:
    """Measure both floors, for each kind of code in a process of its own."""
    rows: list[dict[str, Any]] = []
    for name, mode in itertools.product(part.split(","), simd.split(",")):
        request = json.dumps([name, [int(n) for n in threads.split(",")], 0.0 if quick else seconds, quick])
        done = subprocess.run(
            [sys.executable, "-m", "harness.floors", "--here", request],
            env={**os.environ, "SPARSECORE_SIMD": mode},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        rows += [{**row, "simd": mode} for row in json.loads(done.stdout)]
    page = _page(rows)
    if output is not None:
        save_results(output, "python -m harness.floors", page, {"quick": quick, "rows": rows})
    else:
        print("\n".join(page))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        run_main(main)
