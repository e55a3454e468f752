"""Exploration by torch's operations on masks of some rows at a time: CUDA, and the CPU reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsecore import ops
from sparsecore.backends.torch.draw import members
from sparsecore.backends.torch.masks import Block, Writer, blocks, bounds
from sparsecore.encoding import stored_mask
from sparsecore.ops.explore import GradientSource, Index
from sparsecore.sampling import Draw, plan_draw
from sparsecore.topology.blocks import BLOCK, block_height
from sparsecore.topology.select import smallest_mask

__all__ = ["fill", "grow", "insert", "move_", "overlay_", "prune", "realign_", "record_", "what_stays"]


def prune(values: Tensor, index: Index, shape: tuple[int, int], k: int) -> Index:
    """Index without the k weights of smallest magnitude."""
    stays, new = what_stays(values, k), Writer(index, shape)
    for block in blocks(index, shape):
        new.add(block.first, _spread(block, stays[block.start : block.stop]))
    return new.index()


def what_stays(values: Tensor, k: int) -> Tensor:
    """Which of the weights are not among the k of smallest magnitude."""
    magnitude = values.abs()
    if magnitude.numel() and not bool(
        torch.isfinite(magnitude.max())
    ):  # the maximum of NaN and anything is NaN
        raise FloatingPointError
    return smallest_mask(magnitude, k).logical_not_()


def _spread(block: Block, numbers: Tensor) -> Tensor:
    """Numbers of the block's nonzeros, each at its position; zero elsewhere."""
    return numbers.new_zeros(block.mask.shape).masked_scatter_(block.mask, numbers)


def insert(index: Index, shape: tuple[int, int], new: Tensor) -> Index:
    """With these linear positions added, which it does not have; ascending."""
    if new.numel() == 0:
        return index
    writer, parts = Writer(index, shape), list(bounds(index, shape))
    edges = torch.tensor([first * shape[1] for (first, _), _ in parts], dtype=new.dtype, device=new.device)
    cuts = [*torch.searchsorted(new, edges).tolist(), new.numel()]
    for number, part in enumerate(parts):
        block = Block(index, shape[1], *part)
        block.mask.view(-1)[new[cuts[number] : cuts[number + 1]].long() - block.base] = True
        writer.add(block.first, block.mask)
    return writer.index()


def grow(
    source: GradientSource,
    index: Index,
    shape: tuple[int, int],
    k: int,
    skip_row: int | None,
    *,
    insert: Callable[[Index, tuple[int, int], Tensor], Index] = insert,
) -> Index:
    """Index with the k positions of largest |gradient| outside it added."""
    best = _Best(k, shape, index[0].device)
    rows = source.rows()
    if rows is None:
        for block in blocks(index, shape):
            every = slice(block.first, block.last)
            ids = torch.arange(block.first, block.last, device=block.mask.device)
            best.offer(source.block(every), ids, block.mask, skip_row)
    elif rows.numel():
        for ids in rows.split(block_height(shape, rows.device)):
            best.offer(source.block(ids), ids, stored_mask(index, ids, shape[1]), skip_row)
    return insert(index, shape, best.positions())


class _Best:
    """The k positions of largest score among those offered, in blocks of ascending rows; among equals the first."""

    def __init__(self, k: int, shape: tuple[int, int], device: torch.device) -> None:
        self.k, self.cols = k, shape[1]
        kind = torch.int32 if shape[0] * shape[1] < 2**31 else torch.int64
        self.kept = torch.empty(0, dtype=kind, device=device)
        self.scores: Tensor | None = None
        self.threshold: Tensor | float = 0.0
        self.finite: list[Tensor] = []  # of each block; the host asks once

    def offer(self, gradient: Tensor, ids: Tensor, stored: Tensor, skip_row: int | None) -> None:
        """Rows of the gradient, which is written over, their ids, and which of their positions are no candidates."""
        score = gradient.abs_()
        self.finite.append(torch.isfinite(score.max()))  # the maximum of NaN and anything is NaN
        score.masked_fill_(stored, 0)
        if skip_row is not None:
            score.masked_fill_((ids == skip_row).unsqueeze(1), 0)
        score = score.view(-1)
        found = torch.nonzero(score > self.threshold).view(-1)
        row = found.div(self.cols, rounding_mode="floor")
        position = ids[row] * self.cols + (found - row * self.cols)
        self.kept = torch.cat((self.kept, position.to(self.kept.dtype)))
        self.scores = score[found] if self.scores is None else torch.cat((self.scores, score[found]))
        held = self.kept.numel()
        if held > 2 * self.k or (held > self.k and held >= BLOCK):
            # A later candidate must beat the worst of the k best: among equals the earlier position stays.
            self._select()
            self.threshold = self.scores.min() if self.k else float("inf")

    def _select(self) -> None:
        assert self.scores is not None
        chosen = smallest_mask(-self.scores, self.k)
        self.kept, self.scores = _only(chosen, self.kept), _only(chosen, self.scores)

    def positions(self) -> Tensor:
        """Linear positions, ascending; fewer than k where fewer have a score."""
        if self.finite and not bool(torch.stack(self.finite).all()):
            raise FloatingPointError
        if self.kept.numel() > self.k:
            self._select()
        return self.kept


def _only(chosen: Tensor, numbers: Tensor) -> Tensor:
    """``numbers[chosen]``; on the CPU in their own memory, where torch makes an int64 index of all that are chosen."""
    if numbers.device.type != "cpu":
        return numbers[chosen]
    end = 0
    for some, part in zip(chosen.split(BLOCK), numbers.split(BLOCK), strict=True):
        found = part[some]
        numbers[end : end + found.numel()] = found
        end += found.numel()
    return numbers[:end]


def overlay_(block: Tensor, values: Tensor, index: Index, rows: Tensor | slice) -> Tensor:
    """The block, with the numbers of its rows' stored positions in their places."""
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=block.device)
    cols = block.shape[1]
    return torch.where(stored_mask(index, rows, cols), ops.gather(values, *index, rows, cols), block)


def fill(
    index: Index,
    shape: tuple[int, int],
    n: int,
    generator: torch.Generator | None,
    skip_row: int | None,
    *,
    members: Callable[[Draw, int, int, torch.device], Tensor] = members,
) -> Index:
    """Index with n free positions added, every subset equally likely."""
    cols = shape[1]
    writer, parts = Writer(index, shape), list(bounds(index, shape))
    free = [(last - first) * cols - (stop - start) for (first, last), (start, stop) in parts]
    if skip_row is not None:
        free[skip_row // block_height(shape, index[0].device)] -= cols  # it stores nothing
    total = sum(free)
    if min(n, total) == 0:
        return index
    draw, rank = plan_draw(total, min(n, total), generator), 0
    for part, own in zip(parts, free, strict=True):
        block = Block(index, cols, *part)
        places = ~block.mask
        if skip_row is not None and block.first <= skip_row < block.last:
            places[skip_row - block.first] = False
        new = torch.zeros_like(places)
        new.masked_scatter_(places, members(draw, rank, rank + own, places.device))
        writer.add(block.first, block.mask.logical_or_(new))
        rank += own
    return writer.index()


def realign_(tensors: Sequence[tuple[Tensor, float]], old: Index, new: Index, shape: tuple[int, int]) -> int:
    """Move the numbers of the nonzeros of ``old`` to their places in ``new``, by one permutation for all."""
    nnz = tensors[0][0].numel()
    source = torch.empty(nnz, dtype=torch.int32 if nnz < 2**31 else torch.int64, device=old[0].device)
    for was, now in zip(blocks(old, shape), blocks(new, shape), strict=True):
        place = was.places().to(source.dtype).add_(was.start).masked_fill_(~was.mask.view(-1), -1)
        source[now.start : now.stop] = place[now.mask.view(-1)]
    return move_(tensors, source)


def move_(tensors: Sequence[tuple[Tensor, float]], source: Tensor) -> int:
    """Each number from its place before, ``source``, which is -1 for what begins now; returns how many were there."""
    fresh = source < 0
    source.clamp_(min=0)
    for tensor, begun in tensors:
        tensor.copy_(tensor.index_select(0, source).masked_fill_(fresh, begun))
    return source.numel() - int(torch.count_nonzero(fresh))


def record_(history: Tensor, index: Index, shape: tuple[int, int]) -> int:
    """Set the bit of every stored position; returns how many were not set before."""
    weights = torch.arange(8, dtype=torch.uint8, device=history.device)
    added = torch.zeros((), dtype=torch.int64, device=history.device)
    for block in blocks(index, shape):
        lead = block.base % 8
        bits = torch.zeros(-(-(lead + block.mask.numel()) // 8) * 8, dtype=torch.uint8, device=history.device)
        bits[lead : lead + block.mask.numel()] = block.mask.view(-1)
        known = history[block.base // 8 :][: bits.numel() // 8]
        unseen = bits.view(-1, 8).bitwise_and_(~(known.unsqueeze(1) >> weights))
        added += unseen.sum()
        known |= (unseen << weights).sum(1, dtype=torch.uint8)
    return int(added)
