"""Exact sampling without replacement from an explicit generator: which of ``total`` ranks, block by block.

A block's members are drawn as bits, by hashing counters (splitmix64, Steele et al., OOPSLA 2014), so that blocks can be
drawn in any order and by any thread. This is the definition, in numpy; the numba backend has a kernel that draws the
same bits.

1. *Independent bits*: every rank is a member with probability q / 256, next to count / size. The bits of q, from the
   lowest on, say whether to *or* or to *and* a random word to what is there: eight words give 64 of them.
2. *The exact number*: random ranks turn from members to others, or the other way round, until there are ``count``; a
   rank that is what it should turn into already, or no rank of the block, is passed over.

Every subset is equally likely: independent bits of one probability make all sets of the same size equally likely, and
taking uniformly chosen members out, or others in, treats all ranks alike: it keeps that, whatever q is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["BLOCK", "GOLDEN", "LEVELS", "MIX", "Draw", "plan_draw", "sample_ranks"]

BLOCK = 1 << 16  # ranks: 8 KiB of bits, which stay in the first-level cache
_TOGETHER = 16  # blocks that are yielded as one: what is done with them costs more than 64 Ki ranks are worth
LEVELS = 8  # random words for a word of bits; more would cost more than they save in step 2
GOLDEN = 0x9E3779B97F4A7C15
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class Draw:
    """A sample that is determined, and not yet made.

    Attributes:
        total: the ranks are ``0 .. total - 1``.
        key: of the hash.
        counts: int64, how many members each block of `BLOCK` ranks has.
    """

    total: int
    key: int
    counts: np.ndarray


def plan_draw(total: int, count: int, generator: torch.Generator | None = None) -> Draw:
    """``count`` distinct ranks, every subset equally likely. One number is taken from the generator, if count > 0.

    Independent coins with p = count / total give a uniform subset of *some* size N (binomial counts per block);
    removing or adding |N - count| uniformly chosen members leaves it uniform, of the right size. This is exact
    at any size, where numpy's hypergeometric generators end at 1e9.

    Raises:
        ValueError: if ``count`` is not in ``0 .. total``.
    """
    if not 0 <= count <= total:
        raise ValueError(f"cannot draw {count} distinct integers out of {total}")
    sizes = np.full(-(-total // BLOCK), BLOCK, np.int64)
    if count == 0:
        return Draw(total, 0, np.zeros_like(sizes))
    sizes[-1] = total - BLOCK * (sizes.size - 1)
    rng = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
    counts = rng.binomial(sizes, count / total)
    surplus = int(counts.sum()) - count
    if surplus:
        members = counts if surplus > 0 else sizes - counts
        ends = members.cumsum()
        chosen = rng.choice(int(ends[-1]), abs(surplus), replace=False, shuffle=False)
        hit = np.bincount(np.searchsorted(ends, chosen, side="right"), minlength=sizes.size)
        counts = counts - hit if surplus > 0 else counts + hit
    return Draw(total, int(rng.integers(2**64, dtype=np.uint64)), counts)


def sample_ranks(total: int, count: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """``count`` distinct integers of ``0 .. total - 1``, ascending, every subset equally likely.

    Yields int64 CPU tensors that follow each other, so that no array of ``total`` entries ever exists.

    Raises:
        ValueError: if ``count`` is not in ``0 .. total``.
    """
    draw = plan_draw(total, count, generator)
    for first in range(0, draw.counts.size, _TOGETHER):
        members = [
            _members(draw.key, block, min(BLOCK, total - block * BLOCK), taken)
            for block, taken in enumerate(draw.counts[first : first + _TOGETHER].tolist(), first)
        ]
        ranks = torch.from_numpy(np.flatnonzero(np.concatenate(members)))
        if ranks.numel():
            yield ranks.add_(first * BLOCK)


def _members(key: int, block: int, size: int, count: int) -> np.ndarray:
    """Whether each rank of a block is drawn, bool."""
    start = _mixed(np.array([key], np.uint64), block + 1, block + 2)
    words = -(-size // 64)
    # Towards step 2's cheaper side: few members come in where most are not, or go where most are.
    share = count << LEVELS
    q = share // size if 2 * count <= size else -(-share // size)
    bits = np.full(words, -(q >> LEVELS)).astype(np.uint64)
    for level in range(LEVELS if q >> LEVELS == 0 else 0):
        random = _mixed(start, 1 + level * words, 1 + (level + 1) * words)
        bits = bits | random if q >> level & 1 else bits & random
    inside = np.unpackbits(bits.astype("<u8").view(np.uint8), count=size, bitorder="little").view(bool)
    drawn, width = LEVELS * words, _width(size)
    while missing := count - int(inside.sum()):
        n = 3 * abs(missing) + 16
        places = _mixed(start, 1 + drawn, 1 + drawn + n) >> np.uint64(64 - width)
        places = places[places < size].astype(np.int64)
        places = places[inside[places] != (missing > 0)]
        first = np.sort(np.unique(places, return_index=True)[1])[: abs(missing)]
        inside[places[first]] = missing > 0
        drawn += n
    return inside


def _width(size: int) -> int:
    """Bits of a random rank of a block."""
    return max(1, (size - 1).bit_length())


def _mixed(start: np.ndarray, first: int, last: int) -> np.ndarray:
    """Numbers ``first .. last - 1`` of the splitmix64 sequence that begins at ``start``."""
    x = start + np.arange(first, last, dtype=np.uint64) * np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX[1])
    return x ^ (x >> np.uint64(31))
