"""Random triples of a user, an item chosen and one not chosen, for pairwise losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recsys.errors import DataError
from recsys.models.base import Triples

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["NotChosen", "TripleSampler", "triple_batches"]


def triple_batches(train: csr_array, batch_size: int, generator: torch.Generator) -> Iterator[Triples]:
    """One epoch: as many triples as there are interactions in ``train`` (n_users, n_items), see `TripleSampler`."""
    drawn = TripleSampler(train).draw(train.nnz, generator)
    for start in range(0, drawn.size, batch_size):
        part = slice(start, start + batch_size)
        yield Triples(drawn.users[part], drawn.positives[part], drawn.negatives[part])


class TripleSampler:
    """Draws (user, chosen item, item not chosen), each uniformly, the negative exactly (`NotChosen`).

    The user is uniform among those with at least one item chosen and one not, so that heavy users do not
    dominate (He et al. 2020 sample so).
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
        self.not_chosen = NotChosen(self.pointers, self.items, n_items)

    def draw(self, count: int, generator: torch.Generator) -> Triples:
        """`count` independent triples."""
        users = self.users[torch.randint(len(self.users), (count,), generator=generator)]
        first, degree = self.pointers[users], self.pointers[users + 1] - self.pointers[users]
        positives = self.items[first + _uniform_below(degree, generator)]
        return Triples(users, positives, self.not_chosen.draw(users, generator))


class NotChosen:
    """Draws items that users have not chosen, uniformly, without rejection.

    The r-th item that a user has *not* chosen is r plus the number of chosen items before it. With the chosen items
    p_0 < p_1 < ... that number is #{j: p_j - j <= r}; p_j - j never falls within a user, so one binary search over
    all users' keys finds it.

    Args:
        pointers: (n + 1,) int64; user u has chosen `items[pointers[u]:pointers[u + 1]]`.
        items: (nnz,) int64, ascending and without repetition within a user.
        n_items: size of the catalogue.
    """

    def __init__(self, pointers: Tensor, items: Tensor, n_items: int) -> None:
        rows = torch.arange(len(pointers) - 1).repeat_interleave(pointers.diff())
        rank = torch.arange(len(items)) - pointers[rows]
        self.stride = n_items + 1
        self.keys = rows * self.stride + items - rank
        self.pointers, self.n_items = pointers, n_items

    def draw(self, users: Tensor, generator: torch.Generator) -> Tensor:
        """An item for every entry of ``users``, none of whom may have chosen every item."""
        first, degree = self.pointers[users], self.pointers[users + 1] - self.pointers[users]
        rank = _uniform_below(self.n_items - degree, generator)
        before = torch.searchsorted(self.keys, users * self.stride + rank, right=True) - first
        return rank + before


def _uniform_below(bounds: Tensor, generator: torch.Generator) -> Tensor:
    """One integer in [0, bound) for every bound; float64 makes the deviation from uniform at most bound *
    2^-53.
    """
    draws = torch.rand(bounds.shape, generator=generator, dtype=torch.float64) * bounds
    return torch.minimum(draws.long(), bounds - 1)
