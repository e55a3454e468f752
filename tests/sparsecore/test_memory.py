"""What a process really takes: an embedding table of 2 M x 64 with Adam, dense against sparse at density 0.25."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import sparsecore

PROGRAM = """
import json, sys
import torch
import sparsecore
from pathlib import Path

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

torch.set_num_threads(2)
rows, cols = 2_000_000, 64
def step(table, optimizer, explorer=None):
    optimizer.zero_grad(set_to_none=False)
    table(torch.randint(0, table.num_embeddings, (4096,))).square().sum().backward()
    optimizer.step()
    if explorer is not None:
        explorer.step()

# Kernels are compiled, and libraries loaded, before the count begins.
small = sparsecore.SparseEmbedding(1000, cols, density=0.25)
step(small, torch.optim.Adam(small.parameters(), fused=True))
base = status("VmRSS")
if sys.argv[1] == "dense":
    table, explorer = torch.nn.Embedding(rows, cols), None
else:
    table = sparsecore.SparseEmbedding(rows, cols, density=0.25)
optimizer = torch.optim.Adam(table.parameters(), fused=True)
for _ in range(3):
    step(table, optimizer)
counted = sparsecore.resident_bytes(table, optimizer)
print(json.dumps({"peak": status("VmHWM") - base, "resident": status("VmRSS") - base, "counted": counted.total}))
"""


def test_counted_bytes_at_a_quarter() -> None:
    """weights + gradients + two moments + indices: 0.25 + (1 byte a nonzero + 4 bytes a row) / 16 bytes a position."""
    table = sparsecore.SparseEmbedding(20_000, 64, density=0.25)
    dense = torch.nn.Embedding(20_000, 64)
    totals = []
    for module in (table, dense):
        optimizer = torch.optim.Adam(module.parameters())
        module(torch.arange(100)).sum().backward()
        optimizer.step()
        totals.append(sparsecore.resident_bytes(module, optimizer).total)
    assert totals[0] / totals[1] < 0.28
    layer, linear = sparsecore.SparseLinear(600, 5000, density=0.25), torch.nn.Linear(600, 5000)
    totals = []
    for module in (layer, linear):
        optimizer = torch.optim.Adam(module.parameters())
        module(torch.randn(2, 600)).sum().backward()
        optimizer.step()
        totals.append(sparsecore.resident_bytes(module, optimizer).total)
    assert totals[0] / totals[1] < 0.32


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from /proc")
def test_peak_of_a_process_at_a_quarter() -> None:
    measured = {}
    for kind in ("dense", "sparse"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        measured[kind] = json.loads(done.stdout)
    dense, sparse = measured["dense"], measured["sparse"]
    assert sparse["counted"] / dense["counted"] <= 0.32, measured
    assert sparse["resident"] / dense["resident"] <= 0.32, measured
    assert sparse["peak"] / dense["peak"] <= 0.32, measured
