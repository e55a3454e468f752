"""Scores of a whole catalogue and the best of them, without the matrix of all scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecore.backends import load
from sparsecore.errors import SparsecoreError
from sparsecore.ops.operator import WEIGHT, add_in_float32, define, in_float32, same_dtype

__all__ = ["score_topk"]


def _score_topk(
    queries: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor | None,
    k: int,
    seen_crow: Tensor | None = None,
    seen_col: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    same_dtype("score_topk", queries=queries, values=values)
    if k < 1:
        raise SparsecoreError(f"score_topk needs k of at least 1, got {k}")
    if (seen_crow is None) != (seen_col is None):
        raise SparsecoreError("score_topk needs both seen_crow and seen_col, or neither")
    if seen_crow is not None and seen_crow.numel() != queries.shape[0] + 1:
        raise SparsecoreError(
            f"score_topk needs seen_crow with {queries.shape[0] + 1} entries for {queries.shape[0]} queries, "
            f"got {seen_crow.numel()}"
        )
    return load(values.device).score_topk(
        queries, values, crow, col, k, seen_crow, seen_col, queries.shape[1]
    )


def _fake(queries: Tensor, values: Tensor, crow: Tensor, col: Tensor | None, k: int, *seen: Any) -> Any:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


_SCHEMA = (
    f"score_topk(Tensor queries, {WEIGHT}, int k, Tensor? seen_crow=None, Tensor? seen_col=None)"
    " -> (Tensor, Tensor)"
)
_operator = define(
    _SCHEMA,
    in_float32(_SCHEMA, _score_topk),
    _fake,
    macs=lambda queries, values, *rest: queries.shape[0] * values.shape[0],
)
add_in_float32("score_topk")
score_topk = _operator.default
"""``queries E^T`` (B, rows), and of each row of it the k best: scores (B, k) and row ids (B, k), best first.

Equal scores: the lower id first. Ids in row b of the CSR structure ``seen`` are left out for query b; where fewer than
k are left, the score is -inf and the id -1. Not differentiable.
"""
