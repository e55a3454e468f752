"""Models that are two tables, one row a user and one row an item, whose score is the rows' dot product."""

from __future__ import annotations

import math
from abc import ABC
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

import sparsecore
from recsys.models.base import Recommender, known_users
from recsys.models.layers import Density, Layers

__all__ = ["Factors", "catalogue_scores", "pair_scores", "products", "row_scores"]

Table = nn.Embedding | sparsecore.SparseEmbedding

_FUSED = 8  # users from which on `score_topk` takes less time than scores and then the best of them
_BLOCK = 1 << 20  # numbers of a dense table's rows that are written at a time: 4 MiB, which stays in cache


class Factors(Recommender, ABC):
    """score(u, i) = U_u . V_i, of the tables ``users`` (n_users, dim) and ``items`` (n_items, dim).

    Args:
        shape: (n_users, n_items).
        dim: width of both tables.
        init_std: initial values are N(0, init_std^2).
        density: of ``users`` and ``items``, in (0, 1].
        generator: initial values and index sets follow from it.
    """

    knows_users = True

    def __init__(
        self,
        shape: tuple[int, int],
        dim: int,
        init_std: float,
        *,
        density: float | Density = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.n_users, self.n_items = shape
        self.init_std = init_std
        layers = Layers(density, generator)
        self.users: Table = layers.embedding("users", self.n_users, dim)
        self.items: Table = layers.embedding("items", self.n_items, dim)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw both tables anew; index sets stay."""
        with torch.no_grad():
            for table in (self.users, self.items):
                sparsecore.weight_parameter(table).normal_(0, self.init_std, generator=generator)

    @torch.no_grad()
    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        """Dot products; `inputs` is not read.

        Raises:
            DataError: for a user who is not in the training data (-1).
        """
        return catalogue_scores(self.users(known_users(self, users, self.n_users)), self.items)

    @torch.no_grad()
    def best(
        self, users: np.ndarray, inputs: csr_array, k: int, exclude: csr_array | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of a sparse table of items without the users x items matrix of scores, which is slower for a few users."""
        if len(users) < _FUSED or not isinstance(self.items, sparsecore.SparseEmbedding):
            return super().best(users, inputs, k, exclude)
        rows = self.users(known_users(self, users, self.n_users))
        return sparsecore.score_topk(rows, self.items, min(k, self.n_items), exclude)


@torch.no_grad()
def catalogue_scores(rows: Tensor, items: Table) -> Tensor:
    """(B, n_items) dot products of given rows (B, dim) and every row of a table, without gradient."""
    if isinstance(items, sparsecore.SparseEmbedding):
        return sparsecore.ops.spmm(*items.operands, rows)
    return rows @ items.weight.T


def pair_scores(users: Table, user_ids: Tensor, items: Table, item_ids: Tensor) -> Tensor:
    """(B, M) dot products of row ``user_ids[b]`` of one table and rows ``item_ids[b, m]`` of the other.

    The B M rows are never all written, forward or backward, unless the items are sparse and the users dense.
    """
    if isinstance(users, sparsecore.SparseEmbedding) and isinstance(items, sparsecore.SparseEmbedding):
        return sparsecore.gather_dot(users, user_ids, items, item_ids)
    return row_scores(users(user_ids), items, item_ids)


def row_scores(rows: Tensor, items: Table, item_ids: Tensor) -> Tensor:
    """(B, M) dot products of given rows (B, dim) and the rows ``item_ids[b, m]`` of a table.

    The B M rows are never all written if the table is dense.
    """
    if isinstance(items, sparsecore.SparseEmbedding):
        return torch.bmm(items(item_ids), rows.unsqueeze(2)).squeeze(2)
    return _PairScores.apply(rows, items.weight, item_ids)


def _on_cpu(tensor: Tensor) -> bool:
    """Whether torch.sparse's products, and scipy, take it as it is."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


# An operator, so that its multiply-adds are counted (`sparsecore.MacCounter`): torch takes products and sums for free.
@torch.library.custom_op(
    "recsys::dense_pair_scores", mutates_args=(), schema="(Tensor rows, Tensor table, Tensor ids) -> Tensor"
)
def _dense_pair_scores(rows: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    if (
        _on_cpu(rows) and ids.shape[1] <= table.shape[0]
    ):  # torch takes no pattern of more places than the matrix has
        # The products of a sparse pattern whose row b stores ids[b], in any order and more than once: no row is copied.
        (batch, each), places = ids.shape, torch.arange(ids.shape[0] + 1) * ids.shape[1]
        pattern = torch.sparse_csr_tensor(
            places,
            ids.long().reshape(-1),
            rows.new_zeros(batch * each),
            (batch, table.shape[0]),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, rows, table.t(), beta=0.0).values().view(batch, each)
    scores = rows.new_empty(ids.shape)
    step = max(1, _BLOCK // max(1, ids.shape[1] * table.shape[1]))
    for first in range(0, ids.shape[0], step):
        part = slice(first, first + step)
        # Not bmm, which takes two to three times as long for one column.
        selected = F.embedding(ids[part], table).mul_(rows[part].unsqueeze(1))
        torch.sum(selected, 2, out=scores[part])
    return scores


@_dense_pair_scores.register_fake
def _(rows: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    return rows.new_empty(ids.shape)


@register_flop_formula(torch.ops.recsys.dense_pair_scores)
def _(rows: Any, table: Any, ids: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(ids) * table[1]


def products(rows: Tensor, chosen: Tensor) -> Tensor:
    """(B, M) dot products of rows (B, dim) with rows (B, M, dim), dense, for few of them: M is small.

    Several times as fast as bmm, which is not made for one column; operators, so that multiply-adds are counted.
    """
    return torch.ops.recsys.dense_products(rows, chosen)


@torch.library.custom_op(
    "recsys::dense_products", mutates_args=(), schema="(Tensor rows, Tensor chosen) -> Tensor"
)
def _dense_products(rows: Tensor, chosen: Tensor) -> Tensor:
    return (rows.unsqueeze(1) * chosen).sum(2)


@torch.library.custom_op(
    "recsys::dense_products_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor chosen) -> (Tensor, Tensor)",
)
def _dense_products_grad(grad: Tensor, rows: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    weights = grad.unsqueeze(2)
    return (weights * chosen).sum(1), weights * rows.unsqueeze(1)


@_dense_products.register_fake
def _(rows: Tensor, chosen: Tensor) -> Tensor:
    return rows.new_empty(chosen.shape[:2])


@_dense_products_grad.register_fake
def _(grad: Tensor, rows: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(chosen)


_dense_products.register_autograd(
    lambda ctx, grad: torch.ops.recsys.dense_products_grad(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@register_flop_formula(torch.ops.recsys.dense_products)
def _(rows: Any, chosen: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(chosen)


@register_flop_formula(torch.ops.recsys.dense_products_grad)
def _(grad: Any, rows: Any, chosen: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * math.prod(chosen)


class _PairScores(torch.autograd.Function):
    """scores[b, m] = rows[b] . table[ids[b, m]] for dense tensors.

    Backward, d rows[b] = sum over m of d scores[b, m] table[ids[b, m]], and the same with users and items exchanged
    for the table: weighted sums of rows, which embedding_bag computes without writing the rows.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(rows, table, ids)
        return _dense_pair_scores(rows, table, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, table, ids = ctx.saved_tensors
        batch, each = ids.shape
        weights, flat = grads[0].reshape(-1), ids.reshape(-1)
        d_rows = d_table = None
        if ctx.needs_input_grad[0]:
            offsets = torch.arange(batch, device=ids.device) * each
            d_rows = F.embedding_bag(flat, table, offsets, mode="sum", per_sample_weights=weights)
        if ctx.needs_input_grad[1]:
            sources, offsets, by_item = _by_item(weights, ids, table.shape[0])
            d_table = F.embedding_bag(sources, rows, offsets, mode="sum", per_sample_weights=by_item)
        return d_rows, d_table, None


def _by_item(weights: Tensor, ids: Tensor, n_items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `ids` (B, M) that name each item, item by item; where each begins; the weights (B M,) in that order."""
    batch, each = ids.shape
    if _on_cpu(weights) and ids.numel() < 2**31:
        # scipy turns a matrix round by counting, several times as fast as sorting.
        pointers = np.arange(batch + 1, dtype=np.int32) * each
        parts = weights.detach().numpy(), ids.reshape(-1).numpy().astype(np.int32), pointers
        turned = csr_array(parts, shape=(batch, n_items)).tocsc()
        return (
            torch.from_numpy(turned.indices),
            torch.from_numpy(turned.indptr[:-1]),
            torch.from_numpy(turned.data),
        )
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    # Not bincount: how long its result is depends on the ids, so a GPU would have to be waited for.
    counts = flat.new_zeros(n_items, dtype=torch.int64).scatter_add_(
        0, flat, torch.ones_like(flat, dtype=torch.int64)
    )
    return order // each, counts.cumsum(0) - counts, weights[order]
