"""More operations on a device, measured after all else: bags, sparse gradients, hops of a graph, a convolution.

As in `harness.gpu_forms`: each is a function of its input's number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsecore
from harness.gpu_operands import (
    DENSITIES,
    Forms,
    Operation,
    Run,
    bipartite,
    ids_of,
    inputs,
    normal,
    relative_error,
    weight_of,
)
from sparsecore import ops

__all__ = ["FURTHER"]


def bag(density: float, device: str, rows: int, cols: int, bags: int, length: int) -> Forms:
    """Weighted sums of rows, all of the same number of them, as an encoder sums what its users have seen."""
    weight = weight_of(rows, cols, density, device)
    table, ids, offsets = weight.dense, ids_of(weight, bags * length), _offsets(bags, length, device)
    shares = normal(bags * length, device=device)
    return Forms(
        ours=lambda i: ops.bag(weight.values, *weight.index, ids(i), offsets, shares(i), cols),
        dense={
            "F.embedding_bag": lambda i: F.embedding_bag(
                ids(i),
                table,
                offsets,
                mode="sum",
                per_sample_weights=shares(i),
                include_last_offset=True,
            )
        },
    )


def bag_grad(density: float, device: str, rows: int, cols: int, bags: int, length: int) -> Forms:
    """The gradient of `bag` in the table; torch's is asked for again and again of one forward pass."""
    weight = weight_of(rows, cols, density, device)
    ids, offsets = ids_of(weight, bags * length), _offsets(bags, length, device)
    shares, grad = normal(bags * length, device=device), normal(bags, cols, device=device)
    table, kept = weight.dense.detach().requires_grad_(), torch.zeros(rows, cols, device=device)
    numbers, sources = iter(range(10**9)), torch.arange(bags, device=device).repeat_interleave(length)

    def summed() -> Tensor:
        i = next(numbers)
        return F.embedding_bag(
            ids(i), table, offsets, mode="sum", per_sample_weights=shares(i), include_last_offset=True
        )

    sums = inputs(summed)
    return Forms(
        ours=lambda i: ops.bag_grad(*weight.index, ids(i), offsets, shares(i), grad(i), weight.nnz),
        dense={
            "embedding_bag backward": lambda i: torch.autograd.grad(
                sums(i), table, grad(i), retain_graph=True
            )[0],
            "zero_ + index_add_": lambda i: kept.zero_().index_add_(
                0, ids(i), grad(i)[sources] * shares(i).unsqueeze(1)
            ),
        },
        error=weight.at_nonzeros,
    )


def bag_dot(density: float, device: str, rows: int, cols: int, bags: int, length: int) -> Forms:
    """The gradient of `bag` in the shares: each entry's row times the gradient of its bag."""
    weight = weight_of(rows, cols, density, device)
    table, ids, offsets = weight.dense, ids_of(weight, bags * length), _offsets(bags, length, device)
    grad, sources = (
        normal(bags, cols, device=device),
        torch.arange(bags, device=device).repeat_interleave(length),
    )
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return Forms(
        ours=lambda i: ops.bag_dot(weight.values, *weight.index, ids(i), offsets, grad(i)),
        dense={
            "(E[ids] * grad).sum(1)": lambda i: (F.embedding(ids(i), table) * grad(i)[sources]).sum(1),
            "embedding_bag backward": lambda i: backward(grad(i), table, ids(i), offsets[:-1], sources, 0),
        },
    )


def _offsets(bags: int, length: int, device: str) -> Tensor:
    return torch.arange(bags + 1, device=device) * length


def touched(density: float, device: str, rows: int, cols: int, batch: int) -> Forms:
    """The sparse gradient of looked-up rows, each row once, as an optimizer needs it.

    ``nn.Embedding(sparse=True)`` leaves the sum over a row's occurrences to who reads its gradient; ours has it. So the
    dense form includes ``coalesce()``; without it is another form.
    """
    weight = weight_of(rows, cols, density, device)
    ids, grad = ids_of(weight, batch), normal(batch, cols, device=device)
    backward = torch.ops.aten.embedding_sparse_backward

    def error(ours: Any, reference: Tensor) -> float:
        whole = reference.to_dense()
        if isinstance(ours, Tensor):
            return relative_error(ours.to_dense(), whole)
        places, values = ours
        return weight.at_nonzeros(values.new_zeros(weight.nnz).index_copy(0, places, values), whole)

    return Forms(
        ours=lambda i: ops.touched(*weight.index, ids(i), grad(i), weight.nnz),
        dense={"sparse backward + coalesce": lambda i: backward(grad(i), ids(i), rows, -1, False).coalesce()},
        others={"dense, not coalesced": lambda i: backward(grad(i), ids(i), rows, -1, False)},
        error=error,
    )


def propagate_rows(
    density: None, device: str, users: int, items: int, edges: int, dim: int, batch: int
) -> Forms:
    """Some nodes' rows of a hop: those of a batch, the last hop of LightGCN. torch's CSR has no rows to choose."""
    graph, wide = bipartite(users, items, edges, device)
    arrays, x = graph.arrays(), normal(graph.n_nodes, dim, device=device)
    nodes = _nodes(graph.n_nodes, batch, device)
    return Forms(
        ours=lambda i: ops.propagate_rows(*arrays, x(i), nodes(i)),
        dense={"torch.sparse CSR int64, then rows": lambda i: (wide @ x(i))[nodes(i)]},
    )


def propagate_rows_t(
    density: None, device: str, users: int, items: int, edges: int, dim: int, batch: int
) -> Forms:
    """The gradient of `propagate_rows`, over a graph that is symmetric."""
    graph, wide = bipartite(users, items, edges, device)
    arrays, grad = graph.arrays(), normal(batch, dim, device=device)
    nodes, whole = _nodes(graph.n_nodes, batch, device), torch.zeros(graph.n_nodes, dim, device=device)
    return Forms(
        ours=lambda i: ops.propagate_rows_t(*arrays, grad(i), nodes(i)),
        dense={
            "rows, then torch.sparse CSR int64": lambda i: (
                wide @ whole.zero_().index_add_(0, nodes(i), grad(i))
            )
        },
    )


def _nodes(count: int, batch: int, device: str) -> Callable[[int], Tensor]:
    return inputs(lambda: torch.randint(count, (batch,), device=device))


def propagate_mean(
    density: float, device: str, users: int, items: int, edges: int, dim: int, hops: int
) -> Forms:
    """Mean of a sparse table E and its hops, ``(E + A E + ..) / (hops + 1)``; torch's CSR has a dense table."""
    graph, wide = bipartite(users, items, edges, device)
    weight = weight_of(graph.n_nodes, dim, density, device)
    operands = (*graph.arrays(), weight.values, *weight.index)
    return Forms(
        ours=lambda i: ops.propagate_mean(*operands, dim, hops),
        dense=_horner(wide, lambda i: weight.dense, hops),
    )


def propagate_mean_grad(
    density: float, device: str, users: int, items: int, edges: int, dim: int, hops: int
) -> Forms:
    """The gradient of `propagate_mean` in the table: the same sum over the graph, which is symmetric."""
    graph, wide = bipartite(users, items, edges, device)
    weight = weight_of(graph.n_nodes, dim, density, device)
    arrays, grad = graph.arrays(), normal(graph.n_nodes, dim, device=device)
    return Forms(
        ours=lambda i: ops.propagate_mean_grad(*arrays, *weight.index, grad(i), hops, weight.nnz),
        dense=_horner(wide, grad, hops),
        error=weight.at_nonzeros,
    )


def _horner(wide: Tensor, x: Callable[[int], Tensor], hops: int) -> dict[str, Run]:
    def by_sum(i: int) -> Tensor:
        total = x(i)
        for _ in range(hops):
            total = x(i) + wide @ total
        return total / (hops + 1)

    def by_addmm(i: int) -> Tensor:
        total = x(i)
        for _ in range(hops):
            total = torch.addmm(x(i), wide, total)
        return total / (hops + 1)

    return {"torch.sparse CSR int64": by_sum, "torch.sparse CSR int64, addmm": by_addmm}


def conv(density: float, device: str, channels: int, side: int, batch: int) -> Forms:
    """A convolution of 3 x 3, forward and backward: output, gradients in the weights and in the input."""
    layer = sparsecore.SparseConv2d(
        channels,
        channels,
        3,
        padding=1,
        bias=False,
        device=device,
        density=density,
        generator=torch.Generator().manual_seed(0),
    )
    if torch.device(device).type == "cpu":
        layer.set_encoding("csr")  # what the torch backend reads as it is
    shape = (batch, channels, side, side)
    drawn, grad = normal(*shape, device=device), normal(*shape, device=device)
    kernel, positions = layer.to_dense().weight, layer.pattern.positions()

    def sparse(form: torch.memory_format) -> Run:
        return _both_ways(layer, layer.values, drawn, grad, form)

    def dense(form: torch.memory_format) -> Run:
        weight = kernel.detach().contiguous(memory_format=form).requires_grad_()
        return _both_ways(lambda x: F.conv2d(x, weight, padding=1), weight, drawn, grad, form)

    def error(ours: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> float:
        at_nonzeros = reference[1].reshape(-1)[positions]
        pairs = zip(ours, (reference[0], at_nonzeros, reference[2]), strict=True)
        return max(relative_error(mine, right) for mine, right in pairs)

    return Forms(
        ours=sparse(torch.channels_last),
        dense={
            "F.conv2d": dense(torch.contiguous_format),
            "F.conv2d, channels last": dense(torch.channels_last),
        },
        others={"sparse, contiguous": sparse(torch.contiguous_format)},
        error=error,
    )


def _both_ways(
    forward: Callable[[Tensor], Tensor],
    weight: Tensor,
    drawn: Callable[[int], Tensor],
    grad: Callable[[int], Tensor],
    form: torch.memory_format,
) -> Run:
    """Forward and backward; input and gradient are there in that format."""
    numbers, others = iter(range(10**9)), iter(range(10**9))
    x = inputs(lambda: drawn(next(numbers)).contiguous(memory_format=form).requires_grad_())
    dy = inputs(lambda: grad(next(others)).contiguous(memory_format=form))

    def run(i: int) -> tuple[Tensor, ...]:
        y = forward(x(i))
        return y.detach(), *torch.autograd.grad(y, (weight, x(i)), dy(i))

    return run


_BAGS = {"rows": 20_000, "cols": 600, "bags": 512, "length": 100}
_SMALL_BAGS = {"rows": 60, "cols": 33, "bags": 5, "length": 3}
_GRAPH = {"users": 30_000, "items": 40_000, "edges": 800_000, "dim": 64, "hops": 3}
_SMALL_GRAPH = {"users": 30, "items": 40, "edges": 200, "dim": 8, "hops": 3}
_HOP = {name: size for name, size in _GRAPH.items() if name != "hops"} | {"batch": 6144}
_SMALL_HOP = {name: size for name, size in _SMALL_GRAPH.items() if name != "hops"} | {"batch": 12}
_IMAGES, _SMALL_IMAGES = {"channels": 256, "side": 28, "batch": 32}, {"channels": 8, "side": 6, "batch": 2}
_WIDE = (0.9, *DENSITIES)

FURTHER: dict[str, Operation] = {
    "bag 20000 x 600, 512 bags of 100": Operation(bag, _BAGS, _SMALL_BAGS, densities=_WIDE, rival=True),
    "bag_grad 20000 x 600, 512 bags of 100": Operation(
        bag_grad, _BAGS, _SMALL_BAGS, densities=_WIDE, rival=True
    ),
    "bag_dot 20000 x 600, 512 bags of 100": Operation(
        bag_dot, _BAGS, _SMALL_BAGS, densities=_WIDE, rival=True
    ),
    "touched 1M x 64, B = 65536": Operation(
        touched,
        {"rows": 1_000_000, "cols": 64, "batch": 65_536},
        {"rows": 300, "cols": 20, "batch": 7},
        densities=_WIDE,
        rival=True,
    ),
    "propagate_rows 70k nodes, 1.6M edges, d = 64, 6144 rows": Operation(
        propagate_rows, _HOP, _SMALL_HOP, densities=(None,)
    ),
    "propagate_rows_t 70k nodes, 1.6M edges, d = 64, 6144 rows": Operation(
        propagate_rows_t, _HOP, _SMALL_HOP, densities=(None,)
    ),
    "propagate_mean 70k nodes, 1.6M edges, d = 64, 3 hops": Operation(
        propagate_mean, _GRAPH, _SMALL_GRAPH, densities=(0.9, 0.5, 0.1)
    ),
    "propagate_mean_grad 70k nodes, 1.6M edges, d = 64, 3 hops": Operation(
        propagate_mean_grad, _GRAPH, _SMALL_GRAPH, densities=(0.9, 0.5, 0.1)
    ),
    "SparseConv2d 256 to 256, 3 x 3, 32 x 28 x 28, both ways": Operation(
        conv, _IMAGES, _SMALL_IMAGES, densities=(0.9, 0.5, 0.25, 0.1)
    ),
    "SparseConv2d 256 to 256, 3 x 3, 32 x 28 x 28, both ways, TF32": Operation(
        conv, _IMAGES, _SMALL_IMAGES, densities=(0.9, 0.5, 0.1), tf32=True
    ),
}
