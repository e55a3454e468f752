"""What a call costs beyond its arithmetic: our modules against torch's on tiny shapes, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from sparsecore import SparseEmbedding, SparseLinear, gather_dot, ops
from sparsecore.measure import interleaved

__all__ = ["measure_overhead"]

_CALLS = 20  # in a sample


def measure_overhead(seconds: float) -> list[dict[str, float | str]]:
    """Microseconds of forward and backward: torch's function, our operator, our module, and what ours adds."""
    generator = torch.Generator().manual_seed(0)
    ids, others = torch.randint(30, (2, 4), generator=generator)
    x = torch.randn(4, 8)
    table, weight = nn.Parameter(torch.randn(30, 8)), nn.Parameter(torch.randn(8, 8))
    embedding = SparseEmbedding(30, 8, density=0.5, generator=generator)
    linear = SparseLinear(8, 8, bias=False, density=0.5, generator=generator)
    lazy = SparseEmbedding(30, 8, density=0.5, sparse=True, generator=generator)
    pairs: dict[str, dict[str, Callable[[], torch.Tensor]]] = {
        "embedding, 4 rows of 30 x 8": {
            "torch": lambda: F.embedding(ids, table),
            "operator": lambda: ops.gather(embedding.values, *embedding.index, ids, 8),
            "module": lambda: embedding(ids),
        },
        "the same with sparse gradients": {
            "torch": lambda: F.embedding(ids, table, sparse=True),
            "operator": lambda: ops.gather_touched(lazy.values, *lazy.index, ids, 8),
            "module": lambda: lazy(ids),
        },
        "products of 4 pairs of its rows": {
            "torch": lambda: (F.embedding(ids, table) * F.embedding(others, table)).sum(1),
            "operator": lambda: ops.gather_dot(
                embedding.values, *embedding.index, ids, embedding.values, *embedding.index, others, 8
            ),
            "module": lambda: gather_dot(embedding, ids, embedding, others),
        },
        "linear, 8 x 8, batch 4": {
            "torch": lambda: F.linear(x, weight),
            "operator": lambda: ops.spmm(linear.values, *linear.index, x),
            "module": lambda: linear(x),
        },
    }

    parameters = [table, weight, embedding.values, linear.values, lazy.values]

    def repeated(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        found = forward()
        grad = torch.ones_like(found)
        found.backward(grad)
        own = next(p for p in parameters if p.grad is not None)
        own.grad = None

        def run() -> None:
            for _ in range(_CALLS):
                forward().backward(grad)
                own.grad = None

        return run

    rows: list[dict[str, float | str]] = []
    for name, forms in pairs.items():
        times = interleaved({form: repeated(f) for form, f in forms.items()}, seconds=seconds)
        us = {form: 1e6 * t.minimum / _CALLS for form, t in times.items()}
        row: dict[str, float | str] = {"call": name, "threads": torch.get_num_threads(), **us}
        rows.append(row | {"added": us["operator"] - us["torch"], "module added": us["module"] - us["torch"]})
    return rows
