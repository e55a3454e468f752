"""Models that are computed from the interactions at once: the cheap and strong yardsticks of those that are trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import lapack
from scipy.sparse import csc_array
from torch import Tensor

from recsys.errors import ConfigError, RecsysError
from recsys.models.base import Interactions, Recommender
from recsys.models.neighbors import ones, top_neighbors

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from recsys.data import Dataset

__all__ = ["EASE", "Fitted", "ItemKNN", "Popularity"]

_BLOCK = 1 << 24  # numbers that are copied at a time while a matrix of n_items x n_items is made: 128 MB


class Fitted(Recommender, ABC):
    """A recommender without parameters: no loss, no steps; `fit` is its training, and its only epoch.

    What it knows is in buffers. They have their shapes from the beginning, so that saved ones can be loaded, and hold
    zeros until `fit`. Users are not known by their rows: whoever has the same `inputs` gets the same scores.
    """

    @classmethod
    def from_train(
        cls, train: csr_array, *, density: Any = 1.0, generator: Any = None, **options: Any
    ) -> Self:
        """A model for a catalogue of that size, not yet fitted. It has no weights that could be sparse or random."""
        return cls(train.shape[1], **options)

    @abstractmethod
    def fit(self, train: csr_array) -> None:
        """Compute the buffers from interactions, (n_users, n_items)."""

    def batches(self, dataset: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[Any]:
        """None."""
        return iter(())

    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        return 0

    def loss(self, batch: Any, step: int) -> Tensor:
        raise RecsysError(f"{type(self).__name__} has no loss: it is fitted to all interactions at once")


class Popularity(Fitted):
    """score(u, i) = the number of users who have chosen item i, the same for everybody."""

    degrees: Tensor

    def __init__(self, n_items: int) -> None:
        super().__init__()
        self.n_items = n_items
        self.register_buffer("degrees", torch.zeros(n_items))

    def fit(self, train: csr_array) -> None:
        self.degrees.copy_(torch.from_numpy(ones(train).sum(axis=0)))

    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        return self.degrees.repeat(inputs.shape[0], 1)


class ItemKNN(Fitted):
    """Nearest neighbors among the items (Sarwar, Karypis, Konstan, Riedl 2001), cosine similarity with shrinkage:

    score(u, i) = sum over the items j of u that are neighbors of i of s_ij,
    s_ij = |U_i and U_j| / (sqrt(|U_i| |U_j|) + shrinkage)

    with U_i the users who have chosen i; the neighbors of an item are the `neighbors` others with the largest s.

    Args:
        n_items: size of the catalogue.
        neighbors, shrinkage: see above.
    """

    similar: Tensor
    similarity: Tensor

    def __init__(self, n_items: int, neighbors: int = 100, shrinkage: float = 0.0) -> None:
        super().__init__()
        self.n_items = n_items
        self.neighbors, self.shrinkage = min(neighbors, n_items), shrinkage
        shape = n_items, self.neighbors
        self.register_buffer("similar", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("similarity", torch.zeros(shape))

    def fit(self, train: csr_array) -> None:
        chosen = ones(train)
        degrees = chosen.sum(axis=0)

        def cosine(items: np.ndarray, others: np.ndarray, together: np.ndarray) -> np.ndarray:
            similarity = together / (np.sqrt(degrees[items] * degrees[others]) + self.shrinkage)
            return np.where(items == others, 0.0, similarity)

        similar, similarity = top_neighbors(chosen, self.neighbors, cosine)
        self.similar.copy_(torch.from_numpy(similar))
        self.similarity.copy_(torch.from_numpy(similarity))

    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        # The neighbors of item i are column i. An item with too few is filled up with itself and similarity 0.
        pointers = np.arange(self.n_items + 1) * self.neighbors
        entries = self.similarity.numpy().ravel(), self.similar.numpy().ravel(), pointers
        columns = csc_array(entries, shape=(self.n_items, self.n_items))
        return torch.from_numpy((inputs @ columns).toarray())


class EASE(Fitted):
    """Steck (2019), "Embarrassingly shallow autoencoders for sparse data": the best linear model of items from items.

    scores = X B, B = I - P diag(1 / diag P), P = (X^T X + regularization I)^-1

    B minimises |X - X B|^2 + regularization |B|^2 among matrices with a diagonal of zeros. It is dense: 4 n_items^2
    bytes, and 12 n_items^2 while it is fitted, for which time goes with n_items^3.

    Args:
        n_items: size of the catalogue.
        regularization: see above.
        max_items: the largest catalogue to try.

    Raises:
        ConfigError: for a larger one.
    """

    weights: Tensor

    def __init__(self, n_items: int, regularization: float = 500.0, max_items: int = 30_000) -> None:
        super().__init__()
        if n_items > max_items:
            raise ConfigError(
                f"EASE inverts a matrix of {n_items:,} x {n_items:,} items, which takes {12e-9 * n_items**2:.1f} GB, "
                f"and model.max_items is {max_items:,}; raise it if that fits, or use itemknn"
            )
        self.n_items, self.regularization = n_items, regularization
        self.register_buffer("weights", torch.zeros(n_items, n_items))

    def fit(self, train: csr_array) -> None:
        chosen = ones(train)
        by_item = chosen.T.tocsr()
        n, step = self.n_items, max(1, _BLOCK // self.n_items)
        blocks = [slice(first, first + step) for first in range(0, n, step)]
        matrix = np.empty((n, n))
        for rows in blocks:
            matrix[rows] = (by_item[rows] @ chosen).toarray()
        matrix[np.diag_indices(n)] += self.regularization
        # In place, by Cholesky: half the time and a third of the memory of numpy's inverse. LAPACK counts by columns,
        # so that the lower triangle, the one that it writes, is the upper one of `matrix`.
        factor, failed = lapack.dpotrf(matrix.T, lower=1, clean=0, overwrite_a=1)
        if not failed:
            inverse, failed = lapack.dpotri(factor, lower=1, overwrite_c=1)
        if failed:
            raise RecsysError(
                f"EASE: the matrix of the items is singular to working precision; raise model.regularization "
                f"(it was {self.regularization})"
            )
        upper, weights = inverse.T, self.weights.zero_().numpy()
        for rows in blocks:
            part = np.triu(upper[rows, rows.start :])
            weights[rows, rows.start :] += part
            weights[rows.start :, rows] += part.T  # doubles the diagonal, which is not used
        weights /= -np.diag(upper)
        np.fill_diagonal(weights, 0.0)

    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        shown = Interactions.from_scipy(inputs)
        return F.embedding_bag(shown.items, self.weights, shown.pointers[:-1], mode="sum")
