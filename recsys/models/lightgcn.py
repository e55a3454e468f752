"""LightGCN: embeddings of users and items averaged over the hops of their interaction graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecore
from recsys.errors import DataError
from recsys.models.base import Interactions, Recommender, Triples, embedding
from sparsecore.nn import normalized_bipartite, propagate_mean

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from recsys.data import Dataset

__all__ = ["LightGCN", "TripleSampler"]


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
        density: of the table, in (0, 1].
        generator: initial values and index set follow from it.
    """

    def __init__(
        self,
        train: csr_array,
        dim: int = 64,
        hops: int = 3,
        regularization: float = 1e-4,
        init: Literal["normal", "xavier_uniform"] = "normal",
        *,
        density: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.n_users, self.n_items = train.shape
        self.hops, self.regularization, self.init = hops, regularization, init
        self.graph = normalized_bipartite(train)
        self.table: nn.Embedding | sparsecore.SparseEmbedding = embedding(
            self.n_users + self.n_items, dim, density, generator
        )
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

    def propagate(self) -> Tensor:
        """(n_users + n_items, dim) final embeddings."""
        return propagate_mean(self.graph, self.table, self.hops)

    def batches(self, dataset: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[Triples]:
        """As many triples as there are interactions, see `TripleSampler`."""
        drawn = TripleSampler(dataset.train).draw(dataset.train.nnz, generator)
        for start in range(0, drawn.size, batch_size):
            part = slice(start, start + batch_size)
            yield Triples(drawn.users[part], drawn.positives[part], drawn.negatives[part])

    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        return -(-dataset.train.nnz // batch_size)

    def loss(self, batch: Interactions | Triples, step: int) -> Tensor:
        assert isinstance(batch, Triples)
        rows = torch.cat([batch.users, self.n_users + batch.positives, self.n_users + batch.negatives])
        # index_select: its backward adds rows in parallel, that of [] goes one by one.
        user, positive, negative = self.propagate().index_select(0, rows).chunk(3)
        ranking = F.softplus((user * (negative - positive)).sum(dim=1)).mean()
        penalty = self.table(rows).square().sum() / (2 * batch.size)
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
        rows = torch.as_tensor(users, dtype=torch.int64)
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= self.n_users):
            raise DataError(
                f"LightGCN scores the {self.n_users} users of its graph only, but another was asked for; "
                "use MultVAE for users who are not in the training data"
            )
        embeddings = self._propagated if self._propagated is not None else self.propagate()
        if not self.training:
            self._propagated = embeddings
        return embeddings[rows] @ embeddings[self.n_users :].T


def _forget(module: nn.Module, incompatible_keys: Any) -> None:
    """New weights are in: what was propagated from the old ones is void."""
    module._propagated = None  # type: ignore[assignment]


class TripleSampler:
    """Draws (user, chosen item, item not chosen), each uniformly, the negative exactly.

    The user is uniform among those with at least one item chosen and one not, so that heavy users do not
    dominate (He et al. 2020 sample so). No rejection: the r-th item that a user has *not* chosen is r plus
    the number of chosen items before it. With the chosen items p_0 < p_1 < ... that number is #{j: p_j - j <=
    r}; p_j - j never falls within a user, so one binary search over all users' keys finds it.
    """

    def __init__(self, train: csr_array) -> None:
        matrix = train.tocsr()
        if not matrix.has_canonical_format:
            matrix = matrix.copy()
            matrix.sum_duplicates()
        n_items = matrix.shape[1]
        self.pointers = torch.from_numpy(matrix.indptr.astype(np.int64))
        self.items = torch.from_numpy(matrix.indices.astype(np.int64))
        degrees = self.pointers.diff()
        self.users = ((degrees > 0) & (degrees < n_items)).nonzero().squeeze(1)
        if not self.users.numel():
            raise DataError(
                "no user has both an item chosen and an item not chosen: there is nothing to rank"
            )
        rows = torch.arange(len(degrees)).repeat_interleave(degrees)
        rank = torch.arange(len(self.items)) - self.pointers[rows]
        self.stride = n_items + 1
        self.keys = rows * self.stride + self.items - rank
        self.n_items = n_items

    def draw(self, count: int, generator: torch.Generator) -> Triples:
        """`count` independent triples."""
        users = self.users[torch.randint(len(self.users), (count,), generator=generator)]
        first, degree = self.pointers[users], self.pointers[users + 1] - self.pointers[users]
        positives = self.items[first + _uniform_below(degree, generator)]
        rank = _uniform_below(self.n_items - degree, generator)
        before = torch.searchsorted(self.keys, users * self.stride + rank, right=True) - first
        return Triples(users, positives, rank + before)


def _uniform_below(bounds: Tensor, generator: torch.Generator) -> Tensor:
    """One integer in [0, bound) for every bound; float64 makes the deviation from uniform at most bound *
    2^-53.
    """
    draws = torch.rand(bounds.shape, generator=generator, dtype=torch.float64) * bounds
    return torch.minimum(draws.long(), bounds - 1)
