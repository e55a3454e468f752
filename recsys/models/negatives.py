"""Items that a user has not chosen: drawn exactly, uniformly or by popularity, without trying again."""

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

__all__ = ["NegativeSampler", "negative_batches", "uniform_below"]

_BITS = 40  # of the sum of integer weights: items' shares are right to 2^-40
_DRAWS = 1 << 18  # negatives that `negative_batches` draws at a time, over several batches


class NegativeSampler:
    """Draws items that given users have not chosen, with replacement: P(i | u) proportional to degree_i^exponent.

    No rejection, and no rounding that could let a chosen item through: weights are integers w_i. Of all items in their
    order, laid on a line with length w_i each, take the chosen ones p_0 < p_1 < ... of a user out and close the gaps:
    p_j then stands as a point at x_j = sum of w_i of the not chosen i < p_j. A draw is a point x of what is left; the
    gaps before it are those with x_j <= x, one binary search in the points of all users, and their lengths put x
    back on the whole line, where a second search finds the item. Uniform draws have w_i = 1: no second search.

    Args:
        train: (n_users, n_items) interactions.
        exponent: 0 draws uniformly from all items not chosen; above it popular items are drawn more often, and items
            that nobody has chosen never.

    Attributes:
        drawable: (n_users,) bool, users for whom there is an item to draw.
        interactions: how many interactions these users have.

    Raises:
        DataError: exponent below 0 or not finite.
    """

    def __init__(self, train: csr_array, exponent: float = 0.0) -> None:
        if not 0 <= exponent < float("inf"):
            raise DataError(f"exponent of popularity: expected at least 0, got {exponent}")
        matrix = train.tocsr()
        if not matrix.has_canonical_format:
            matrix = matrix.copy()
            matrix.sum_duplicates()
        n_users, self.n_items = matrix.shape
        self.pointers = torch.from_numpy(matrix.indptr.astype(np.int64))
        self.items = torch.from_numpy(matrix.indices.astype(np.int64))
        weights = _integer_weights(torch.bincount(self.items, minlength=self.n_items), exponent, n_users)
        ends = weights.cumsum(0)
        self._ends = None if exponent == 0 else ends
        total = int(ends[-1]) if self.n_items else 0
        rows = torch.arange(n_users).repeat_interleave(self.pointers.diff())
        # Length of all gaps of all users before each one's; of one user's by difference.
        own = weights[self.items]
        self._gaps = torch.cat((own.new_zeros(1), own.cumsum(0)))
        before = self._gaps[:-1] - self._gaps[self.pointers[rows]]
        self._stride = total + 1
        self._points = rows * self._stride + ends[self.items] - own - before
        self._left = total - (self._gaps[self.pointers[1:]] - self._gaps[self.pointers[:-1]])
        self.drawable = self._left > 0
        self.interactions = int(self.pointers.diff()[self.drawable].sum())

    def draw(self, users: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """(B, count) int64 items, independently for every one of the users, (B,) int64.

        Raises:
            DataError: for a user with nothing left to draw.
        """
        left = self._left[users]
        if left.numel() and int(left.min()) == 0:
            who = int(users[left == 0][0])
            raise DataError(
                f"user {who} (row of the training matrix) has chosen every item that could be drawn as a negative; "
                "leave out users for whom `drawable` is false"
            )
        point = uniform_below(left.unsqueeze(1).expand(-1, count), generator)
        place = torch.searchsorted(self._points, point + (users * self._stride).unsqueeze(1), right=True)
        first = self.pointers[users].unsqueeze(1)
        if self._ends is None:
            return point + (place - first)
        return torch.searchsorted(self._ends, point + self._gaps[place] - self._gaps[first], right=True)


def uniform_below(bounds: Tensor, generator: torch.Generator) -> Tensor:
    """One integer in [0, bound) for every bound; float64 makes the deviation from uniform at most bound * 2^-53."""
    draws = torch.rand(bounds.shape, generator=generator, dtype=torch.float64) * bounds
    return torch.minimum(draws.long(), bounds - 1)


def negative_batches(
    sampler: NegativeSampler, negatives: int, batch_size: int, generator: torch.Generator
) -> Iterator[Triples]:
    """One epoch: every interaction once, in random order, each with fresh negatives (B, negatives) of its user.

    Interactions of users who have nothing to be told from are left out. `batch_size` counts interactions.
    """
    rows = torch.arange(len(sampler.drawable)).repeat_interleave(sampler.pointers.diff())
    kept = sampler.drawable[rows].nonzero().squeeze(1)
    order = kept[torch.randperm(len(kept), generator=generator)]
    # Many batches' negatives at a time: a call costs more than the draws of a small batch.
    for part in order.split(batch_size * max(1, _DRAWS // (batch_size * max(1, negatives)))):
        users, items = rows[part], sampler.items[part]
        drawn = sampler.draw(users, negatives, generator)
        parts = (tensor.split(batch_size) for tensor in (users, items, drawn))
        yield from (Triples(*tensors) for tensors in zip(*parts, strict=True))


def _integer_weights(degrees: Tensor, exponent: float, n_users: int) -> Tensor:
    """degrees^exponent as integers: 1 each if uniform, else scaled to a sum that users' points fit into 63 bits."""
    if exponent == 0:
        return torch.ones_like(degrees)
    bits = min(_BITS, 62 - max(1, n_users).bit_length())
    weights = (degrees.double() / max(1, int(degrees.max()))) ** exponent
    scaled = (weights * (2**bits / max(1.0, float(weights.sum())))).round().long()
    return torch.where(degrees > 0, scaled.clamp(min=1), 0)
