"""What a process takes to train a large embedding table: dense and sparse, each in a process of its own.

    python -m harness.memory --output results/memory

Peak and resident memory as the operating system counts them, beside the exact count of weights, indices, gradients and
optimizer state. Linux only (reads /proc).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harness.command import new_results, run_main, shares
from recsys.results import save_results

__all__ = ["main", "measure"]

_PROGRAM = """
import json, sys
from pathlib import Path
import torch
import sparsecore

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

def step(table, optimizer):
    optimizer.zero_grad()
    table(torch.randint(0, table.num_embeddings, (4096,))).square().sum().backward()
    optimizer.step()

rows, cols, density = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
# Kernels are compiled, and libraries loaded, before the count begins.
small = sparsecore.SparseEmbedding(1000, cols, density=0.25)
optimizer = torch.optim.Adam(small.parameters(), fused=True)
explorer = sparsecore.DynamicSparsity(small, optimizer, interval=1, total_steps=9)
step(small, optimizer)
explorer.step()
del small, optimizer, explorer
base = status("VmRSS")
if density == 1:
    table = torch.nn.Embedding(rows, cols)
else:
    table = sparsecore.SparseEmbedding(rows, cols, density=density)
optimizer = torch.optim.Adam(table.parameters(), fused=True)
for _ in range(3):
    step(table, optimizer)
found = {"counted": sparsecore.resident_bytes(table, optimizer).total}
found |= {"resident": status("VmRSS") - base, "peak": status("VmHWM") - base}
if density < 1:
    explorer = sparsecore.DynamicSparsity(table, optimizer, interval=1, total_steps=9)
    step(table, optimizer)
    explorer.step()
found["peak with exploration"] = status("VmHWM") - base
print(json.dumps(found))
"""


def measure(rows: int, cols: int, density: float) -> dict[str, int]:
    """Bytes that training an embedding table of rows x cols with Adam takes, at a density (1: ``nn.Embedding``).

    Returns:
        ``counted``: weights, indices, gradients and optimizer state, exact; ``resident``: growth of the process while
        training; ``peak``: the highest growth, construction and steps included; ``peak with exploration``: the same
        after an exploration that exchanges half of the weights.

    Raises:
        RuntimeError: if the measuring process fails; its output is in the message.
    """
    arguments = [sys.executable, "-c", _PROGRAM, str(rows), str(cols), str(density)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measuring process ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def main(
    output: Annotated[
        Path, typer.Option(callback=new_results, help="Results are written to OUTPUT.json and OUTPUT.md.")
    ],
    rows: Annotated[int, typer.Option(min=1)] = 2_000_000,
    cols: Annotated[int, typer.Option(min=1)] = 64,
    densities: Annotated[str, typer.Option(callback=shares, help="Comma-separated.")] = "0.5,0.25,0.1",
) -> None:
    """Measure the memory of training an embedding table, dense and at several densities."""
    found: dict[str, dict[str, Any]] = {}
    for density in [1.0, *map(float, densities.split(","))]:
        found[f"{density:g}"] = measure(rows, cols, density)
        Console(markup=False, stderr=True).print(f"density {density:g}: {found[f'{density:g}']}")
    dense, keys = found["1"], list(found["1"])
    lines = [
        f"# Memory of training an embedding table of {rows:,} x {cols} with Adam, float32",
        "",
        "In MB (10^6 bytes) and as a share of dense. counted: weights, indices, gradients, optimizer state, exactly;",
        "resident and peak: growth of the process, as the operating system counts it.",
        "",
        "| density | " + " | ".join(keys) + " |",
        "|---|" + "---|" * len(keys),
    ]
    for name, row in found.items():
        lines.append(
            f"| {name} | " + " | ".join(f"{row[k] / 1e6:,.0f} ({row[k] / dense[k]:.3f})" for k in keys) + " |"
        )
    save_results(output, "python -m harness.memory", lines, {"rows": rows, "cols": cols, "bytes": found})


if __name__ == "__main__":
    run_main(main)
