"""Dot products of rows of two sparse tables, without the rows themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsecore.backends import load
from sparsecore.errors import SparsecoreError
from sparsecore.ops.embedding import bag_grad, deliver, gather
from sparsecore.ops.operator import check_ids, operator, same_dtype

__all__ = ["gather_dot", "gather_dot_touched"]


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
    *tensors, ctx.n_cols = inputs
    ctx.save_for_backward(*tensors)


def _entries(ids_a: Tensor, ids_b: Tensor) -> tuple[Tensor, Tensor, int]:
    """Ids of both sides, one for each product, and products for each id of a."""
    each = ids_b.shape[1] if ids_b.dim() == 2 else 1
    return (ids_a.repeat_interleave(each) if each != 1 else ids_a), ids_b.reshape(-1), each


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Each product sends its gradient times the one row to the other: weighted sums of rows, as of bags."""
    values_a, crow_a, col_a, ids_a, values_b, crow_b, col_b, ids_b = ctx.saved_tensors
    left, right, each = _entries(ids_a, ids_b)
    weights = grad.reshape(-1)
    d_a = d_b = None
    if ctx.needs_input_grad[0]:
        singles = torch.arange(left.numel() + 1, device=left.device)
        rows = gather(values_b, crow_b, col_b, right, ctx.n_cols)
        d_a = bag_grad(crow_a, col_a, left, singles, weights, rows, values_a.shape[0])
    if ctx.needs_input_grad[4]:
        groups = torch.arange(ids_a.numel() + 1, device=left.device) * each
        rows = gather(values_a, crow_a, col_a, ids_a, ctx.n_cols)
        d_b = bag_grad(crow_b, col_b, right, groups, weights, rows, values_b.shape[0])
    return d_a, None, None, None, d_b, None, None, None, None


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
        values_a, crow_a, col_a, ids_a, values_b, crow_b, col_b, ids_b = ctx.saved_tensors
        left, right, each = _entries(ids_a, ids_b)
        weights, n = grads[0].reshape(-1), ids_a.numel()
        rows_a = gather(values_a, crow_a, col_a, ids_a, ctx.n_cols)
        rows_b = gather(values_b, crow_b, col_b, right, ctx.n_cols)
        of_a = torch.arange(right.numel(), device=left.device)
        of_b = of_a if each == 1 else of_a // each
        if crow_a is crow_b:  # one table on both sides: one gradient, sorted once
            ids, sources = torch.cat((left, right)), torch.cat((of_a + n, of_b))
            rows, both = torch.cat((rows_a, rows_b)), torch.cat((weights, weights))
            return deliver(ctx.values[0], crow_a, col_a, ids, rows, sources, both), *[None] * 8
        d_a = deliver(ctx.values[0], crow_a, col_a, left, rows_b, of_a, weights)
        d_b = deliver(ctx.values[1], crow_b, col_b, right, rows_a, of_b, weights)
        return d_a, None, None, None, d_b, None, None, None, None


def gather_dot_touched(*inputs: Any) -> Tensor:
    """`gather_dot` whose gradients are sparse vectors, see `touched`; for values_a and values_b that both need one."""
    return _GatherDotTouched.apply(*inputs)
