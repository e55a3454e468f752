"""Growth scores that see more than one batch: sums of embedding gradients over the rows that were looked up."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecore.errors import SparsecoreError, TopologyError

__all__ = ["RowAccumulator"]


class RowAccumulator:
    """Signed gradient sums of at most ``capacity`` rows since the last exploration, whatever became of the gradients.

    Growth by the last batch's gradient gives nearly all new weights to the users and items of that batch (the
    criticism of SparseRec, arXiv 2411.12205). Summing over the window costs one dense row for each row that was
    looked up; ``capacity`` bounds it. Rows are admitted in the order in which they come, and keep their place.

    Args:
        capacity: rows at most.
        cols: of the table.
        skip_row: a row whose gradient is left out (an embedding's padding row).

    Attributes:
        ids: int64, ascending, the admitted rows.
        sums: (len(ids), cols), their gradient sums.
    """

    def __init__(self, capacity: int, cols: int, skip_row: int | None = None) -> None:
        self.owner = 0  # the explorer that has it watch, by id
        if capacity < 1:
            raise SparsecoreError(f"accumulate_rows must be at least 1, got {capacity}")
        self.capacity, self.cols, self.skip_row = capacity, cols, skip_row
        self.reset()

    def reset(self) -> None:
        """Forget everything: an exploration has used it."""
        self.ids = torch.empty(0, dtype=torch.int64)
        self.sums: Tensor | None = None

    # ---- what operators tell: see `sparsecore.ops.recording.Watcher`

    def saw_product(self, dy: Tensor, x: Tensor) -> None:
        raise SparsecoreError(
            "accumulate_rows sums the gradients of rows that are looked up, not of products"
        )

    def saw_rows(self, grad: Tensor, ids: Tensor) -> None:
        self.add(ids, grad.detach())

    def saw_bags(self, grad: Tensor, ids: Tensor, sources: Tensor, weights: Tensor) -> None:
        self.add(ids, weights.detach().unsqueeze(1) * grad.detach()[sources])

    def saw_propagation(self, grad: Tensor, graph: tuple[Tensor, ...], hops: int) -> None:
        raise SparsecoreError("accumulate_rows sums looked-up rows only; leave it out of a propagated table")

    # ----

    def add(self, ids: Tensor, grad: Tensor) -> None:
        """Add gradient rows: ids (n,), grad (n, cols); repeated ids add up."""
        if self.skip_row is not None:
            real = ids != self.skip_row
            ids, grad = ids[real], grad[real]
        # A step whose gradient is not finite is one that a gradient scaler skips; its sum would never be finite again.
        if ids.numel() == 0 or not bool(torch.isfinite(grad.sum())):
            return
        grad = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
        sums = grad.new_empty((0, self.cols)) if self.sums is None else self.sums
        known = self.ids.to(ids.device)
        fresh, inverse = torch.unique(ids[~torch.isin(ids, known)], return_inverse=True)
        if fresh.numel():
            came = torch.full_like(fresh, ids.numel()).scatter_reduce(
                0, inverse, torch.arange(inverse.numel(), device=ids.device), "amin"
            )
            admitted = fresh[torch.argsort(came)[: self.capacity - known.numel()]]
            known, order = torch.sort(torch.cat((known, admitted)))
            sums = torch.cat((sums, sums.new_zeros((admitted.numel(), self.cols))))[order]
        place = torch.searchsorted(known, ids).clamp_max_(known.numel() - 1)
        mine = known[place] == ids
        self.ids, self.sums = known, sums.index_add_(0, place[mine], grad[mine])

    # ---- what an exploration reads (the interface of `topology.use.Recorder`)

    def rows(self) -> Tensor:
        """The admitted rows."""
        return self.ids

    def block(self, rows: Tensor | slice) -> Tensor:
        """Gradient sums of these rows (ids out of ``rows()``), a copy."""
        assert isinstance(rows, Tensor)
        assert self.sums is not None
        return self.sums[torch.searchsorted(self.ids, rows)]

    @property
    def uses(self) -> bool:
        """Whether anything was added."""
        return self.sums is not None

    def state_dict(self) -> dict[str, Tensor]:
        """Ids and sums, as tensors."""
        return {} if self.sums is None else {"ids": self.ids, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state."""
        self.reset()
        if state:
            self.ids, self.sums = state["ids"].clone(), state["sums"].clone()

    def expect(self, state: dict[str, Tensor], name: str, n_rows: int) -> None:
        """Refuse sums of another table.

        Raises:
            TopologyError: if their shapes do not fit, or they are of rows that the table has not.
        """
        if not state:
            return
        ids, sums = state["ids"], state["sums"]
        if sums.shape != (ids.numel(), self.cols) or len(ids) > self.capacity:
            raise TopologyError(
                f"the saved gradient sums of {name} have shape {tuple(sums.shape)}, "
                f"expected at most {self.capacity} rows of {self.cols}"
            )
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < n_rows):
            raise TopologyError(
                f"the saved gradient sums of {name} are of rows up to {int(ids.max())}, the table has {n_rows}"
            )
