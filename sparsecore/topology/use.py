"""How a sparse weight was used in a step: all that is needed for its gradient at positions it does not store.

The gradient of the loss in a weight that is *not* stored is never computed in training. At an exploration it is needed
once, to score where to grow. Each use of a weight keeps its input and, through a hook, its output gradient; from the
two any block of rows of the dense gradient can be computed when it is asked for, and thrown away again.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from sparsecore import ops

__all__ = [
    "BagUse",
    "DotUse",
    "GatherUse",
    "LinearUse",
    "NormUse",
    "PropagateUse",
    "Recorder",
    "Use",
]


class Use(Protocol):
    """One application of a sparse weight in a forward pass."""

    def rows(self, grad: Tensor) -> Tensor | None:
        """Rows whose gradient can differ from zero, int64, ascending, unique; None for all of them."""

    def block(self, grad: Tensor, rows: Tensor | slice) -> Tensor:
        """Dense gradient of these rows (a slice, or int64 ids out of ``rows()``): (len(rows), cols)."""


class LinearUse:
    """``Y = X W^T``: gradient ``dY^T X``."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.detach().reshape(-1, x.shape[-1])

    def rows(self, grad: Tensor) -> Tensor | None:
        return None

    def block(self, grad: Tensor, rows: Tensor | slice) -> Tensor:
        flat = grad.reshape(-1, grad.shape[-1])
        return flat[:, rows].t() @ self.x


class BagUse:
    """``out[b] = sum of weights[e] W[ids[e]]`` over a bag's entries: gradient rows are weighted sums of dOut rows."""

    def __init__(self, ids: Tensor, bags: Tensor, weights: Tensor, padding_idx: int | None = None) -> None:
        if padding_idx is not None:
            real = ids != padding_idx
            ids, bags, weights = ids[real], bags[real], weights[real]
        self.ids, order = torch.sort(ids, stable=True)
        self.bags, self.weights = bags[order], weights.detach()[order]

    def rows(self, grad: Tensor) -> Tensor | None:
        return torch.unique_consecutive(self.ids)

    def block(self, grad: Tensor, rows: Tensor | slice) -> Tensor:
        flat = grad.reshape(-1, grad.shape[-1])
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=flat.device)
        first = torch.searchsorted(self.ids, rows[:1])
        last = torch.searchsorted(self.ids, rows[-1:], right=True)
        part = slice(int(first), int(last))
        # Ids of the range that were not asked for (another use's rows lie between) are left out.
        local = torch.searchsorted(rows, self.ids[part])
        asked = rows[local] == self.ids[part]
        # The entries are a sparse (rows x bags) matrix in CSR order; its product with dOut is the gradient.
        crow = torch.zeros(rows.numel() + 1, dtype=torch.int32, device=flat.device)
        crow[1:] = torch.bincount(local[asked], minlength=rows.numel()).cumsum(0)
        entries = (crow, self.bags[part][asked].to(torch.int32), self.weights[part][asked])
        return ops.propagate(*entries, *entries, flat)


class GatherUse(BagUse):
    """``out[e] = W[ids[e]]``: a bag of one entry each, with weight 1."""

    def __init__(self, ids: Tensor, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        ids = ids.reshape(-1)
        ones = torch.ones(ids.numel(), device=ids.device, dtype=dtype)
        super().__init__(ids, torch.arange(ids.numel(), device=ids.device), ones, padding_idx)


class DotUse:
    """``out[e, j] = W[ids[e]] . V[others[e, j]]``: gradient rows are rows of V, weighted by dOut and summed.

    Either side of the product can be W: ids and others are (n,) and (n, m), or the other way round. The rows of V are
    kept as the forward pass saw them; that happens in steps that explore only.
    """

    def __init__(self, ids: Tensor, table: Any, others: Tensor, padding_idx: int | None = None) -> None:
        rows = ops.gather(table.values.detach(), *table.index, others.reshape(-1), table.embedding_dim)
        products = max(ids.numel(), others.numel())
        self.ids = ids.reshape(-1).repeat_interleave(products // max(1, ids.numel()))
        self.rows_of_other = rows.repeat_interleave(products // max(1, others.numel()), dim=0)
        self.padding_idx = padding_idx

    def _as_bags(self, grad: Tensor) -> BagUse:
        entries = torch.arange(self.ids.numel(), device=grad.device)
        return BagUse(self.ids, entries, grad.reshape(-1), self.padding_idx)

    def rows(self, grad: Tensor) -> Tensor | None:
        return self._as_bags(grad).rows(grad)

    def block(self, grad: Tensor, rows: Tensor | slice) -> Tensor:
        return self._as_bags(grad).block(self.rows_of_other, rows)


class PropagateUse:
    """Mean of the hops 0..h of a graph over W: gradient ``1/(h+1) sum of (A^T)^i dOut``, an (N, d) activation."""

    def __init__(self, graph: tuple[Tensor, ...], hops: int) -> None:
        self.graph, self.hops = graph, hops
        self._dense: tuple[Tensor, Tensor] | None = None  # (of which output gradient, the gradient)

    def rows(self, grad: Tensor) -> Tensor | None:
        return None

    def block(self, grad: Tensor, rows: Tensor | slice) -> Tensor:
        if self._dense is None or self._dense[0] is not grad:
            a = self.graph
            out = grad
            for _ in range(self.hops):
                out = ops.propagate(*a[3:], *a[:3], out).add_(grad)
            self._dense = (grad, out)
        return self._dense[1][rows] / (self.hops + 1)


class NormUse:
    """``out = sum of W^2``: gradient ``2 dOut W``, at the stored positions, as W was in the forward pass."""

    def __init__(self, values: Tensor, index: tuple[Tensor, Tensor | None], cols: int) -> None:
        self.values, self.index, self.cols = values.detach().clone(), index, cols

    def rows(self, grad: Tensor) -> Tensor | None:
        return None

    def block(self, grad: Tensor, rows: Tensor | slice) -> Tensor:
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.values.device)
        return ops.gather(self.values, *self.index, rows, self.cols).mul_(2 * grad)


class Recorder:
    """Collects a module's uses, each with its output gradient, in the order in which backward passes reach them."""

    def __init__(self) -> None:
        self.uses: list[tuple[Use, Tensor]] = []

    def watch(self, output: Tensor, use: Use) -> None:
        """Record the use once the gradient of ``output`` is known. Without a backward pass nothing is kept."""

        def keep(grad: Tensor) -> None:
            self.uses.append((use, grad.detach()))

        output.register_hook(keep)

    def rows(self) -> Tensor | None:
        """Union of the uses' rows; None for all rows."""
        per_use = [use.rows(grad) for use, grad in self.uses]
        listed = [rows for rows in per_use if rows is not None]
        if len(listed) < len(per_use):
            return None
        return torch.unique(torch.cat(listed))

    def block(self, rows: Tensor | slice) -> Tensor:
        """Sum of the uses' dense gradients of these rows."""
        total: Tensor | None = None
        for use, grad in self.uses:
            part = use.block(grad, rows)
            total = part if total is None else total.add_(part)
        assert total is not None, "a block was asked of a weight that no backward pass has reached"
        return total
