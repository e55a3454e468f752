"""Random growth on index sets: every free position takes the next bit of a sequence of random bits.

A thread fills a range of rows. It draws the blocks of bits that belong to them, also the one that an earlier thread's
rows end in: what is drawn (`sampling` says how) depends on no thread.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsecore.backends.numba.index_set import IndexSet
from sparsecore.backends.numba.jit import device_function, kernel, share_out, threads
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.simd import at, count, has_avx512, lowest, put
from sparsecore.ops.explore import Index
from sparsecore.sampling import BLOCK, GOLDEN, LEVELS, MIX, plan_draw

__all__ = ["fill"]

_GOLDEN, _FIRST, _SECOND = np.uint64(GOLDEN), np.uint64(MIX[0]), np.uint64(MIX[1])
_I64 = ir.IntType(64)
_ALL = np.uint64(2**64 - 1)


def fill(
    tensors: Index, shape: tuple[int, int], n: int, generator: torch.Generator | None, skip_row: int | None
) -> Index:
    """Index with n free positions added, every subset equally likely; fewer if fewer are free."""
    index, (rows, cols), (crow, col) = IndexSet(tensors, shape), shape, tensors
    skip = rows if skip_row is None else skip_row
    free = (rows - (skip < rows)) * cols - index.nnz
    draw = plan_draw(free, min(n, free), generator)
    nnz = index.nnz + min(n, free)
    if nnz == index.nnz:
        return tensors
    if col is not None:
        crow, col = torch.empty_like(crow), col.new_empty(nnz)
    out = IndexSet((crow, col), shape)
    words = None if out.masks is None else out.masks.view(np.uint32)
    n_chunks = threads(rows * cols)
    edges = rows * np.arange(n_chunks + 1) // n_chunks
    before = np.concatenate((np.zeros(1, np.int64), draw.counts.cumsum()))
    size = BLOCK // 64 + 1 + -(-cols // 64)
    scratch = workspace("fill", n_chunks, size, torch.int64).view(np.uint64)
    _fill(
        index.pointers, index.columns, words, out.stride // 2, cols, skip, np.uint64(draw.key), free, draw.counts,
        before, edges, out.pointers, out.columns, scratch, n_chunks,
    )  # fmt: skip
    out.pointers[rows] = nnz
    return out.index


@kernel
def _fill(
    pointers, col, words, stride, cols, skip, key, free, counts, before, edges, new_pointers, new_col, scratch,
    n_chunks, chunk,
):  # fmt: skip
    """Of a bitmap the words themselves are filled, and ``pointers`` are ``new_pointers``."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    blocks, width = counts.shape[0], (cols + 63) // 64
    first, last = edges[chunk], edges[chunk + 1]
    for w in range(BLOCK // 64 + 1 + width):
        scratch[chunk, w] = 0
    drawn, line = scratch[chunk, : BLOCK // 64 + 1], scratch[chunk, BLOCK // 64 + 1 :]
    rank = (first - (skip < first)) * cols - np.int64(pointers[first])
    block, place = rank // BLOCK, rank % BLOCK
    added = np.int64(0)
    if first < last:
        added = before[block]
    if block < blocks and first < last:
        _draw(drawn, key, block, min(BLOCK, free - block * BLOCK), counts[block])
        for w in range(place >> 6):
            added += count(drawn[w])
        added += count(drawn[place >> 6] & ((np.uint64(1) << np.uint64(place & 63)) - np.uint64(1)))
    for r in range(first, last):
        begin = pointers[r]
        new_pointers[r] = begin + added
        if r == skip:
            continue
        if col is not None:
            for k in range(begin, pointers[r + 1]):
                c = np.uint64(col[k])
                line[c >> np.uint64(6)] |= np.uint64(1) << (c & np.uint64(63))
            end = np.int64(begin) + added
        for w in range(width):
            inside = min(64, cols - 64 * w)
            if col is not None:
                stored = line[w]
                line[w] = 0
            if words is not None:
                base = r * stride + 1 + 2 * w
                stored = np.uint64(at(words, base))
                if inside > 32:
                    stored |= np.uint64(at(words, base + 1)) << np.uint64(32)
            open_ = ~stored & (_ALL >> np.uint64(64 - inside))
            n = count(open_)
            here, shift = place >> 6, place & 63
            bits = drawn[here] >> np.uint64(shift)
            if shift + n > 64:
                bits |= drawn[here + 1] << np.uint64(64 - shift)
            place += n
            if place >= BLOCK:
                place -= BLOCK
                block += 1
                if block < blocks:
                    _draw(drawn, key, block, min(BLOCK, free - block * BLOCK), counts[block])
                    if place > 0:
                        bits |= drawn[0] << np.uint64(n - place)
            new = _deposit(bits, open_)
            added += count(new)
            stored |= new
            if col is not None:
                while stored != 0:
                    new_col[end] = 64 * w + lowest(stored)
                    end += 1
                    stored &= stored - np.uint64(1)
            if words is not None:
                put(words, base, np.uint32(stored & np.uint64(0xFFFFFFFF)))
                if inside > 32:
                    put(words, base + 1, np.uint32(stored >> np.uint64(32)))


@device_function
def _mixed(x):
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, error_model="numpy")
def _draw(drawn, key, block, size, wanted):
    """Bits of a block's members, and 0 behind them: `sampling._members`."""
    start = _mixed(key + np.uint64(block + 1) * _GOLDEN)
    words = (size + 63) // 64
    share = wanted << LEVELS
    q = share // size if 2 * wanted <= size else -(-share // size)
    drawn[:] = np.uint64(0)
    if q >> LEVELS:
        drawn[:words] = _ALL
    else:
        for level in range(LEVELS):
            for w in range(words):
                random = _mixed(start + np.uint64(1 + level * words + w) * _GOLDEN)
                if (q >> level) & 1:
                    drawn[w] |= random
                else:
                    drawn[w] &= random
    if size & 63:
        drawn[words - 1] &= (np.uint64(1) << np.uint64(size & 63)) - np.uint64(1)
    found = 0
    for w in range(words):
        found += count(drawn[w])
    width = 1
    while 1 << width < size:
        width += 1
    missing, number = wanted - found, np.uint64(LEVELS * words)
    joining, missing = missing > 0, abs(missing)
    while missing > 0:
        number += np.uint64(1)
        place = np.int64(_mixed(start + number * _GOLDEN) >> np.uint64(64 - width))
        bit = np.uint64(1) << np.uint64(place & 63)
        if place < size and ((drawn[place >> 6] & bit) == 0) == joining:
            drawn[place >> 6] ^= bit
            missing -= 1


@intrinsic
def _deposit(typing_context, bits, mask):
    """The first ``count(mask)`` bits, in order, in the places of the mask's bits.

    One instruction on processors with AVX-512; older ones of AMD have it too, but count the bits one by one.
    """

    def emit(context, builder, signature, arguments):
        if has_avx512():
            kind = ir.FunctionType(_I64, [_I64, _I64])
            name = "llvm.x86.bmi.pdep.64"
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)
        return _deposit_by_halves(builder, *arguments)

    return types.uint64(types.uint64, types.uint64), emit


def _deposit_by_halves(builder, bits, mask):
    """Bits with 32 or more gaps below them move by 32, then those with 16 more by 16 ... (Hacker's Delight, 7-5).

    Which move is found in the other direction, by closing the mask's gaps.
    """
    gaps, rest, moves = builder.shl(builder.not_(mask), _I64(1)), mask, []
    for step in (1, 2, 4, 8, 16, 32):
        odd = gaps  # whether the number of gaps below a place is odd
        for shift in (1, 2, 4, 8, 16, 32):
            odd = builder.xor(odd, builder.shl(odd, _I64(shift)))
        move = builder.and_(odd, rest)
        rest = builder.or_(builder.xor(rest, move), builder.lshr(move, _I64(step)))
        gaps = builder.and_(gaps, builder.not_(odd))
        moves.append((step, move))
    for step, move in reversed(moves):
        moved = builder.and_(builder.shl(bits, _I64(step)), move)
        bits = builder.or_(builder.and_(bits, builder.not_(move)), moved)
    return builder.and_(bits, mask)
