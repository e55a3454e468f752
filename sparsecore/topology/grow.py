"""Where to grow: the largest gradients at positions that are not stored, found block by block; or at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from sparsecore.errors import TopologyError
from sparsecore.pattern import Pattern, entries
from sparsecore.sampling import sample_ranks
from sparsecore.topology.blocks import BLOCK, RowBlock, block_height, row_blocks
from sparsecore.topology.select import largest

__all__ = ["GradientSource", "grow_by_gradient", "grow_randomly", "merge_sorted"]


class GradientSource(Protocol):
    """What can compute any rows of a weight's dense gradient."""

    def rows(self) -> Tensor | None:
        """Rows that can differ from zero, int64, ascending, unique; None for all."""

    def block(self, rows: Tensor | slice) -> Tensor:
        """Their dense gradient, (len(rows), cols); the caller may write into it."""


def grow_by_gradient(
    source: GradientSource,
    pattern: Pattern,
    survivors: Tensor,
    k: int,
    name: str = "weight",
    skip_row: int | None = None,
) -> Tensor:
    """Positions of the k largest |gradient| outside the surviving weights; fewer if fewer are not zero.

    Scores stream through in blocks of rows with a running top-k: memory is O(block + k), never rows x cols. Ties go to
    the first position.

    Args:
        source: computes rows of the dense gradient.
        pattern: what is stored now.
        survivors: bool, (nnz,): which of it stays.
        k: how many to grow.
        name: of the weight, for the error.
        skip_row: a row that stays empty.

    Returns:
        Linear positions, int64, ascending, at most k.

    Raises:
        TopologyError: if the gradient is NaN or infinite anywhere that is looked at.
    """
    cols = pattern.shape[1]
    device = pattern.col.device
    best = torch.empty(0, dtype=torch.int64, device=device)
    scores: Tensor | None = None
    threshold = 0.0
    for rows, ids, kept in _scored_blocks(source.rows(), pattern, survivors):
        score = source.block(rows).abs_().view(-1)
        if not bool(torch.isfinite(score.max())):  # the maximum of NaN and anything is NaN
            raise TopologyError(
                f"the gradient of {name} is NaN or infinite: nothing was rewritten. Skip this step "
                "(as a gradient scaler does), lower the learning rate, or clip gradients"
            )
        score[kept] = 0  # what stays is no candidate
        if skip_row is not None:
            score.view(-1, cols)[ids == skip_row] = 0
        found = torch.nonzero(score > threshold).view(-1)
        row = found.div(cols, rounding_mode="floor")
        best = torch.cat((best, ids[row] * cols + (found - row * cols)))
        scores = score[found] if scores is None else torch.cat((scores, score[found]))
        if best.numel() > 2 * k or (best.numel() > k and best.numel() >= BLOCK):
            # A later candidate must beat the worst of the k best: among equals the earlier position stays.
            chosen = largest(scores, k)
            best, scores = best[chosen], scores[chosen]
            threshold = float(scores.min()) if k else float("inf")
    if scores is not None and best.numel() > k:
        best = best[largest(scores, k)]
    return best


def _scored_blocks(
    rows: Tensor | None, pattern: Pattern, survivors: Tensor
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """Blocks of rows: what a source is asked for, the row ids, and the local positions of what stays in them."""
    cols = pattern.shape[1]
    if rows is None:
        for block in row_blocks(pattern):
            ids = torch.arange(block.first, block.last, device=pattern.col.device)
            yield slice(block.first, block.last), ids, block.positions[survivors[block.start : block.stop]]
    elif rows.numel():
        for ids in rows.split(block_height(pattern.shape)):
            which, place = entries(pattern.crow, ids)
            stays = survivors[place]
            yield ids, ids, which[stays] * cols + pattern.col[place[stays]]


def grow_randomly(
    pattern: Pattern,
    survivors: Tensor,
    grown: Tensor,
    k: int,
    generator: torch.Generator | None = None,
    skip_row: int | None = None,
) -> Tensor:
    """k positions that neither survive nor are grown already, every subset equally likely; fewer if fewer are free.

    Args:
        pattern: what is stored now.
        survivors: bool, (nnz,): which of it stays.
        grown: linear positions that are taken besides, int64, ascending.
        k: how many to grow.
        generator: CPU generator.
        skip_row: a row that stays empty.

    Returns:
        Linear positions, int64, ascending. Memory O(block + k).
    """
    free = [int((~_taken(block, survivors, grown, skip_row)).sum()) for block in row_blocks(pattern)]
    ends = torch.tensor(free).cumsum(0)
    total = int(ends[-1])
    parts: list[Tensor] = []
    for ranks in sample_ranks(total, min(k, total), generator):
        # Ranks ascend: those of one block follow each other.
        cuts = torch.searchsorted(ranks, ends).tolist()
        height, begin = block_height(pattern.shape), 0
        for index, end in enumerate(cuts):
            if end > begin:
                first = index * height
                block = RowBlock(pattern, first, min(first + height, pattern.shape[0]))
                places = torch.nonzero(~_taken(block, survivors, grown, skip_row)).view(-1)
                local = (ranks[begin:end] - (int(ends[index]) - free[index])).to(places.device)
                parts.append(places[local] + block.base)
                begin = end
    return torch.cat(parts) if parts else grown.new_empty(0)


def _taken(block: RowBlock, survivors: Tensor, grown: Tensor, skip_row: int | None) -> Tensor:
    """Bitmap of the block's positions that are not free."""
    low, high = block.within(grown)
    taken = block.mark(block.positions[survivors[block.start : block.stop]])
    taken[grown[low:high] - block.base] = True
    if skip_row is not None and block.first <= skip_row < block.last:
        taken.view(block.last - block.first, -1)[skip_row - block.first] = True
    return taken


def merge_sorted(a: Tensor, b: Tensor) -> Tensor:
    """Two ascending tensors without common members, as one. Cheapest where the first is the shorter one."""
    from_a = torch.zeros(a.numel() + b.numel(), dtype=torch.bool, device=a.device)
    from_a[torch.searchsorted(b, a) + torch.arange(a.numel(), device=a.device)] = True
    out = a.new_empty(from_a.numel())
    # Scattering by mask makes no index of every member, which would be as large as the result.
    return out.masked_scatter_(from_a, a).masked_scatter_(from_a.logical_not_(), b)
