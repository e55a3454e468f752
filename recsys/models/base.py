"""What every recommender is: batches, a loss, a score; and the layers that make dense and sparse one code
path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

import sparsecore
from recsys.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from recsys.data import Dataset

__all__ = [
    "Interactions",
    "Recommender",
    "Triples",
    "embedding",
    "embedding_bag",
    "known_users",
    "linear",
]


@dataclass(frozen=True)
class Interactions:
    """The items of each user of a batch, as a CSR structure.

    items: (nnz,) int64, the items of user 0, then of user 1, ...
    pointers: (B + 1,) int64; user b owns `items[pointers[b]:pointers[b + 1]]`, which may be empty.
    """

    items: Tensor
    pointers: Tensor

    @property
    def size(self) -> int:
        """Number of users, B."""
        return self.pointers.numel() - 1

    @property
    def counts(self) -> Tensor:
        """(B,) int64, interactions of each user."""
        return self.pointers.diff()

    @property
    def rows(self) -> Tensor:
        """(nnz,) int64, the user (0..B-1) of every interaction."""
        users = torch.arange(self.size, device=self.items.device)
        return users.repeat_interleave(self.counts, output_size=self.items.numel())

    @classmethod
    def from_scipy(cls, matrix: csr_array) -> Interactions:
        """The rows of a CSR matrix; its values are not read: an entry is an interaction."""
        return cls(
            torch.from_numpy(matrix.indices.astype(np.int64)),
            torch.from_numpy(matrix.indptr.astype(np.int64)),
        )


@dataclass(frozen=True)
class Triples:
    """(B,) int64 each: users, an item each of them has chosen, an item each of them has not; or (B, N) of the last."""

    users: Tensor
    positives: Tensor
    negatives: Tensor

    @property
    def size(self) -> int:
        """Number of triples, B."""
        return self.users.numel()


class Recommender(nn.Module, ABC):
    """A model that can be trained on a data set and that scores whole catalogues.

    Constructed with `density=1.0` it consists of `nn.Linear`, `nn.Embedding` and `nn.EmbeddingBag`; with
    less, of sparsecore's layers of that density. The rest of the code does not tell the difference.
    """

    n_items: int

    @abstractmethod
    def batches(self, dataset: Dataset, batch_size: int, generator: torch.Generator) -> Iterator:
        """One epoch of batches, in an order drawn from `generator`. The incomplete last batch is kept."""

    @abstractmethod
    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        """How many batches `batches` yields."""

    @abstractmethod
    def loss(self, batch: Interactions | Triples, step: int) -> Tensor:
        """Scalar training loss of a batch, its mean or its sum; `step` is the number of updates made before it."""

    @abstractmethod
    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        """(B, n_items) scores of every item, without gradient: the higher, the sooner recommended.

        users: (B,) rows of the training matrix, or -1 for somebody who is not in it.
        inputs: (B, n_items) what these users have chosen so far. Items in it are scored like any other.
        """


def known_users(model: Recommender, users: np.ndarray, n_users: int) -> Tensor:
    """Users as a tensor (B,) int64.

    Raises:
        DataError: for a user who is not among the model's (-1).
    """
    rows = torch.as_tensor(users, dtype=torch.int64)
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= n_users):
        raise DataError(
            f"{type(model).__name__} scores the {n_users} users of its training data only, but another was asked "
            "for; use MultVAE for users who are not in the training data"
        )
    return rows


def linear(
    in_features: int, out_features: int, density: float = 1.0, generator: torch.Generator | None = None
) -> nn.Linear | sparsecore.SparseLinear:
    """`nn.Linear` at density 1, `sparsecore.SparseLinear` below; bias always dense."""
    if density == 1:
        return nn.Linear(in_features, out_features)
    return sparsecore.SparseLinear(in_features, out_features, density=density, generator=generator)


def embedding(
    num_embeddings: int, embedding_dim: int, density: float = 1.0, generator: torch.Generator | None = None
) -> nn.Embedding | sparsecore.SparseEmbedding:
    """`nn.Embedding` at density 1, `sparsecore.SparseEmbedding` below."""
    if density == 1:
        return nn.Embedding(num_embeddings, embedding_dim)
    return sparsecore.SparseEmbedding(num_embeddings, embedding_dim, density=density, generator=generator)


def embedding_bag(
    num_embeddings: int, embedding_dim: int, density: float = 1.0, generator: torch.Generator | None = None
) -> nn.EmbeddingBag | sparsecore.SparseEmbeddingBag:
    """`nn.EmbeddingBag(mode="sum")` at density 1, `sparsecore.SparseEmbeddingBag` below."""
    if density == 1:
        return nn.EmbeddingBag(num_embeddings, embedding_dim, mode="sum")
    return sparsecore.SparseEmbeddingBag(num_embeddings, embedding_dim, density=density, generator=generator)
