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

__all__ = ["TripleSampler", "interaction_batches", "rankable", "triple_batches"]


def triple_batches(train: csr_array, batch_size: int, generator: torch.Generator) -> Iterator[Triples]:
    """One epoch: as many triples as there are interactions in ``train`` (n_users, n_items), see `TripleSampler`."""
    drawn = TripleSampler(train).draw(train.nnz, generator)
    for start in range(0, drawn.size, batch_size):
        part = slice(start, start + batch_size)
        yield Triples(drawn.users[part], drawn.positives[part], drawn.negatives[part])


def interaction_batches(train: csr_array, batch_size: int, generator: torch.Generator) -> Iterator[Triples]:
    """One epoch: every `rankable` interaction once, in random order, with an item that its user has not chosen."""
    sampler = TripleSampler(train)
    kept = torch.from_numpy(rankable(train))
    users = torch.arange(train.shape[0]).repeat_interleave(sampler.pointers.diff())[kept]
    items = sampler.items[kept]
    order = torch.randperm(len(users), generator=generator)
    negatives = sampler.negatives(users, generator)
    for part in order.split(batch_size):
        yield Triples(users[part], items[part], negatives[part])


def rankable(train: csr_array) -> np.ndarray:
    """Of the stored interactions, whether the user has an item that is not chosen: boolean, (nnz,)."""
    degrees = np.diff(train.indptr)
    return np.repeat(degrees < train.shape[1], degrees)


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
        return Triples(users, positives, self.negatives(users, generator))

    def negatives(self, users: Tensor, generator: torch.Generator) -> Tensor:
        """An item that each user has not chosen; there must be one."""
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
