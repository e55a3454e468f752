"""The best of a whole catalogue: scores of a tile of items from their sparse rows, and what is kept of them.

For few results (`_MOST_KEPT`) a program goes through a part of the catalogue and keeps the best for each of its queries
in registers: neither rows nor scores are ever written. What the parts kept is sorted at the end. For more results the
scores of a block of items are written and sorted, block by block.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecore.backends.triton.rows import index_of, launches_on, lower_bound, places, tile

__all__ = ["score_topk"]

_MOST_KEPT = 64
_SCORES = 1 << 22  # of a block
_WARPS = 8


def score_topk(
    queries: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor | None,
    k: int,
    seen_crow: Tensor | None,
    seen_col: Tensor | None,
    n_cols: int,
) -> tuple[Tensor, Tensor]:
    """Scores (B, k) and row ids (B, k) of the k best rows for each query, best first; a NaN is not among them.

    The ids of a query in ``seen`` must ascend.
    """
    n_queries, n_items = queries.shape[0], crow.shape[0] - 1
    seen: tuple[Tensor | None, Tensor | None] = (None, None)
    if seen_crow is not None and seen_col is not None:
        seen = seen_crow.contiguous(), seen_col.contiguous()
    table = values.contiguous(), *index_of(crow, col)
    operands = queries.contiguous(), *table, *seen, n_queries, n_items
    shape = _tiles(n_queries, n_items, n_cols, values.dtype)
    with launches_on(values):
        scores, ids = (_by_parts if k <= _MOST_KEPT else _by_blocks)(operands, shape, k)
    return scores.contiguous(), ids.masked_fill(scores == -torch.inf, -1)


def _tiles(n_queries: int, n_items: int, n_cols: int, dtype: torch.dtype) -> dict[str, int]:
    """Compile-time arguments: `tile`'s, and how many queries and items a program scores at once."""
    shape = tile(n_cols) | {"SEEN_STEPS": n_items.bit_length()}
    if dtype == torch.float64:  # the products of a tile are all there at once, see `_scores`
        return shape | {"QUERIES": 16, "ITEMS": 16, "COLS": 32}
    queries = min(64, max(16, triton.next_power_of_2(n_queries)))
    return shape | {"QUERIES": queries, "ITEMS": 64, "COLS": min(64, shape["COLS"])}


@cache
def _programs(device: torch.device) -> int:
    """One for each multiprocessor: with more, each begins anew to find what is worth keeping."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _by_parts(operands: tuple[Any, ...], shape: dict[str, int], k: int) -> tuple[Tensor, Tensor]:
    queries, n_queries, n_items = operands[0], *operands[-2:]
    groups = triton.cdiv(n_queries, shape["QUERIES"])
    tiles = triton.cdiv(n_items, shape["ITEMS"])
    each = triton.cdiv(tiles, triton.cdiv(_programs(queries.device), max(1, groups)))  # tiles of a part
    parts, kept = triton.cdiv(tiles, each), triton.next_power_of_2(k)
    scores = queries.new_empty(n_queries, parts * kept)
    ids = torch.empty(n_queries, parts * kept, dtype=torch.int32, device=queries.device)
    _best_of_part[groups, parts](
        scores, ids, *operands, each * shape["ITEMS"], **shape, KEPT=kept, num_warps=_WARPS
    )
    # Ids ascend, and the sort is stable: among equals the lower one stays.
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], ids.gather(1, order[:, :k]).to(torch.int64)


def _by_blocks(operands: tuple[Any, ...], shape: dict[str, int], k: int) -> tuple[Tensor, Tensor]:
    queries, n_queries, n_items = operands[0], *operands[-2:]
    groups = triton.cdiv(n_queries, shape["QUERIES"])
    best = queries.new_full((n_queries, k), -torch.inf)
    ids = torch.full((n_queries, k), -1, dtype=torch.int64, device=queries.device)
    # CUDA's second axis ends at 65,535 programs.
    width = min(max(shape["ITEMS"], _SCORES // max(1, n_queries)), 65_535 * shape["ITEMS"])
    for first in range(0, n_items, width):
        items = torch.arange(first, min(first + width, n_items), device=queries.device)
        scores = queries.new_empty(n_queries, items.numel())
        tiles = triton.cdiv(items.numel(), shape["ITEMS"])
        _score_block[groups, tiles](scores, *operands, first, items.numel(), **shape, num_warps=_WARPS)
        # What was found before comes first.
        scores, order = torch.cat((best, scores), 1).sort(dim=1, descending=True, stable=True)
        candidates = torch.cat((ids, items.expand(n_queries, -1)), 1)
        best, ids = scores[:, :k], candidates.gather(1, order[:, :k])
    return best, ids


@triton.jit
def _best_of_part(
    found_scores, found_ids, queries, values, crow, col, stride, seen_crow, seen_col, n_queries, n_items, part,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, SEEN_STEPS: tl.constexpr,
    QUERIES: tl.constexpr, ITEMS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The KEPT best of ``part`` items for each of QUERIES queries, by ascending id; a negative id with -inf is none."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    live = query < n_queries
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, n_items)
    slot = tl.arange(0, KEPT)[None, :]
    kept = tl.full((QUERIES, KEPT), float("-inf"), values.dtype.element_ty)
    ids = tl.zeros((QUERIES, KEPT), tl.int32) - 1 - slot  # all different, so that each names its slot
    if seen_crow is not None:
        at, last = _first_seen(seen_crow, seen_col, query, live, begin, SEEN_STEPS)
    for first in range(begin, end, ITEMS):
        item = first + tl.arange(0, ITEMS)
        scores = _scores(
            queries, values, crow, col, stride, query, live, item, end, N_COLS, COLS, STEPS, QUERIES, ITEMS
        )
        if seen_crow is not None:
            scores, at = _without_seen(scores, item, first + ITEMS, seen_col, at, last)
        worst = tl.min(kept, 1)
        top = tl.max(scores, 1)
        # For each query that has one an item enters, the first of the best; of the worst the last leaves.
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            new = tl.min(tl.where(scores == top[:, None], item[None, :], 2147483647), 1)
            old = tl.max(tl.where(kept == worst[:, None], ids, -2147483648), 1)
            leaves = (ids == old[:, None]) & (top > worst)[:, None]
            kept = tl.where(leaves, top[:, None], kept)
            ids = tl.where(leaves, new[:, None], ids)
            scores = tl.where(item[None, :] == new[:, None], float("-inf"), scores)
            worst = tl.min(kept, 1)
            top = tl.max(scores, 1)
    rank = tl.zeros((QUERIES, KEPT), tl.int32)
    for other in range(KEPT):
        its = tl.max(tl.where(slot == other, ids, -2147483648), 1)
        rank += (its[:, None] < ids).to(tl.int32)
    row = query.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(found_scores + row[:, None] * KEPT + rank, kept, mask=live[:, None])
    tl.store(found_ids + row[:, None] * KEPT + rank, ids, mask=live[:, None])


@triton.jit
def _score_block(
    found, queries, values, crow, col, stride, seen_crow, seen_col, n_queries, n_items, first, width,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, SEEN_STEPS: tl.constexpr,
    QUERIES: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Scores of QUERIES queries and ITEMS of the items ``first .. first + width - 1``."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    live = query < n_queries
    begin = tl.program_id(1) * ITEMS
    place = begin + tl.arange(0, ITEMS)
    item = first + place
    scores = _scores(
        queries, values, crow, col, stride, query, live, item, n_items, N_COLS, COLS, STEPS, QUERIES, ITEMS
    )
    if seen_crow is not None:
        at, last = _first_seen(seen_crow, seen_col, query, live, first + begin, SEEN_STEPS)
        scores, at = _without_seen(scores, item, first + begin + ITEMS, seen_col, at, last)
    target = found + query.to(tl.int64)[:, None] * width + place[None, :]
    tl.store(target, scores, mask=live[:, None] & (place < width)[None, :])


@triton.jit
def _scores(
    queries, values, crow, col, stride, query, live, item, end,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, QUERIES: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Products of queries and items; -inf for NaN, for queries that are not live and for items from ``end`` on."""
    exists = item < end
    total = tl.zeros((QUERIES, ITEMS), values.dtype.element_ty)
    row = queries + query.to(tl.int64)[:, None] * N_COLS
    for begin in range(0, N_COLS, COLS):
        place, stored = places(crow, col, stride, item.to(tl.int64), exists, begin, N_COLS, COLS, STEPS)
        right = tl.load(values + place, mask=stored, other=0)
        column = begin + tl.arange(0, COLS)[None, :]
        left = tl.load(row + column, mask=live[:, None] & (column < N_COLS), other=0)
        if values.dtype.element_ty == tl.float64:  # which not every version's tl.dot takes
            total += tl.sum(left[:, None, :] * right[None, :, :], 2)
        else:
            total += tl.dot(left, tl.trans(right), input_precision="ieee")
    counts = live[:, None] & exists[None, :] & (total == total)
    return tl.where(counts, total, float("-inf"))


@triton.jit
def _first_seen(seen_crow, seen_col, query, live, first, SEEN_STEPS: tl.constexpr):
    """Where the seen ids from ``first`` on begin for each query, and where they end."""
    begin = tl.load(seen_crow + query, mask=live, other=0)
    last = tl.load(seen_crow + query + 1, mask=live, other=0)
    return lower_bound(seen_col, begin, last, first, SEEN_STEPS), last


@triton.jit
def _without_seen(scores, item, end, seen_col, at, last):
    """Scores of the items before ``end`` with -inf for those that were seen, and where the later seen ones begin."""
    seen = tl.load(seen_col + at, mask=at < last, other=2147483647).to(tl.int32)
    while tl.min(seen, 0) < end:
        scores = tl.where(item[None, :] == seen[:, None], float("-inf"), scores)
        at += (seen < end).to(tl.int32)
        seen = tl.load(seen_col + at, mask=at < last, other=2147483647).to(tl.int32)
    return scores, at
