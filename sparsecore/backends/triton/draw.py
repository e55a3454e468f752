"""The draw of `sparsecore.sampling` on a GPU: a program draws a block, the same members as everywhere."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecore.backends.torch.draw import signed
from sparsecore.backends.triton.rows import launches_on, ones
from sparsecore.sampling import BLOCK, GOLDEN, LEVELS, MIX, Draw

__all__ = ["members"]

_BLOCK = tl.constexpr(BLOCK)
_LEVELS = tl.constexpr(LEVELS)
_GOLDEN = tl.constexpr(signed(GOLDEN))
_FIRST_MIX = tl.constexpr(signed(MIX[0]))
_SECOND_MIX = tl.constexpr(signed(MIX[1]))


def members(draw: Draw, first: int, last: int, device: torch.device) -> Tensor:
    """Whether each of the ranks ``first .. last - 1`` is drawn: bool, (last - first,). Waits for the device once."""
    if first == last:
        return torch.zeros(0, dtype=torch.bool, device=device)
    low, high = first // BLOCK, -(-last // BLOCK)
    key = np.array([signed(draw.key)], np.int64)
    plan = torch.from_numpy(np.concatenate((key, draw.counts[low:high]))).to(device)
    words = torch.empty(high - low, BLOCK // 64, dtype=torch.int64, device=device)
    with launches_on(words):
        _draw[high - low,](words, plan, low, draw.total, WORDS=BLOCK // 64, enable_fp_fusion=True)
    bits = words.view(torch.uint8).view(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=device)
    return bits.bitwise_and_(1).view(torch.bool).view(-1)[first - low * BLOCK : last - low * BLOCK]


@triton.jit
def _mixed(x):
    """What splitmix64 makes of its state."""
    x = (x ^ _shifted(x, 30)) * _FIRST_MIX
    x = (x ^ _shifted(x, 27)) * _SECOND_MIX
    return x ^ _shifted(x, 31)


@triton.jit
def _shifted(x, by: tl.constexpr):
    """To the right, with zeros from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)


@triton.jit
def _draw(out, plan, low, total, WORDS: tl.constexpr):
    """The members of a block, a bit each. What is done in which order is said in `sparsecore.sampling`."""
    block = low + tl.program_id(0).to(tl.int64)
    size = tl.minimum(total - block * _BLOCK, _BLOCK)
    count = tl.load(plan + 1 + tl.program_id(0))
    start = _mixed(tl.load(plan) + (block + 1) * _GOLDEN)
    words = (size + 63) // 64
    share = count << _LEVELS
    q = tl.where(2 * count <= size, share, share + size - 1) // size
    place = tl.arange(0, WORDS).to(tl.int64)
    bits = tl.zeros((WORDS,), tl.int64) - (q >> _LEVELS)
    if (q >> _LEVELS) == 0:
        for level in tl.static_range(_LEVELS):
            random = _mixed(start + (1 + level * words + place) * _GOLDEN)
            bits = tl.where(((q >> level) & 1) != 0, bits | random, bits & random)
    left = size - 64 * place  # of the last word only some bits are ranks
    bits = tl.where(left >= 64, bits, bits & ((1 << tl.minimum(tl.maximum(left, 0), 63)) - 1))
    out += tl.program_id(0).to(tl.int64) * WORDS
    tl.store(out + place, bits)
    missing = count - tl.sum((ones(bits.to(tl.int32)) + ones((bits >> 32).to(tl.int32))).to(tl.int64), 0)
    width = count * 0
    for bit in tl.static_range(17):
        width += ((size - 1) >= (1 << bit)).to(tl.int64)
    width = tl.maximum(width, 1)
    number = start + (1 + _LEVELS * words) * _GOLDEN
    tl.debug_barrier()  # the words are there before one of them is changed
    while missing != 0:
        rank = (_mixed(number) >> (64 - width)) & ((1 << width) - 1)
        number += _GOLDEN
        if rank < size:
            one = (rank * 0 + 1) << (rank % 64)
            if missing > 0:
                before = tl.atomic_or(out + rank // 64, one)
                missing -= ((before & one) == 0).to(tl.int64)
            else:
                before = tl.atomic_and(out + rank // 64, ~one)
                missing += ((before & one) != 0).to(tl.int64)
