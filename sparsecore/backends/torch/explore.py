"""Exploration by torch indexing, in blocks of rows: CUDA, and the CPU reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparsecore import ops
from sparsecore.backends.torch.csr import entries
from sparsecore.encoding import decode, encode, stored_mask
from sparsecore.ops.explore import GradientSource, Index
from sparsecore.pattern import Pattern
from sparsecore.sampling import sample_ranks
from sparsecore.topology.blocks import BLOCK, RowBlock, block_height, row_blocks
from sparsecore.topology.select import largest, smallest_mask

__all__ = ["fill", "grow", "overlay_", "prune", "realign_", "record_"]


def _pattern(index: Index, shape: tuple[int, int]) -> Pattern:
    crow, col = index
    return Pattern(*(decode(crow, shape[1]) if col is None else (crow, col)), shape)


def _encoded(pattern: Pattern, like: Index) -> Index:
    if like[1] is None:
        return encode(pattern.crow, pattern.col, pattern.shape[1]), None
    return pattern.crow, pattern.col


def prune(values: Tensor, index: Index, shape: tuple[int, int], k: int) -> Index:
    """Index without the k weights of smallest magnitude."""
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError
    stays = smallest_mask(values.abs(), k).logical_not_()
    pattern = _pattern(index, shape)
    counts = torch.zeros_like(pattern.crow)
    for block in row_blocks(pattern):
        row = block.positions[stays[block.start : block.stop]].div_(shape[1], rounding_mode="floor")
        counts[block.first + 1 : block.last + 1] = torch.bincount(row, minlength=block.last - block.first)
    crow = counts.cumsum(0).to(counts.dtype)
    return _encoded(Pattern(crow, pattern.col[stays], shape), index)


def grow(source: GradientSource, index: Index, shape: tuple[int, int], k: int, skip_row: int | None) -> Index:
    """Index with the k positions of largest |gradient| outside it added."""
    pattern, cols = _pattern(index, shape), shape[1]
    best = torch.empty(0, dtype=torch.int64, device=pattern.col.device)
    scores: Tensor | None = None
    threshold = 0.0
    for rows, ids, kept in _scored_blocks(source.rows(), pattern):
        score = source.block(rows).abs_().view(-1)
        if not bool(torch.isfinite(score.max())):  # the maximum of NaN and anything is NaN
            raise FloatingPointError
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
    return _encoded(_insert(pattern, best), index)


def _scored_blocks(rows: Tensor | None, pattern: Pattern) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """Blocks of rows: what a source is asked for, the row ids, and the local positions of what stays in them."""
    cols = pattern.shape[1]
    if rows is None:
        for block in row_blocks(pattern):
            ids = torch.arange(block.first, block.last, device=pattern.col.device)
            yield slice(block.first, block.last), ids, block.positions
    elif rows.numel():
        for ids in rows.split(block_height(pattern.shape, rows.device)):
            which, place = entries(pattern.crow, ids)
            yield ids, ids, which * cols + pattern.col[place]


def overlay_(block: Tensor, values: Tensor, index: Index, rows: Tensor | slice) -> Tensor:
    """The block, with the numbers of its rows' stored positions in their places."""
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=block.device)
    cols = block.shape[1]
    return torch.where(stored_mask(index, rows, cols), ops.gather(values, *index, rows, cols), block)


def fill(
    index: Index, shape: tuple[int, int], n: int, generator: torch.Generator | None, skip_row: int | None
) -> Index:
    """Index with n free positions added, every subset equally likely."""
    pattern = _pattern(index, shape)
    free = [int((~_taken(block, skip_row)).sum()) for block in row_blocks(pattern)]
    ends = torch.tensor(free).cumsum(0)
    total = int(ends[-1])
    parts = [torch.empty(0, dtype=torch.int64, device=pattern.col.device)]
    for ranks in sample_ranks(total, min(n, total), generator):
        # Ranks ascend: those of one block follow each other.
        cuts = torch.searchsorted(ranks, ends).tolist()
        height, begin = block_height(shape, pattern.col.device), 0
        for number, end in enumerate(cuts):
            if end > begin:
                first = number * height
                block = RowBlock(pattern, first, min(first + height, shape[0]))
                places = torch.nonzero(~_taken(block, skip_row)).view(-1)
                local = (ranks[begin:end] - (int(ends[number]) - free[number])).to(places.device)
                parts.append(places[local] + block.base)
                begin = end
    return _encoded(_insert(pattern, torch.cat(parts)), index)


def _taken(block: RowBlock, skip_row: int | None) -> Tensor:
    """Bitmap of the block's positions that are not free."""
    taken = block.mark(block.positions)
    if skip_row is not None and block.first <= skip_row < block.last:
        taken.view(block.last - block.first, -1)[skip_row - block.first] = True
    return taken


def _insert(pattern: Pattern, new: Tensor) -> Pattern:
    """With these linear positions added, which it does not have; ascending."""
    if new.numel() == 0:
        return pattern
    cols = pattern.shape[1]
    col = pattern.col.new_empty(pattern.nnz + new.numel())
    counts = torch.zeros_like(pattern.crow)
    begin = 0
    for block in row_blocks(pattern):
        edges = torch.tensor([block.base, block.base + block.numel], device=new.device)
        low, high = torch.searchsorted(new, edges).tolist()
        merged = torch.nonzero(block.mark(new[low:high] - block.base) | block.mark(block.positions)).view(-1)
        row = merged.div(cols, rounding_mode="floor")
        col[begin : begin + merged.numel()] = (merged - row * cols).to(col.dtype)
        counts[block.first + 1 : block.last + 1] = torch.bincount(row, minlength=block.last - block.first)
        begin += merged.numel()
    return Pattern(counts.cumsum(0).to(counts.dtype), col, pattern.shape)


def realign_(tensors: Sequence[tuple[Tensor, float]], old: Index, new: Index, shape: tuple[int, int]) -> int:
    """Move the numbers of the nonzeros of ``old`` to their places in ``new``, by one permutation for all."""
    before, after = _pattern(old, shape), _pattern(new, shape)
    kind = torch.int32 if before.nnz < 2**31 else torch.int64
    source = torch.zeros(before.nnz, dtype=kind, device=before.col.device)
    is_new = torch.zeros(before.nnz, dtype=torch.bool, device=before.col.device)
    for was, now in zip(row_blocks(before), row_blocks(after), strict=True):
        fresh = ~was.mark(was.positions)[now.positions]
        stays = torch.nonzero(now.mark(now.positions)[was.positions]).view(-1)
        is_new[now.start : now.stop] = fresh
        source[now.start : now.stop][~fresh] = (was.start + stays).to(kind)
    for tensor, begun in tensors:
        tensor.copy_(tensor.index_select(0, source).masked_fill_(is_new, begun))
    return before.nnz - int(is_new.sum())


def record_(history: Tensor, index: Index, shape: tuple[int, int]) -> int:
    """Set the bit of every stored position; returns how many were not set before."""
    added = 0
    for block in row_blocks(_pattern(index, shape)):
        positions = block.positions + block.base
        byte = positions.div(8, rounding_mode="floor")
        bit = (positions - byte * 8).to(torch.uint8)
        unseen = (history[byte] >> bit) & 1 == 0
        byte, bit = byte[unseen], bit[unseen]
        # Bits of one byte are distinct and not set: adding them is or-ing them.
        history.index_add_(0, byte, torch.ones_like(bit) << bit)
        added += byte.numel()
    return added
