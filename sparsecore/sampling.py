"""Exact sampling without replacement, in blocks, from an explicit generator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["sample_ranks"]

# A block of ranks is permuted at a time: bounds the scratch to 2 MiB however large the weight is.
_BLOCK = 1 << 18


def sample_ranks(total: int, count: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """``count`` distinct integers of ``0 .. total - 1``, ascending, every subset equally likely.

    Yields int64 CPU tensors that follow each other, so that no array of ``total`` entries ever exists.

    * few out of many: draw, and draw again what was drawn before;
    * otherwise: decide how many fall into each block of ranks, and cut a random permutation inside each block.

    Raises:
        ValueError: if ``count`` is not in ``0 .. total``.
    """
    if not 0 <= count <= total:
        raise ValueError(f"cannot draw {count} distinct integers out of {total}")
    if count == 0:
        return
    if count * 16 < total:
        yield _by_rejection(total, count, generator)
        return
    for block, taken in enumerate(_block_counts(total, count, generator)):
        start = block * _BLOCK
        size = min(_BLOCK, total - start)
        if taken:
            yield torch.randperm(size, generator=generator)[:taken].sort().values.add_(start)


def _by_rejection(total: int, count: int, generator: torch.Generator | None) -> Tensor:
    chosen = torch.empty(0, dtype=torch.int64)
    while chosen.numel() < count:
        more = torch.randint(total, (count - chosen.numel(),), generator=generator)
        chosen = torch.unique(torch.cat((chosen, more)))  # sorted
    return chosen


def _block_counts(total: int, count: int, generator: torch.Generator | None) -> list[int]:
    """How many of the ``count`` ranks fall into each block.

    Independent coins with p = count / total give a uniform subset of *some* size N (binomial counts per block);
    adding or removing |N - count| uniformly chosen members leaves it uniform, of the right size. This is exact
    at any size, where numpy's hypergeometric generators end at 1e9.
    """
    sizes = torch.full((-(-total // _BLOCK),), _BLOCK, dtype=torch.int64)
    sizes[-1] = total - _BLOCK * (sizes.numel() - 1)
    p = torch.full(sizes.shape, count / total, dtype=torch.float64)
    counts = torch.binomial(sizes.to(torch.float64), p, generator=generator).to(torch.int64)
    surplus = int(counts.sum()) - count
    if surplus:
        members = counts if surplus > 0 else sizes - counts
        ends = members.cumsum(0)
        for ranks in sample_ranks(int(ends[-1]), abs(surplus), generator):
            hit = torch.bincount(torch.searchsorted(ends, ranks, right=True), minlength=sizes.numel())
            counts -= hit if surplus > 0 else -hit
    return counts.tolist()
