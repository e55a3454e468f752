"""Matrix factorisation with the BPR loss: the simplest model of rows and columns, and a strong yardstick."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsecore
from recsys.models.base import Triples
from recsys.models.factors import Factors, pair_scores, products
from recsys.models.layers import Density
from recsys.models.losses import squared_norm
from recsys.models.triples import triple_batches

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from recsys.data import Dataset

__all__ = ["BPRMF"]


class BPRMF(Factors):
    """Rendle, Freudenthaler, Gantner, Schmidt-Thieme (2009), "BPR: Bayesian personalized ranking from implicit
    feedback", with matrix factorisation.

    loss = mean softplus(s(u, n) - s(u, p)) + regularization / 2 * (|U_u|^2 + |V_p|^2 + |V_n|^2) / B

    over triples of a user, an item chosen and one not chosen (`TripleSampler`).

    Args:
        shape: (n_users, n_items).
        dim: width of both tables.
        regularization: see above.
        init_std: initial values are N(0, init_std^2).
        popularity: a negative is drawn with probability proportional to its degree to this power.
        density: of ``users`` and ``items``, in (0, 1].
        generator: initial values and index sets follow from it.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dim: int = 64,
        regularization: float = 1e-4,
        init_std: float = 0.1,
        popularity: float = 0.0,
        *,
        density: float | Density = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(shape, dim, init_std, density=density, generator=generator)
        self.regularization, self.popularity = regularization, popularity

    @classmethod
    def from_train(cls, train: csr_array, **options: Any) -> Self:
        return cls(train.shape, **options)

    def batches(self, dataset: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[Triples]:
        """As many triples as there are interactions, see `triple_batches`."""
        return triple_batches(dataset.train, batch_size, generator, self.popularity)

    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        return -(-dataset.train.nnz // batch_size)

    def loss(self, batch: Triples, step: int) -> Tensor:
        pairs = torch.stack((batch.positives, batch.negatives), dim=1)
        rows, chosen = self.users(batch.users), self.items(pairs)
        # The penalty needs the rows anyhow: dense scores are taken from them, sparse ones from what both rows store.
        if isinstance(self.items, sparsecore.SparseEmbedding):
            scores = pair_scores(self.users, batch.users, self.items, pairs)
        else:
            scores = products(rows, chosen)
        ranking = F.softplus(scores[:, 1] - scores[:, 0]).mean()
        penalty = squared_norm(rows) + squared_norm(chosen)
        return ranking + self.regularization * penalty / (2 * batch.size)
