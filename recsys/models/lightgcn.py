"""LightGCN: embeddings of users and items averaged over the hops of their interaction graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecore
from recsys.models.base import Recommender, Triples, known_users
from recsys.models.layers import Density, Layers
from recsys.models.losses import squared_norm
from recsys.models.triples import triple_batches
from sparsecore.nn import normalized_bipartite, propagate_mean

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from recsys.data import Dataset

__all__ = ["LightGCN"]


class LightGCN(Recommender):
    """He, Deng, Wang, Li, Zhang, Wang (2020), "LightGCN: simplifying and powering graph convolution network".

    E = mean of E0, A E0, ..., A^hops E0, with A = D^-1/2 [[0, R], [R^T, 0]] D^-1/2 and E0 one table of all
    users followed by all items; score(u, i) = E_u . E_i. Trained with BPR on sampled triples (u, p, n):

    loss = mean softplus(s(u, n) - s(u, p)) + regularization / 2 * (|E0_u|^2 + |E0_p|^2 + |E0_n|^2) / B

    Args:
        train: (n_users, n_items) interactions, the graph.
        dim: width of the embeddings.
        hops: how many times to propagate.
        regularization: see above; of the layer-0 embeddings in the batch.
        init: "normal", N(0, .1^2), as the authors' PyTorch code, or "xavier_uniform" with the bound of the
            dense table, sqrt(6 / (rows + dim)), as their TensorFlow code.
        density: of ``table``, in (0, 1].
        generator: initial values and index set follow from it.
    """

    knows_users = True

    def __init__(
        self,
        train: csr_array,
        dim: int = 64,
        hops: int = 3,
        regularization: float = 1e-4,
        init: Literal["normal", "xavier_uniform"] = "normal",
        *,
        density: float | Density = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.n_users, self.n_items = train.shape
        self.hops, self.regularization, self.init = hops, regularization, init
        self.graph = normalized_bipartite(train)
        self.table = Layers(density, generator).embedding("table", self.n_users + self.n_items, dim)
        self.dim = dim
        self._propagated: Tensor | None = None
        self.register_load_state_dict_post_hook(_forget)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the table anew, see `init`."""
        values = sparsecore.weight_parameter(self.table)
        with torch.no_grad():
            if self.init == "normal":
                values.normal_(0, 0.1, generator=generator)
            else:
                bound = (6 / (self.n_users + self.n_items + self.dim)) ** 0.5
                values.uniform_(-bound, bound, generator=generator)

    def propagate(self, rows: Tensor | None = None) -> Tensor:
        """(n_users + n_items, dim) final embeddings, or some rows of them."""
        return propagate_mean(self.graph, self.table, self.hops, rows)

    def batches(self, dataset: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[Triples]:
        """As many triples as there are interactions, see `triple_batches`."""
        return triple_batches(dataset.train, batch_size, generator)

    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        return -(-dataset.train.nnz // batch_size)

    def loss(self, batch: Triples, step: int) -> Tensor:
        rows = torch.cat([batch.users, self.n_users + batch.positives, self.n_users + batch.negatives])
        user, positive, negative = self.propagate(rows).chunk(3)
        ranking = F.softplus((user * (negative - positive)).sum(dim=1)).mean()
        penalty = squared_norm(self.table(rows)) / (2 * batch.size)
        return ranking + self.regularization * penalty

    def train(self, mode: bool = True) -> LightGCN:
        self._propagated = None
        return super().train(mode)

    @torch.no_grad()
    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        """Dot products of final embeddings; `inputs` is not read. In eval mode, propagated once and kept.

        Raises:
            DataError: for a user who is not in the graph (-1): LightGCN has no embedding for somebody new.
        """
        rows = known_users(self, users, self.n_users)
        embeddings = self._propagated if self._propagated is not None else self.propagate()
        if not self.training:
            self._propagated = embeddings
        return embeddings[rows] @ embeddings[self.n_users :].T


def _forget(module: nn.Module, incompatible_keys: Any) -> None:
    """New weights are in: what was propagated from the old ones is void."""
    module._propagated = None  # type: ignore[assignment]
