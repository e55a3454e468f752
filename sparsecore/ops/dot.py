"""Dot products of rows of two sparse tables, without the rows themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsecore.backends import load
from sparsecore.errors import SparsecoreError
from sparsecore.ops.embedding import bag, bag_grad, deliver, gather, scatter_grad
from sparsecore.ops.operator import check_ids, keep, kept, operator, plain, same_dtype

__all__ = ["gather_dot", "gather_dot_touched"]

_FEW = 4096  # numbers of the rows of single pairs, for which lookups have kernels of their own


def _gather_dot(
    values_a: Tensor,
    crow_a: Tensor,
    col_a: Tensor | None,
    ids_a: Tensor,
    values_b: Tensor,
    crow_b: Tensor,
    col_b: Tensor | None,
    ids_b: Tensor,
    n_cols: int,
) -> Tensor:
    if values_a.dtype is not values_b.dtype:
        same_dtype("gather_dot", values_a=values_a, values_b=values_b)
    if ids_a.dim() != 1 or ids_b.dim() not in (1, 2) or ids_a.shape[0] != ids_b.shape[0]:
        raise SparsecoreError(
            "gather_dot needs ids_a (n,) and ids_b (n,) or (n, m), "
            f"got {tuple(ids_a.shape)} and {tuple(ids_b.shape)}"
        )
    check_ids(ids_a, crow_a.shape[0] - 1)
    check_ids(ids_b, crow_b.shape[0] - 1)
    kernels = load(values_a.device)
    return kernels.gather_dot(values_a, crow_a, col_a, ids_a, values_b, crow_b, col_b, ids_b, n_cols)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values_a, crow_a, col_a, ids_a, values_b, crow_b, col_b, ids_b, ctx.n_cols = inputs
    ctx.save_for_backward(values_a, ids_a, values_b, ids_b)
    keep(ctx, crow_a, col_a, crow_b, col_b)


def _pairs(ids_a: Tensor, ids_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of b, one for each product; where the products of each id of a begin and end; which id of a is whose."""
    n, each = ids_a.numel(), ids_b.shape[1] if ids_b.dim() == 2 else 1
    offsets = torch.arange(n + 1, device=ids_a.device) * each
    sources = torch.arange(n, device=ids_a.device).unsqueeze(1).expand(n, each).reshape(-1)
    return ids_b.reshape(-1), offsets, sources


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Each product sends its gradient times the one row to the other. The rows of b are summed for each id of a first:
    no row is written for a product, of which there may be hundreds for each id. (But where all are few.)
    """
    values_a, ids_a, values_b, ids_b = ctx.saved_tensors
    crow_a, col_a, crow_b, col_b = kept(ctx)
    d_a = d_b = None
    if plain(values_a, values_b, grad) and _few(
        ids_b, ctx.n_cols, grad
    ):  # in this order: a compiler asks no sizes
        # A call costs more than its arithmetic: there are fewer of them here, and their rows are written.
        weights = grad.unsqueeze(1)
        if ctx.needs_input_grad[0]:
            rows = gather(values_b, crow_b, col_b, ids_b, ctx.n_cols) * weights
            d_a = scatter_grad(crow_a, col_a, ids_a, rows, values_a.shape[0])
        if ctx.needs_input_grad[4]:
            rows = gather(values_a, crow_a, col_a, ids_a, ctx.n_cols) * weights
            d_b = scatter_grad(crow_b, col_b, ids_b, rows, values_b.shape[0])
        return d_a, None, None, None, d_b, None, None, None, None
    right, offsets, _ = _pairs(ids_a, ids_b)
    weights = grad.reshape(-1)
    if ctx.needs_input_grad[0]:
        rows = bag(values_b, crow_b, col_b, right, offsets, weights, ctx.n_cols)
        d_a = scatter_grad(crow_a, col_a, ids_a, rows, values_a.shape[0])
    if ctx.needs_input_grad[4]:
        rows = gather(values_a, crow_a, col_a, ids_a, ctx.n_cols)
        d_b = bag_grad(crow_b, col_b, right, offsets, weights, rows, values_b.shape[0])
    return d_a, None, None, None, d_b, None, None, None, None


def _few(ids_b: Tensor, n_cols: int, grad: Tensor) -> bool:
    numbers = ids_b.shape[0] * n_cols if ids_b.dim() == 1 and ids_b.is_cpu else _FEW + 1
    return numbers <= _FEW and grad.dtype in (torch.float32, torch.float64)


def _macs(values_a: Any, crow_a: Any, col_a: Any, ids_a: Any, values_b: Any, *rest: Any) -> int:
    return rest[2].numel() * rest[3]


gather_dot = operator(
    "gather_dot(Tensor values_a, Tensor crow_a, Tensor? col_a, Tensor ids_a, "
    "Tensor values_b, Tensor crow_b, Tensor? col_b, Tensor ids_b, int n_cols) -> Tensor",
    _gather_dot,
    fake=lambda *args: args[0].new_empty(args[7].shape),
    setup=_setup,
    backward=_backward,
    macs=_macs,
)


class _GatherDotTouched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _setup(ctx, inputs, inputs[0])
        ctx.values = inputs[0], inputs[4]  # the parameters themselves, for `deliver`
        return gather_dot(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_a, ids_a, values_b, ids_b = ctx.saved_tensors
        crow_a, col_a, crow_b, col_b = kept(ctx)
        right, offsets, sources = _pairs(ids_a, ids_b)
        weights = grads[0].reshape(-1)
        d_a = d_b = rows_a = for_a = None
        if ctx.needs_input_grad[4]:
            rows_a = gather(values_a, crow_a, col_a, ids_a, ctx.n_cols)
        if ctx.needs_input_grad[0]:
            for_a = bag(values_b, crow_b, col_b, right, offsets, weights, ctx.n_cols)
        # One table on both sides: one gradient, sorted once.
        if crow_a is crow_b and for_a is not None and rows_a is not None:
            n, ids, rows = ids_a.numel(), torch.cat((ids_a, right)), torch.cat((for_a, rows_a))
            sources = torch.cat((torch.arange(n, device=ids.device), sources + n))
            weights = torch.cat((weights.new_ones(n), weights))
            return deliver(ctx.values[0], crow_a, col_a, ids, rows, sources, weights), *[None] * 8
        if for_a is not None:
            d_a = deliver(ctx.values[0], crow_a, col_a, ids_a, for_a)
        if rows_a is not None:
            d_b = deliver(ctx.values[1], crow_b, col_b, right, rows_a, sources, weights)
        return d_a, None, None, None, d_b, None, None, None, None


def gather_dot_touched(*inputs: Any) -> Tensor:
    """`gather_dot` whose gradients are sparse vectors, see `touched`."""
    return _GatherDotTouched.apply(*inputs)
