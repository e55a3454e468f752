"""Any workload as plain Python, without asv: ``python -m benchmarks spmm`` (a regular expression of names)."""

from __future__ import annotations

from harness.bench import bench
from harness.command import run_main

if __name__ == "__main__":
    run_main(bench)
