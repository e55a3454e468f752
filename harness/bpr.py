"""Matrix factorisation with the BPR loss, as a workload: one large table, of which a step touches few rows.

    loss = mean softplus(s(u, n) - s(u, p)),    s(u, i) = E[u] . E[i]

Dense forms are those that a PyTorch engineer would choose from: ``nn.Embedding(sparse=True)`` with ``SparseAdam``, and
``nn.Embedding`` with fused Adam; the former also on huge pages, which ours asks for (torch's dense tensors have them
where THP_MEM_ALLOC_ENABLE=1 is in the environment). Source of the loss: Rendle et al., BPR, UAI 2009.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecore
from harness.operands import on_huge_pages, state_on_huge_pages

__all__ = ["BprStep"]


class BprStep:
    """Steps of one form on random triples.

    Args:
        form: ``"dense"`` (fused Adam), ``"dense lazy"`` (SparseAdam), ``"dense lazy on huge pages"``, ``"masked"``
            (dense times masks, fused Adam), or ``"sparse"`` (our table, lazy Adam in the backward pass).
        rows, dim, batch: size of the table and number of triples.
        density: of masked and sparse.
        interval: steps between explorations, for masked and sparse.
    """

    def __init__(
        self, form: str, rows: int, dim: int, batch: int, density: float = 1.0, interval: int = 100
    ) -> None:
        self.form, self.rows, self.batch, self.interval = form, rows, batch, interval
        self.generator = torch.Generator().manual_seed(0)
        self.explorer: sparsecore.DynamicSparsity | sparsecore.MaskedSparsity | None = None
        self.table: nn.Embedding | sparsecore.SparseEmbedding
        if form == "sparse":
            self.table = sparsecore.SparseEmbedding(rows, dim, density=density, sparse=True)
        else:
            self.table = nn.Embedding(rows, dim, sparse=form.startswith("dense lazy"))
            if form == "dense lazy on huge pages":
                self.table.weight = nn.Parameter(on_huge_pages(self.table.weight.detach()))
        nn.init.normal_(sparsecore.weight_parameter(self.table), std=0.1)
        parameters = list(self.table.parameters())
        self.optimizer: torch.optim.Optimizer
        if form == "sparse":
            self.optimizer = sparsecore.optim.Adam(parameters, in_backward=True)
            self.explorer = sparsecore.DynamicSparsity(
                self.table, self.optimizer, interval=interval, total_steps=10**9
            )
        elif form == "dense lazy on huge pages":
            self.optimizer = state_on_huge_pages(torch.optim.SparseAdam(parameters))
        elif form == "dense lazy":
            self.optimizer = torch.optim.SparseAdam(parameters)
        else:
            self.optimizer = torch.optim.Adam(parameters, fused=True)
        if form == "masked":
            self.explorer = sparsecore.MaskedSparsity(
                self.table, self.optimizer, density=density, interval=interval, total_steps=10**9
            )

    @property
    def explores(self) -> bool:
        return self.explorer is not None

    def step(self) -> None:
        """One update without exploration."""
        if self.explorer is not None:
            self.explorer.rewind(0)
        self._update()

    def exploring_step(self) -> None:
        """One update that ends with an exploration."""
        assert self.explorer is not None
        self.explorer.rewind(self.interval - 1)
        self._update()

    def _update(self) -> None:
        half = self.rows // 2
        users = torch.randint(half, (self.batch,), generator=self.generator)
        items = torch.randint(half, self.rows, (self.batch, 2), generator=self.generator)
        self.optimizer.zero_grad()
        positive, negative = self._scores(users, items)
        F.softplus(negative - positive).mean().backward()
        self.optimizer.step()
        if self.explorer is not None:
            self.explorer.step()

    def _scores(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.table, sparsecore.SparseEmbedding):
            scores = sparsecore.gather_dot(self.table, users, self.table, items)
            return scores[:, 0], scores[:, 1]
        user, positive, negative = self.table(torch.cat((users, items[:, 0], items[:, 1]))).chunk(3)
        return (user * positive).sum(1), (user * negative).sum(1)
