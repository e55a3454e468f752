"""Products of a sparse weight with dense activations. Callers see to it that x has the weight's number of columns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsecore.backends import load
from sparsecore.ops.operator import INDEX, WEIGHT, check_rows, keep, kept, operator, same_dtype
from sparsecore.ops.recording import watcher_of

__all__ = ["sddmm", "spmm", "spmm_t"]


def _spmm(values: Tensor, crow: Tensor, col: Tensor | None, x: Tensor, bias: Tensor | None = None) -> Tensor:
    if values.dtype is not x.dtype:
        same_dtype("spmm", values=values, x=x)
    out = load(values.device).spmm(values, crow, col, x)
    return out if bias is None else out.add_(bias)


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, crow, col, x = inputs[:4]
    # Each gradient needs the other factor only.
    ctx.save_for_backward(values if x.requires_grad else None, x if values.requires_grad else None)
    keep(ctx, crow, col)
    ctx.n_cols, ctx.nnz = x.shape[1], values.shape[0]


def _spmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (values, x), (crow, col) = ctx.saved_tensors, kept(ctx)
    d_values = sddmm(crow, col, grad, x, ctx.nnz) if ctx.needs_input_grad[0] else None
    d_x = spmm_t(values, crow, col, grad, ctx.n_cols) if ctx.needs_input_grad[3] else None
    d_bias = grad.sum(0) if len(ctx.needs_input_grad) > 4 and ctx.needs_input_grad[4] else None
    return (d_values, None, None, d_x, d_bias)[: len(ctx.needs_input_grad)]


spmm = operator(
    f"spmm({WEIGHT}, Tensor x, Tensor? bias=None) -> Tensor",
    _spmm,
    fake=lambda values, crow, col, x, bias=None: x.new_empty((x.shape[0], crow.shape[0] - 1)),
    setup=_product_setup,
    backward=_spmm_backward,
    macs=lambda values, crow, col, x, bias=None: x.shape[0] * values.shape[0],
)


def _spmm_t(values: Tensor, crow: Tensor, col: Tensor | None, dy: Tensor, n_cols: int) -> Tensor:
    if values.dtype is not dy.dtype:
        same_dtype("spmm_t", values=values, dy=dy)
    check_rows("spmm_t", crow, dy)
    return load(values.device).spmm_t(values, crow, col, dy, n_cols)


def _spmm_t_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (values, dy), (crow, col) = ctx.saved_tensors, kept(ctx)
    d_values = sddmm(crow, col, dy, grad, ctx.nnz) if ctx.needs_input_grad[0] else None
    d_dy = spmm(values, crow, col, grad) if ctx.needs_input_grad[3] else None
    return d_values, None, None, d_dy, None


spmm_t = operator(
    f"spmm_t({WEIGHT}, Tensor dy, int n_cols) -> Tensor",
    _spmm_t,
    fake=lambda values, crow, col, dy, n_cols: dy.new_empty((dy.shape[0], n_cols)),
    setup=_product_setup,
    backward=_spmm_t_backward,
    macs=lambda values, crow, col, dy, n_cols: dy.shape[0] * values.shape[0],
)


def _sddmm(crow: Tensor, col: Tensor | None, dy: Tensor, x: Tensor, nnz: int) -> Tensor:
    if dy.dtype is not x.dtype:
        same_dtype("sddmm", dy=dy, x=x)
    check_rows("sddmm", crow, dy)
    watcher = watcher_of(crow)
    if watcher is not None:
        watcher.saw_product(dy, x)
    return load(x.device).sddmm(crow, col, dy, x, nnz)


def _sddmm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:4])
    keep(ctx, *inputs[:2])


def _sddmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (dy, x), (crow, col) = ctx.saved_tensors, kept(ctx)
    d_dy = spmm(grad, crow, col, x) if ctx.needs_input_grad[2] else None
    d_x = spmm_t(grad, crow, col, dy, x.shape[1]) if ctx.needs_input_grad[3] else None
    return None, None, d_dy, d_x, None


sddmm = operator(
    f"sddmm({INDEX}, Tensor dy, Tensor x, int nnz) -> Tensor",
    _sddmm,
    fake=lambda crow, col, dy, x, nnz: x.new_empty((nnz,)),
    setup=_sddmm_setup,
    backward=_sddmm_backward,
    macs=lambda crow, col, dy, x, nnz: x.shape[0] * nnz,
)
