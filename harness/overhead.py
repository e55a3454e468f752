"""What a call costs beyond its arithmetic: our modules against torch's on tiny shapes, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from sparsecore import SparseEmbedding, SparseLinear, ops
from sparsecore.measure import interleaved

__all__ = ["measure_overhead"]

_CALLS = 20  # in a sample


def measure_overhead(seconds: float) -> list[dict[str, float | str]]:
    """Microseconds of forward and backward: torch's function, our operator, our module, and what ours adds."""
    generator = torch.Generator().manual_seed(0)
    ids, x = torch.randint(30, (4,), generator=generator), torch.randn(4, 8)
    table, weight = nn.Parameter(torch.randn(30, 8)), nn.Parameter(torch.randn(8, 8))
    embedding = SparseEmbedding(30, 8, density=0.5, generator=generator)
    linear = SparseLinear(8, 8, bias=False, density=0.5, generator=generator)
    pairs: dict[str, dict[str, Callable[[], torch.Tensor]]] = {
        "embedding, 4 rows of 30 x 8": {
            "torch": lambda: F.embedding(ids, table),
            "operator": lambda: ops.gather(embedding.values, *embedding.index, ids, 8),
            "module": lambda: embedding(ids),
        },
        "linear, 8 x 8, batch 4": {
            "torch": lambda: F.linear(x, weight),
            "operator": lambda: ops.spmm(linear.values, *linear.index, x),
            "module": lambda: linear(x),
        },
    }
    grad = torch.ones(4, 8)

    def repeated(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(_CALLS):
                forward().backward(grad)

        return run

    rows: list[dict[str, float | str]] = []
    for name, forms in pairs.items():
        times = interleaved({form: repeated(f) for form, f in forms.items()}, seconds=seconds)
        us = {form: 1e6 * t.minimum / _CALLS for form, t in times.items()}
        row: dict[str, float | str] = {"call": name, "threads": torch.get_num_threads(), **us}
        rows.append(row | {"added": us["operator"] - us["torch"], "module added": us["module"] - us["torch"]})
    return rows
