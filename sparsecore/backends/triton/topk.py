"""The best of a whole catalogue: scores of a tile of items from their sparse rows, and what is kept of them.

For few results (`_MOST_KEPT`) the best score of each tile of items is written, one for 64 items. An item that is among
the k best lies in one of the k best tiles, by best score and then by place (up to rounding: as in any product, of two
items whose scores are as close as float32's error either may come first): only their items are scored again, and
sorted. For more results, and in float64, the scores of a block of items are written and sorted, block by block.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecore.backends.triton.products import WIDEN, load_parts, parts_of, product, split
from sparsecore.backends.triton.rows import bitmap_of, index_of, launches_on, lower_bound, places, tile

__all__ = ["score_topk"]

_MOST_KEPT = 64
_ITEMS = 64  # of a tile
_QUERIES = 64  # at most
_SCORES = 1 << 22  # that are written at a time
_WARPS = 8
# Each tile of items is looked up for some queries at a time: for this many a bitmap is made of csr, where it is not
# much larger than the table, and rows have few words to count.
_MANY, _DENSE_ENOUGH, _NARROW = 64, 1 / 50, 128
_LAST = 2**31 - 1
_UNKNOWN = tl.constexpr(2**63 - 1)  # no score has this key


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
    if n_items == 0:
        ids = torch.full((n_queries, k), -1, dtype=torch.int64, device=queries.device)
        return queries.new_full((n_queries, k), -torch.inf), ids
    seen: tuple[Tensor | None, Tensor | None] = (None, None)
    if seen_crow is not None and seen_col is not None:
        narrow = seen_col.dtype not in (torch.int32, torch.int64)
        seen = seen_crow.contiguous(), (seen_col.to(torch.int32) if narrow else seen_col).contiguous()
    with launches_on(values):
        index = crow, col
        if n_queries >= _MANY and _wants_bitmap(values.numel(), crow, col, n_cols):
            index = bitmap_of(crow, col, n_cols), None
        table, queries = (values.contiguous(), *index_of(*index)), queries.contiguous()
        if k > _MOST_KEPT or values.dtype == torch.float64:
            scores, ids = _by_blocks((queries, *table, *seen, n_queries, n_items), n_cols, k)
        else:
            tiles = triton.cdiv(n_items, _ITEMS)
            each = _SCORES // max(tiles, _ITEMS * min(k, tiles)) // _QUERIES * _QUERIES
            found = []
            for first in range(0, max(1, n_queries), max(_QUERIES, each)):
                some = slice(first, first + max(_QUERIES, each))
                own = (None if seen[0] is None else seen[0][some.start : some.stop + 1], seen[1])
                found.append(_by_tiles(queries[some], table, own, n_items, n_cols, k))
            scores, ids = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    return scores.contiguous(), ids.masked_fill(scores == -torch.inf, -1)


def _wants_bitmap(nnz: int, crow: Tensor, col: Tensor | None, n_cols: int) -> bool:
    dense_enough = nnz >= _DENSE_ENOUGH * (crow.shape[0] - 1) * n_cols
    return col is not None and crow.dtype == torch.int32 and n_cols <= _NARROW and dense_enough


def _tiles(n_queries: int, n_items: int, n_cols: int, dtype: torch.dtype) -> dict[str, int]:
    """Compile-time arguments: `tile`'s, and how many queries and items a program scores at once."""
    shape = tile(n_cols) | {"SEEN_STEPS": n_items.bit_length()}
    if dtype == torch.float64:  # the products of a tile are all there at once, see `_scores`
        return shape | {"QUERIES": 16, "ITEMS": 16, "COLS": 32}
    queries = min(_QUERIES, max(16, triton.next_power_of_2(n_queries)))
    return shape | {"QUERIES": queries, "ITEMS": _ITEMS, "COLS": min(64, shape["COLS"])}


@cache
def _programs(device: torch.device) -> int:
    """Some for each multiprocessor, to hide what one waits for; with more, more of them load the same queries."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _by_tiles(
    queries: Tensor,
    table: tuple[Any, ...],
    seen: tuple[Tensor | None, Tensor | None],
    n_items: int,
    n_cols: int,
    k: int,
) -> tuple[Tensor, Tensor]:
    n, shape = queries.shape[0], _tiles(queries.shape[0], n_items, n_cols, queries.dtype)
    groups, tiles = triton.cdiv(n, shape["QUERIES"]), triton.cdiv(n_items, _ITEMS)
    each = triton.cdiv(tiles, triton.cdiv(_programs(queries.device), max(1, groups)))  # tiles of a program
    parts, number = split(queries, shape["COLS"], exact=True)
    best = torch.empty(n, tiles, dtype=torch.int64, device=queries.device)
    _best_of_tiles[groups, triton.cdiv(tiles, each)](
        best, parts, parts.stride(1), parts.stride(0), *table, *seen, n, n_items, tiles, each,
        **shape, PARTS=number, WIDEN=WIDEN, num_stages=1,
    )  # fmt: skip
    _best_of_unknown[triton.cdiv(tiles, 64), groups](
        best, queries, *table, *seen, n, n_items, tiles, **shape, num_stages=1
    )
    chosen = best.topk(min(k, tiles), sorted=False).values
    candidates = torch.empty(n, chosen.shape[1] * _ITEMS, dtype=torch.int64, device=queries.device)
    del shape["QUERIES"]
    _score_tiles[n, chosen.shape[1]](
        candidates, chosen, queries, *table, *seen, n_items, **shape, num_warps=2
    )
    keys = candidates.topk(k).values
    # What `_keys` made, undone.
    bits = (keys >> 32).to(torch.int32)
    return (bits ^ ((bits >> 31) & _LAST)).view(torch.float32), _LAST - (keys & _LAST)


def _by_blocks(operands: tuple[Any, ...], n_cols: int, k: int) -> tuple[Tensor, Tensor]:
    queries, n_queries, n_items = operands[0], *operands[-2:]
    shape = _tiles(n_queries, n_items, n_cols, queries.dtype)
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
def _keys(scores, place):
    """Numbers of which the larger has the higher float32 score, and among equal scores the lower place."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)  # -0 is no less than 0
    return ((bits ^ ((bits >> 31) & 2147483647)).to(tl.int64) << 32) | (2147483647 - place).to(tl.int64)


@triton.jit
def _best_of_tiles(
    best, parts, pitch, apart, values, crow, col, stride, seen_crow, seen_col, n_queries, n_items, tiles, each,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, SEEN_STEPS: tl.constexpr,
    QUERIES: tl.constexpr, ITEMS: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The key of the best item of each of some tiles, for QUERIES queries; a mark where a score is NaN."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    live = query < n_queries
    start = tl.program_id(1) * each
    stop = tl.minimum(start + each, tiles)
    if seen_crow is not None:
        at, last = _first_seen(seen_crow, seen_col, query, live, start * ITEMS, SEEN_STEPS)
    given, apart = (
        parts + query.to(tl.int64)[:, None] * pitch + tl.arange(0, COLS)[None, :],
        apart.to(tl.int64),
    )
    q, q2, q3 = load_parts(given, apart, live[:, None], PARTS)
    target = best + query.to(tl.int64) * tiles
    for number in range(start, stop):
        item = number * ITEMS + tl.arange(0, ITEMS)
        exists = item < n_items
        total = _times_rows(
            q, q2, q3, values, crow, col, stride, item, exists, 0, N_COLS, COLS, STEPS, PARTS, WIDEN
        )
        for begin in range(COLS, N_COLS, COLS):
            more, more2, more3 = load_parts(given + begin, apart, live[:, None], PARTS)
            total += _times_rows(
                more,
                more2,
                more3,
                values,
                crow,
                col,
                stride,
                item,
                exists,
                begin,
                N_COLS,
                COLS,
                STEPS,
                PARTS,
                WIDEN,
            )
        unknown = tl.max((total != total).to(tl.int32), 1)
        scores = tl.where(exists[None, :], total, float("-inf"))
        if seen_crow is not None:
            scores, at = _without_seen(scores, item, (number + 1) * ITEMS, seen_col, at, last)
        key = _keys(tl.max(scores, 1), tl.zeros_like(query) + number)
        tl.store(target + number, tl.where(unknown > 0, _UNKNOWN, key), mask=live)


@triton.jit
def _times_rows(
    q, q2, q3, values, crow, col, stride, item, exists, begin,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Products of queries, given in parts, and items, over COLS columns."""
    place, stored = places(crow, col, stride, item.to(tl.int64), exists, begin, N_COLS, COLS, STEPS)
    w, w2, w3 = parts_of(tl.load(values + place, mask=stored, other=0), q.dtype, PARTS)
    zero = tl.zeros((q.shape[0], item.shape[0]), tl.float32)
    return product(q, q2, q3, tl.trans(w), tl.trans(w2), tl.trans(w3), zero, PARTS, WIDEN)


@triton.jit
def _best_of_unknown(
    best, queries, values, crow, col, stride, seen_crow, seen_col, n_queries, n_items, tiles,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, SEEN_STEPS: tl.constexpr,
    QUERIES: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Keys in place of marks: the parts of an infinite number add up to NaN, the number itself need not."""
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    live = query < n_queries
    target = best + query.to(tl.int64) * tiles
    begin = tl.program_id(0) * 64
    some = begin + tl.arange(0, 64)[None, :]
    keys = tl.load(target[:, None] + some, mask=live[:, None] & (some < tiles), other=0)
    if tl.max(tl.max(keys, 1), 0) == _UNKNOWN:
        for number in range(begin, tl.minimum(begin + 64, tiles)):
            item = number * ITEMS + tl.arange(0, ITEMS)
            scores = _scores(
                queries,
                values,
                crow,
                col,
                stride,
                query,
                live,
                item,
                n_items,
                N_COLS,
                COLS,
                STEPS,
                QUERIES,
                ITEMS,
            )
            if seen_crow is not None:
                at, last = _first_seen(seen_crow, seen_col, query, live, number * ITEMS, SEEN_STEPS)
                scores, at = _without_seen(scores, item, (number + 1) * ITEMS, seen_col, at, last)
            key = _keys(tl.max(scores, 1), tl.zeros_like(query) + number)
            unknown = tl.load(target + number, mask=live, other=0) == _UNKNOWN
            tl.store(target + number, key, mask=unknown)


@triton.jit
def _score_tiles(
    found, chosen, queries, values, crow, col, stride, seen_crow, seen_col, n_items,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, SEEN_STEPS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """The keys of the items of one of the tiles that were chosen for a query."""
    query = tl.program_id(0).to(tl.int64)
    target = query * tl.num_programs(1) + tl.program_id(1)
    number = 2147483647 - (tl.load(chosen + target) & 2147483647).to(tl.int32)
    item = number * ITEMS + tl.arange(0, ITEMS)
    exists = item < n_items
    total = tl.zeros((ITEMS,), tl.float32)
    for begin in range(0, N_COLS, COLS):
        place, stored = places(crow, col, stride, item.to(tl.int64), exists, begin, N_COLS, COLS, STEPS)
        column = begin + tl.arange(0, COLS)
        left = tl.load(queries + query * N_COLS + column, mask=column < N_COLS, other=0)
        total += tl.sum(tl.load(values + place, mask=stored, other=0) * left[None, :], 1)
    counts = exists & (total == total)
    if seen_crow is not None:
        last = tl.load(seen_crow + query + 1)
        low = tl.load(seen_crow + query) + tl.zeros((ITEMS,), last.dtype)
        at = lower_bound(seen_col, low, last + tl.zeros((ITEMS,), last.dtype), item, SEEN_STEPS)
        counts &= tl.load(seen_col + at, mask=at < last, other=2147483647).to(tl.int32) != item
    scores = tl.where(counts, total, float("-inf"))
    tl.store(found + target * ITEMS + tl.arange(0, ITEMS), _keys(scores, item))


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
