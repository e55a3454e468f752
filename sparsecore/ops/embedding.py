"""Rows of a sparse table: looked up, or summed with weights; and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsecore.backends import load
from sparsecore.errors import SparsecoreError
from sparsecore.ops.in_backward import asked_for, updater_of
from sparsecore.ops.operator import (
    INDEX,
    WEIGHT,
    check_ids,
    define,
    in_float32,
    keep,
    kept,
    nonzeros_of,
    operator,
    plain,
    same_dtype,
)  # fmt: skip
from sparsecore.ops.recording import watcher_of

__all__ = [
    "bag",
    "bag_dot",
    "bag_grad",
    "deliver",
    "gather",
    "gather_touched",
    "scatter_grad",
    "sparse_vector",
    "touched",
]


def _gather(values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, n_cols: int) -> Tensor:
    check_ids(ids, crow.shape[0] - 1)
    return load(values.device).gather(values, crow, col, ids, n_cols)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, crow, col, ids, _ = inputs
    ctx.save_for_backward(ids)
    keep(ctx, crow, col)
    ctx.nnz = values.shape[0]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return scatter_grad(*kept(ctx), *ctx.saved_tensors, grad, ctx.nnz), None, None, None, None


gather = operator(
    f"gather({WEIGHT}, Tensor ids, int n_cols) -> Tensor",
    _gather,
    fake=lambda values, crow, col, ids, n_cols: values.new_empty((ids.shape[0], n_cols)),
    setup=_gather_setup,
    backward=_gather_backward,
    macs=lambda *args: 0,
)


def _touched(
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    grad: Tensor,
    nnz: int,
    sources: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return load(grad.device).touched(crow, col, ids, grad.contiguous(), nnz, sources, weights)


def _touched_fake(crow: Tensor, col: Tensor | None, ids: Tensor, grad: Tensor, *rest: Any) -> Any:
    size = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty((size,)), grad.new_empty((size,))


_TOUCHED = (
    f"touched({INDEX}, Tensor ids, Tensor grad, int nnz, Tensor? sources=None, Tensor? weights=None)"
    " -> (Tensor, Tensor)"
)
_run_touched = in_float32(_TOUCHED, _touched)
_touched_op = define(
    _TOUCHED,
    _run_touched,
    _touched_fake,
    macs=lambda crow, col, ids, *rest: nonzeros_of(crow, ids) if len(rest) == 4 else 0,
).default


def touched(
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    grad: Tensor,
    nnz: int,
    sources: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``scatter_grad``, or with sources and weights ``sum of weights[e] grad[sources[e]]``, at the nonzeros of those
    rows alone that occur: their places (t,), int64 and ascending, and the values there (t,). Not differentiable.
    """
    args = crow, col, ids, grad, nnz, sources, weights
    direct = plain(*args) and not crow.is_meta and not (grad.requires_grad and torch.is_grad_enabled())
    return _run_touched(*args) if direct else _touched_op(*args)


touched.op = _touched_op  # type: ignore[attr-defined]


def sparse_vector(places: Tensor, values: Tensor, nnz: int) -> Tensor:
    """A gradient of some of the values: ``torch.sparse_coo`` of shape (nnz,)."""
    if values.numel() == 0:  # autograd adds the next gradient into it: in memory that torch can make larger
        places, values = places.clone(), values.clone()
    return torch.sparse_coo_tensor(
        places.unsqueeze(0), values, (nnz,), is_coalesced=True, check_invariants=False
    )


@torch._disable_dynamo  # who watches, and who updates, is asked when it runs
def deliver(
    parameter: Tensor,
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    grad: Tensor,
    sources: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor | None:
    """What a backward pass returns for looked-up rows: their gradient as `touched` finds it, a sparse vector; or
    nothing, if an optimizer took it (see `sparsecore.ops.in_backward`).
    """
    watcher = watcher_of(crow)
    if watcher is not None:
        if sources is None or weights is None:
            watcher.saw_rows(grad, ids)
        else:
            watcher.saw_bags(grad, ids, sources, weights)
    updater = updater_of(parameter)
    if updater is None or not asked_for(parameter):
        places, values = touched(crow, col, ids, grad, parameter.shape[0], sources, weights)
        return sparse_vector(places, values, parameter.shape[0])
    updater.update_rows(parameter, crow, col, ids, grad.contiguous(), sources, weights)
    return None


class _GatherTouched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, n_cols: int
    ) -> Tensor:
        ctx.save_for_backward(ids)
        keep(ctx, crow, col)
        ctx.values = values  # not saved: that the values change after this does not matter here
        return gather(values, crow, col, ids, n_cols)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), (crow, col) = ctx.saved_tensors, kept(ctx)
        return deliver(ctx.values, crow, col, ids, grads[0]), None, None, None, None


def gather_touched(values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, n_cols: int) -> Tensor:
    """`gather` whose gradient in the values is a sparse vector, see `touched`."""
    return _GatherTouched.apply(values, crow, col, ids, n_cols)


def _scatter_grad(crow: Tensor, col: Tensor | None, ids: Tensor, grad: Tensor, nnz: int) -> Tensor:
    watcher = watcher_of(crow)
    if watcher is not None:
        watcher.saw_rows(grad, ids)
    return load(grad.device).scatter_grad(crow, col, ids, grad, nnz)


def _scatter_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    crow, col, ids, grad, _ = inputs
    ctx.save_for_backward(ids)
    keep(ctx, crow, col)
    ctx.n_cols = grad.shape[1]


def _scatter_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, None, gather(grad, *kept(ctx), *ctx.saved_tensors, ctx.n_cols), None


scatter_grad = operator(
    f"scatter_grad({INDEX}, Tensor ids, Tensor grad, int nnz) -> Tensor",
    _scatter_grad,
    fake=lambda crow, col, ids, grad, nnz: grad.new_empty((nnz,)),
    setup=_scatter_grad_setup,
    backward=_scatter_grad_backward,
    macs=lambda *args: 0,
)


def _bags(offsets: Tensor, n_entries: int) -> Tensor:
    """Bag of every entry, int64."""
    return torch.repeat_interleave(offsets[1:] - offsets[:-1], output_size=n_entries)


def _bag(
    values: Tensor,
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor,
    n_cols: int,
) -> Tensor:
    same_dtype("bag", values=values, weights=weights)
    check_ids(ids, crow.shape[0] - 1)
    if offsets.is_cpu:
        ends = offsets.numpy()  # a fifth of the time of the same in torch
        if ends[0] != 0 or ends[-1] != ids.numel() or (ends[1:] < ends[:-1]).any():
            raise SparsecoreError("offsets must begin at 0, never fall, and end within the ids")
    return load(values.device).bag(values, crow, col, ids, offsets, weights, n_cols)


def _bag_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, crow, col, ids, offsets, weights, _ = inputs
    # The values are needed for the gradient of the weights alone.
    ctx.save_for_backward(values if weights.requires_grad else None, ids, offsets, weights)
    keep(ctx, crow, col)
    ctx.nnz = values.shape[0]


def _bag_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (values, ids, offsets, weights), (crow, col) = ctx.saved_tensors, kept(ctx)
    d_values = bag_grad(crow, col, ids, offsets, weights, grad, ctx.nnz) if ctx.needs_input_grad[0] else None
    d_weights = bag_dot(values, crow, col, ids, offsets, grad) if ctx.needs_input_grad[5] else None
    return d_values, None, None, None, None, d_weights, None


bag = operator(
    f"bag({WEIGHT}, Tensor ids, Tensor offsets, Tensor weights, int n_cols) -> Tensor",
    _bag,
    fake=lambda values, crow, col, ids, offsets, weights, n_cols: values.new_empty(
        (offsets.shape[0] - 1, n_cols)
    ),
    setup=_bag_setup,
    backward=_bag_backward,
    macs=lambda values, crow, col, ids, *rest: nonzeros_of(crow, ids),
)


def _bag_grad(
    crow: Tensor, col: Tensor | None, ids: Tensor, offsets: Tensor, weights: Tensor, grad: Tensor, nnz: int
) -> Tensor:
    sources, watcher = _bags(offsets, ids.numel()), watcher_of(crow)
    if watcher is not None:
        watcher.saw_bags(grad, ids, sources, weights)
    return load(grad.device).bag_grad(crow, col, ids, sources, weights, grad, nnz)


def _bag_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:6])
    keep(ctx, *inputs[:2])


def _bag_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids, offsets, weights, outer), (crow, col) = ctx.saved_tensors, kept(ctx)
    d_weights = bag_dot(grad, crow, col, ids, offsets, outer) if ctx.needs_input_grad[4] else None
    d_outer = bag(grad, crow, col, ids, offsets, weights, outer.shape[1]) if ctx.needs_input_grad[5] else None
    return None, None, None, None, d_weights, d_outer, None


bag_grad = operator(
    f"bag_grad({INDEX}, Tensor ids, Tensor offsets, Tensor weights, Tensor grad, int nnz) -> Tensor",
    _bag_grad,
    fake=lambda crow, col, ids, offsets, weights, grad, nnz: grad.new_empty((nnz,)),
    setup=_bag_grad_setup,
    backward=_bag_grad_backward,
    macs=lambda crow, col, ids, *rest: nonzeros_of(crow, ids),
)


def _bag_dot(
    values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, offsets: Tensor, grad: Tensor
) -> Tensor:
    return load(grad.device).bag_dot(values, crow, col, ids, _bags(offsets, ids.numel()), grad)


def _bag_dot_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, crow, col, *others = inputs
    ctx.save_for_backward(values, *others)
    keep(ctx, crow, col)
    ctx.nnz = values.shape[0]


def _bag_dot_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (values, ids, offsets, outer), (crow, col) = ctx.saved_tensors, kept(ctx)
    d_values = bag_grad(crow, col, ids, offsets, grad, outer, ctx.nnz) if ctx.needs_input_grad[0] else None
    d_outer = bag(values, crow, col, ids, offsets, grad, outer.shape[1]) if ctx.needs_input_grad[5] else None
    return d_values, None, None, None, None, d_outer


bag_dot = operator(
    f"bag_dot({WEIGHT}, Tensor ids, Tensor offsets, Tensor grad) -> Tensor",
    _bag_dot,
    fake=lambda values, crow, col, ids, offsets, grad: values.new_empty((ids.shape[0],)),
    setup=_bag_dot_setup,
    backward=_bag_dot_backward,
    macs=lambda values, crow, col, ids, *rest: nonzeros_of(crow, ids),
)
