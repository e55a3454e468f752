"""One layer's training step, sparse and dense, measured in one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import sparsecore
from sparsecore.measure import interleaved

__all__ = ["LAYERS", "compare_layer"]

Case = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def _linear(batch: int) -> Callable[[float | None], Case]:
    def build(density: float | None) -> Case:
        rows, cols = 3654, 600  # MultVAE's decoder on ml-1m
        x = torch.randn(batch, cols, requires_grad=True)
        layer: nn.Module = nn.Linear(cols, rows)
        if density is not None:
            layer = sparsecore.SparseLinear(cols, rows, density=density)
        return layer, lambda module: module(x).sum()

    return build


def _embedding(density: float | None) -> Case:
    rows, dim = 100_000, 64
    ids = torch.randint(0, rows, (2048,))
    table: nn.Module = nn.Embedding(rows, dim)
    if density is not None:
        table = sparsecore.SparseEmbedding(rows, dim, density=density)
    return table, lambda module: module(ids).sum()


LAYERS: dict[str, Callable[[float | None], Case]] = {
    "linear-3654x600-b16": _linear(16),
    "linear-3654x600-b256": _linear(256),
    "embedding-100000x64-b2048": _embedding,
}


def compare_layer(name: str, density: float, seconds: float = 1.0) -> dict[str, float]:
    """Forward, backward and fused Adam of one layer at a density, against the dense layer.

    Returns:
        ``macs`` per step (forward and backward); ``macs_vs_dense``; ``bytes_vs_dense`` of weights, indices, gradients
        and optimizer state; ``time_vs_dense``, ratio of the minima of interleaved samples. All: lower is better.
        A ratio of counts is 0 where neither form multiplies (embedding lookups).
    """
    macs, sizes, steps = {}, {}, {}
    for kind, share in (("dense", None), ("sparse", density)):
        torch.manual_seed(0)
        module, loss = LAYERS[name](share)
        optimizer = torch.optim.Adam(module.parameters(), fused=True)

        def step(
            module: nn.Module = module,
            loss: Callable[[nn.Module], Tensor] = loss,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            optimizer.zero_grad()
            loss(module).backward()
            optimizer.step()

        counter = sparsecore.MacCounter()
        with counter.phase("step"):
            step()
        macs[kind], steps[kind] = counter.total, step
        sizes[kind] = sparsecore.resident_bytes(module, optimizer).total
    times = interleaved(steps, seconds=seconds)
    return {
        "macs": macs["sparse"],
        "macs_vs_dense": macs["sparse"] / macs["dense"] if macs["dense"] else 0.0,
        "bytes_vs_dense": sizes["sparse"] / sizes["dense"],
        "time_vs_dense": times["sparse"].minimum / times["dense"].minimum,
    }
