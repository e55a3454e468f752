"""Any workload as plain Python, without asv: ``python -m benchmarks spmm`` (a regular expression of names)."""

from __future__ import annotations

import typer

from harness.bench import bench

if __name__ == "__main__":
    typer.run(bench)
