"""The draw of `sparsecore.sampling` by torch's operations: its blocks side by side, on any device, the same members."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecore.sampling import BLOCK, GOLDEN, LEVELS, MIX, Draw

__all__ = ["members", "signed"]


def signed(number: int) -> int:
    """The int64 with these 64 bits: torch multiplies no unsigned numbers, and wraps around as they do."""
    return number - (number >> 63 << 64)


_GOLDEN, _MIX = signed(GOLDEN), tuple(map(signed, MIX))


def members(draw: Draw, first: int, last: int, device: torch.device) -> Tensor:
    """Whether each of the ranks ``first .. last - 1`` is drawn: bool, (last - first,).

    The device is waited for a few times.
    """
    if first == last:
        return torch.zeros(0, dtype=torch.bool, device=device)
    low, high = first // BLOCK, -(-last // BLOCK)
    block = torch.arange(low, high, device=device).unsqueeze(1)
    size = (draw.total - BLOCK * block).clamp_(max=BLOCK)
    count = torch.from_numpy(draw.counts[low:high]).to(device).unsqueeze(1)
    start = _mixed(signed(draw.key) + (block + 1) * _GOLDEN)
    words = (size + 63).div(64, rounding_mode="floor")
    inside = _independent(start, size, count, words)
    # One place more, for what is to change nothing.
    flat = torch.cat((inside.view(-1), inside.new_zeros(1)))
    inside = flat[:-1].view(inside.shape)
    _correct(flat, inside, start, size, count, LEVELS * words)
    return flat[first - low * BLOCK : last - low * BLOCK]


def _mixed(x: Tensor) -> Tensor:
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, shift: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> shift) & ((1 << (64 - shift)) - 1)


def _independent(start: Tensor, size: Tensor, count: Tensor, words: Tensor) -> Tensor:
    """Step 1: members with probability q / 256 each, (blocks, BLOCK)."""
    share = count << LEVELS
    q = torch.where(2 * count <= size, share, share + size - 1).div(size, rounding_mode="floor")
    every = q >> LEVELS
    place = torch.arange(BLOCK // 64, device=start.device)
    bits = -every.expand(-1, BLOCK // 64)
    for level in range(LEVELS):
        random = _mixed(start + (1 + level * words + place) * _GOLDEN)
        mixed = torch.where((q >> level & 1).bool(), bits | random, bits & random)
        bits = torch.where(every == 0, mixed, bits)
    inside = (
        bits.contiguous().view(torch.uint8).unsqueeze(2)
        >> torch.arange(8, dtype=torch.uint8, device=start.device)
    ) & 1
    inside = inside.view(len(start), BLOCK).bool()  # little-endian machines
    return inside & (torch.arange(BLOCK, device=start.device) < size)


def _correct(flat: Tensor, inside: Tensor, start: Tensor, size: Tensor, count: Tensor, drawn: Tensor) -> None:
    """Step 2: random ranks become members, or cease to be, until there are ``count`` in each block."""
    width = torch.zeros_like(size)
    for bit in range(BLOCK.bit_length()):
        width += size - 1 >= 1 << bit
    width.clamp_(min=1)
    row = torch.arange(len(start), device=start.device).unsqueeze(1) * BLOCK
    missing = count - inside.sum(1, keepdim=True)
    while most := int((3 * missing.abs() + 16).mul_(missing != 0).max()):
        asked = (3 * missing.abs() + 16) * (missing != 0)
        number = torch.arange(most, device=start.device)
        place = (_mixed(start + (1 + drawn + number) * _GOLDEN) >> (64 - width)) & ((1 << width) - 1)
        joins = missing > 0
        wanted = (number < asked) & (place < size)
        wanted &= inside.gather(1, place.clamp(max=BLOCK - 1)) != joins
        # Of equal places the first counts.
        order = torch.where(wanted, place * most + number, BLOCK * most + number).sort(1).values
        same = torch.zeros_like(wanted)
        same[:, 1:] = order[:, 1:].div(most, rounding_mode="floor") == order[:, :-1].div(
            most, rounding_mode="floor"
        )
        wanted &= ~torch.zeros_like(wanted).scatter_(1, order % most, same)
        wanted &= wanted.cumsum(1) <= missing.abs()
        flat[torch.where(wanted, row + place, flat.numel() - 1)] = joins.expand_as(wanted)
        changed = wanted.sum(1, keepdim=True)
        missing = torch.where(joins, missing - changed, missing + changed)
        drawn = drawn + asked
