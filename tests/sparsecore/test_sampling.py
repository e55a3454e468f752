"""Random growth: exactly as many, uniform, the same from numpy and from the kernel, for any number of threads."""

from __future__ import annotations

from itertools import combinations

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types
from numba.extending import intrinsic
from scipy.stats import chi2, hypergeom

import sparsecore
from sparsecore import sampling
from sparsecore.backends.numba import fill as kernels
from sparsecore.backends.torch.draw import members
from sparsecore.encoding import ENCODINGS, encode
from sparsecore.ops import explore
from sparsecore.pattern import Pattern
from sparsecore.sampling import BLOCK, plan_draw, sample_ranks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unlikely(counts: np.ndarray, expected: np.ndarray | float, freedom: int) -> bool:
    """A chi-square test at one in a million."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return not chi2.ppf(1e-6, freedom) < statistic < chi2.ppf(1 - 1e-6, freedom)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700) | st.integers(BLOCK - 2, BLOCK + 2) | st.integers(2 * BLOCK, 3 * BLOCK), st.data())
def test_torch_draws_what_numpy_draws(total: int, data: st.DataObject) -> None:
    """All of it, and any part."""
    count = data.draw(st.integers(0, total) | st.sampled_from(sorted({0, 1, total // 2, total - 1, total})))
    expected = torch.zeros(total, dtype=torch.bool)
    for ranks in sample_ranks(total, count, generator(total)):
        expected[ranks] = True
    first = data.draw(st.integers(0, total))
    last = data.draw(st.integers(first, total))
    draw, cpu = plan_draw(total, count, generator(total)), torch.device("cpu")
    assert torch.equal(members(draw, 0, total, cpu), expected)
    assert torch.equal(members(draw, first, last, cpu), expected[first:last])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700) | st.integers(BLOCK - 2, BLOCK), st.data())
def test_the_kernel_draws_what_numpy_draws(size: int, data: st.DataObject) -> None:
    """Exactly as many members, the same in both, whatever is left of a thread's earlier block."""
    wanted = data.draw(st.integers(0, size) | st.sampled_from(sorted({0, 1, size // 2, size - 1, size})))
    key, block = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.integers(0, 2**40))
    members = sampling._members(key, block, size, wanted)
    assert members.shape == (size,)
    assert int(members.sum()) == wanted
    drawn = np.full(BLOCK // 64 + 1, 2**64 - 1, np.uint64)
    kernels._draw(drawn, np.uint64(key), block, size, wanted)
    found = np.unpackbits(drawn.astype("<u8").view(np.uint8), bitorder="little")
    assert np.array_equal(found[:size], members)
    assert not found[size:].any()


@pytest.mark.parametrize(("size", "wanted"), [(8, 3), (8, 4), (7, 5), (9, 1), (9, 8), (12, 6)])
def test_every_subset_is_equally_likely(size: int, wanted: int) -> None:
    """Not only every rank: too few and too many independent bits both occur, and are put right."""
    places = {subset: i for i, subset in enumerate(combinations(range(size), wanted))}
    counts = np.zeros(len(places))
    for key in range(100 * len(places)):
        counts[places[tuple(np.flatnonzero(sampling._members(key, 0, size, wanted)).tolist())]] += 1
    assert not unlikely(counts, 100.0, len(places) - 1)


@pytest.mark.parametrize("wanted", [100, 20_000, 32_768, 65_400])
def test_a_full_block_is_uniform(wanted: int) -> None:
    """Sums over 16 neighbours, and over all ranks 16 apart: hypergeometric in both."""
    hits = sum(sampling._members(key, 3, BLOCK, wanted).astype(np.int64) for key in range(60))
    assert isinstance(hits, np.ndarray)
    spread = 1 - wanted / BLOCK  # without replacement they vary less
    for axis in (0, 1):
        counts = hits.reshape(16, -1).sum(axis=axis)
        expected = 60 * wanted / counts.size
        assert not unlikely((counts - expected) / spread**0.5 + expected, expected, counts.size - 1)


def test_members_per_block_are_hypergeometric() -> None:
    """Two blocks of 64 Ki and of 40 ranks, 30,000 members: how many of them fall into the small block."""
    total, wanted, draws = BLOCK + 40, 30_000, 4000
    found = np.bincount(
        [plan_draw(total, wanted, generator(i)).counts[1] for i in range(draws)], minlength=41
    )
    expected = draws * hypergeom.pmf(np.arange(41), total, wanted, 40)
    common = expected > 5
    assert not unlikely(found[common], expected[common], int(common.sum()) - 1)
    assert found[~common].sum() < 5 * expected[~common].sum() + 5


@pytest.mark.parametrize("total", [0, 1, 63, BLOCK, BLOCK + 1, 3 * BLOCK, 40 * BLOCK - 7])
def test_none_and_all(total: int) -> None:
    before = generator().get_state()
    g = generator()
    assert list(sample_ranks(total, 0, g)) == []
    assert torch.equal(g.get_state(), before)  # nothing to draw: nothing is taken from the generator
    if total:
        assert torch.equal(torch.cat(list(sample_ranks(total, total, g))), torch.arange(total))
        assert not torch.equal(g.get_state(), before)


def test_weights_beyond_what_numpy_counts() -> None:
    """10^11 positions: numpy's hypergeometric generators end at 10^9; ours only need one number for each block."""
    draw = plan_draw(10**11, 3 * 10**10, generator())
    assert int(draw.counts.sum()) == 3 * 10**10
    assert draw.counts[:-1].min() > 0.27 * BLOCK
    assert draw.counts[:-1].max() < 0.33 * BLOCK


def reference(index: explore.Index, shape: tuple[int, int], n: int, skip: int | None) -> explore.Index:
    with sparsecore.backend("torch"):
        return explore.fill(index, shape, n, generator(5), skip)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("shape", "stored", "skip"),
    [
        ((2048, 64), 1, None),  # one less than two blocks
        ((2049, 64), 64, None),  # exactly two blocks
        ((1, 3 * BLOCK + 5), 1, None),  # one row: more chunks than rows
        ((3, 70_001), 90_000, 0),
        ((9000, 33), 200_000, 8999),  # few are free
        ((300, 1000), 299_500, None),
        ((70_000, 3), 1000, 17),
    ],
)
def test_filling_does_not_depend_on_threads(
    encoding: str, shape: tuple[int, int], stored: int, skip: int | None
) -> None:
    pattern = Pattern.random(shape, nnz=stored, skip_row=skip, generator=generator(1))
    free = (shape[0] - (skip is not None)) * shape[1] - pattern.nnz
    for n in (0, 1, free // 3, free - 1, free, free + 10):
        check_fill(pattern, encoding, n, skip)


def check_fill(pattern: Pattern, encoding: str, n: int, skip: int | None) -> None:
    """The same index set for every number of threads as from torch."""

    def index() -> explore.Index:
        if encoding == "csr":
            return pattern.crow.clone(), pattern.col.clone()
        return encode(pattern.crow, pattern.col, pattern.shape[1]), None

    expected = reference(index(), pattern.shape, n, skip)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found = explore.fill(index(), pattern.shape, n, generator(5), skip)
            assert torch.equal(found[0], expected[0])
            if found[1] is not None and expected[1] is not None:
                assert torch.equal(found[1], expected[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_filling_where_a_thread_finds_nothing_free(encoding: str) -> None:
    """The first row takes exactly a block of ranks; what the last row's thread begins with lies behind all of them."""
    row, zero = torch.arange(BLOCK), torch.zeros(1, dtype=torch.int64)
    check_fill(Pattern.from_coo(torch.ones_like(row), row, (2, BLOCK)), encoding, 100, None)
    check_fill(Pattern.from_coo(zero, zero, (2, BLOCK + 1)), encoding, 100, 1)


@intrinsic
def by_halves(typing_context, bits, mask):
    def emit(context, builder, signature, arguments):
        return kernels._deposit_by_halves(builder, *arguments)

    return types.uint64(types.uint64, types.uint64), emit


@numba.njit
def deposit_both(bits, mask):
    return kernels._deposit(bits, mask), by_halves(bits, mask)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1]))
def test_deposit(bits: int, mask: int) -> None:
    expected = 0
    for rank, place in enumerate([i for i in range(64) if mask >> i & 1]):
        expected |= (bits >> rank & 1) << place
    assert deposit_both(np.uint64(bits), np.uint64(mask)) == (expected, expected)
