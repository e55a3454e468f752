"""Random triples of a user, an item chosen and one not chosen, for pairwise losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from recsys.errors import DataError
from recsys.models.base import Triples
from recsys.models.negatives import NegativeSampler, uniform_below

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["TripleSampler", "triple_batches"]

_DRAWS = 1 << 14  # triples that `triple_batches` draws at a time


def triple_batches(
    train: csr_array, batch_size: int, generator: torch.Generator, popularity: float = 0.0
) -> Iterator[Triples]:
    """One epoch: as many triples as there are interactions in ``train`` (n_users, n_items), see `TripleSampler`."""
    sampler = TripleSampler(train, popularity)
    # Several batches a call, as each costs more than the draws of a small batch; not all: training waits for the first.
    step = batch_size * max(1, _DRAWS // batch_size)
    for start in range(0, train.nnz, step):
        drawn = sampler.draw(min(step, train.nnz - start), generator)
        parts = (tensor.split(batch_size) for tensor in (drawn.users, drawn.positives, drawn.negatives))
        yield from (Triples(*tensors) for tensors in zip(*parts, strict=True))


class TripleSampler:
    """Draws (user, chosen item, item not chosen), each uniformly, the negative exactly (`NegativeSampler`), and if so
    wished by its popularity.

    The user is uniform among those with at least one item chosen and one not, so that heavy users do not
    dominate (He et al. 2020 sample so).
    """

    def __init__(self, train: csr_array, popularity: float = 0.0) -> None:
        self.negatives = NegativeSampler(train, popularity)
        self.users = ((self.negatives.pointers.diff() > 0) & self.negatives.drawable).nonzero().squeeze(1)
        if not self.users.numel():
            raise DataError(
                "no user has both an item chosen and an item not chosen: there is nothing to rank"
            )

    def draw(self, count: int, generator: torch.Generator) -> Triples:
        """`count` independent triples."""
        users = self.users[torch.randint(len(self.users), (count,), generator=generator)]
        pointers = self.negatives.pointers
        chosen = uniform_below(pointers[users + 1] - pointers[users], generator)
        positives = self.negatives.items[pointers[users] + chosen]
        return Triples(users, positives, self.negatives.draw(users, 1, generator).squeeze(1))
