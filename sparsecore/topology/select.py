"""Exact selection: k smallest, k largest, ties decided by position. No sort of everything."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["largest", "smallest", "smallest_mask"]


def smallest(scores: Tensor, k: int) -> Tensor:
    """Positions of the exactly ``k`` smallest of a 1-D tensor, ascending; among equals the first positions win.

    ``torch.topk`` gives k values too, but which of several equal ones it takes is not defined. O(n).
    """
    return torch.nonzero(smallest_mask(scores, k)).view(-1)


def largest(scores: Tensor, k: int) -> Tensor:
    """Positions of the exactly ``k`` largest of a 1-D tensor, ascending; among equals the first positions win."""
    return smallest(-scores, k)


def smallest_mask(scores: Tensor, k: int) -> Tensor:
    """`smallest` as a boolean mask: one byte for each score instead of eight for each selected one.

    Raises:
        ValueError: if k is not in ``0 .. n``.
    """
    n = scores.numel()
    if not 0 <= k <= n:
        raise ValueError(f"cannot select {k} of {n}")
    if k in (0, n):
        return torch.full((n,), k == n, device=scores.device)
    threshold = _kth_smallest(scores, k)
    chosen = scores < threshold
    if scores.device.type != "cpu":  # nothing there waits for the device
        return _with_first(chosen, scores == threshold, k)
    wanted = k - int(torch.count_nonzero(chosen))  # a sum would make an int64 of each
    ties = torch.nonzero(scores == threshold).view(-1)
    chosen[ties[:wanted]] = True
    return chosen


def _with_first(chosen: Tensor, ties: Tensor, k: int) -> Tensor:
    """The mask, and as many of the ties, from the first on, as k takes."""
    kind = torch.int32 if ties.numel() < 2**31 else torch.int64
    return chosen.logical_or_(
        ties.logical_and_(ties.cumsum(0, dtype=kind) <= k - torch.count_nonzero(chosen))
    )


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # Introselect on one copy; torch.kthvalue makes an int64 index of every score besides (3x the memory).
        copy = scores.detach().numpy().copy()
        copy.partition(k - 1)
        return scores.new_tensor(copy[k - 1])
    # On a GPU many times as fast as torch.kthvalue, for which one block of threads passes over all scores.
    n = scores.numel()
    if 2 * k <= n:
        return scores.topk(k, largest=False, sorted=False).values.max()
    return scores.topk(n - k + 1, sorted=False).values.min()
