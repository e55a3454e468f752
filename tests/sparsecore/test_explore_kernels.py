"""Exploration kernels: the same decisions as the torch implementation, whatever the encoding and number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from devices import AsOnAGpu
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import misaligned, of_numba
from torch import Tensor

import sparsecore
from sparsecore import DynamicSparsity, SparseEmbedding
from sparsecore.backends.numba import jit, selection
from sparsecore.encoding import ENCODINGS, decode, encode
from sparsecore.ops import explore
from sparsecore.pattern import Pattern
from sparsecore.topology import blocks
from sparsecore.topology.select import smallest

Index = explore.Index
Change = Callable[[Tensor], Tensor]


def unchanged(t: Tensor) -> Tensor:
    return t


@pytest.fixture(params=[1, 2, 5])
def n_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Source:
    """A gradient that is there already."""

    def __init__(self, gradient: Tensor, rows: Tensor | None = None, change: Change = unchanged) -> None:
        self.gradient, self._rows, self._change = gradient, rows, change
        self.asked: list[Tensor | slice] = []

    def rows(self) -> Tensor | None:
        return self._rows

    def block(self, rows: Tensor | slice) -> Tensor:
        self.asked.append(rows)
        return self._change(self.gradient[rows].clone())


def index_of(pattern: Pattern, encoding: str) -> Index:
    if encoding == "bitmap":
        return encode(pattern.crow, pattern.col, pattern.shape[1]), None
    return pattern.crow.clone(), pattern.col.clone()


def mask_of(index: Index, shape: tuple[int, int]) -> Tensor:
    crow, col = index
    return Pattern(*(decode(crow, shape[1]) if col is None else (crow, col)), shape).to_mask()


def assert_same(a: Index, b: Index) -> None:
    assert torch.equal(a[0], b[0])
    assert (a[1] is None) == (b[1] is None)
    assert a[1] is None or b[1] is None or (torch.equal(a[1], b[1]) and a[1].dtype == b[1].dtype)


@pytest.mark.parametrize("name", ["numba", "torch"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cols", [1, 16, 61, 700])
def test_overlay(encoding: str, dtype: torch.dtype, cols: int, n_threads: int, name: str) -> None:
    pattern = Pattern.random((300, cols), 0.3, generator=torch.Generator().manual_seed(cols))
    index, values = index_of(pattern, encoding), torch.randn(pattern.nnz, dtype=dtype)
    weight = torch.zeros(300, cols, dtype=dtype).masked_scatter_(pattern.to_mask(), values)
    block = torch.randn(300, cols, dtype=dtype)
    expected = torch.where(pattern.to_mask(), weight, block)
    with sparsecore.backend(name):
        for rows in (slice(0, 300), slice(7, 290), slice(5, 5), torch.arange(3, 300, 7)):
            assert torch.equal(explore.overlay_(block[rows].clone(), values, index, rows), expected[rows])
        across = block.t().contiguous().t()  # not contiguous
        assert torch.equal(explore.overlay_(across, values, index, slice(0, 300)), expected)


def numbers(kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers: all different, few different ones, all equal, or nearly all zero."""
    x = torch.randn(shape, dtype=dtype, generator=generator)
    if kind == "ties":
        return (2 * x).round()
    if kind == "equal":
        return torch.ones_like(x)
    return x if kind == "normal" else x * (torch.rand(shape, generator=generator) < 0.05)


def explore_once(
    backend: str,
    index: Index,
    shape: tuple[int, int],
    values: Tensor,
    source: Source | None,
    k: int,
    skip: int | None,
    change: Change = unchanged,
) -> tuple[list[Index], list[Tensor], list[int]]:
    """Every index, realigned tensor and count on the way through one exploration. ``change`` alters the memory, not the
    numbers, of what it is given.
    """
    values, index = change(values), copied(index, change)
    nnz, seen, generator = values.numel(), [], torch.Generator().manual_seed(3)
    with sparsecore.backend(backend):
        now = explore.prune(values, index, shape, k)
        seen.append(copied(now))
        now = copied(now, change)
        if source is not None:
            now = explore.grow(source, now, shape, k, skip)
            seen.append(copied(now))
            now = copied(now, change)
        now = explore.fill(now, shape, nnz - int(mask_of(now, shape).sum()), generator, skip)
        seen.append(now)
        now = copied(now, change)
        history = change(torch.zeros(-(-shape[0] * shape[1] // 8), dtype=torch.uint8))
        counts = [explore.record_(history, index, shape), explore.record_(history, now, shape)]
        state = change(torch.arange(nnz, dtype=values.dtype))
        tensors = [
            change(values.clone()),
            state,
            state.to(torch.int64),
            torch.stack((state, -state), 1)[:, 1],
        ]
        begun = [0.0, 0.25, 7.0, 0.5]
        counts.append(explore.realign_(list(zip(tensors, begun, strict=True)), index, now, shape))
    return seen, [*tensors, history, generator.get_state()], counts


def copied(index: Index, change: Change = Tensor.clone) -> Index:
    return change(index[0]), None if index[1] is None else change(index[1])


def compare(
    shape: tuple[int, int], density: float, fraction: float, encoding: str, dtype: torch.dtype, kind: str,
    skip: int | None, some_rows: bool, random: bool, seed: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    free = (shape[0] - (skip is not None)) * shape[1]
    pattern = Pattern.random(
        shape, nnz=min(free, max(1, round(density * shape[0] * shape[1]))), skip_row=skip, generator=g
    )
    compare_on(pattern, fraction, encoding, dtype, kind, skip, some_rows, random, g)


def compare_on(
    pattern: Pattern, fraction: float, encoding: str, dtype: torch.dtype, kind: str, skip: int | None, some_rows: bool,
    random: bool, g: torch.Generator, change: Change = unchanged,
) -> None:  # fmt: skip
    """One exploration on both backends, numba's of memory that ``change`` has altered."""
    shape = pattern.shape
    values, k = numbers(kind, (pattern.nnz,), dtype, g), int(np.ceil(fraction * pattern.nnz))
    gradient = numbers(kind, shape, dtype, g)
    rows = torch.nonzero(torch.rand(shape[0], generator=g) < 0.3).view(-1) if some_rows else None
    index = index_of(pattern, encoding)
    before = copied(index)
    ours, theirs = (
        explore_once(
            name, index, shape, values, None if random else Source(gradient, rows, how), k, skip, how
        )
        for name, how in (("numba", change), ("torch", unchanged))
    )
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert_same(a, b)
    for x, y in zip(ours[1], theirs[1], strict=True):
        assert torch.equal(x, y)
    assert ours[2] == theirs[2]
    assert_same(index, before)  # deciding writes nothing
    final = ours[0][-1]
    now, was = mask_of(final, shape), pattern.to_mask()
    assert int(now.sum()) == pattern.nnz
    assert skip is None or not now[skip].any()
    assert ours[2] == [pattern.nnz, int((now & ~was).sum()), int((now & was).sum())]
    if final[1] is None:  # pointers and padding too
        assert_same(final, index_of(Pattern.from_mask(now), "bitmap"))
    position = torch.cumsum(was.view(-1), 0).sub(1)[now.view(-1)].to(dtype)
    expected = torch.where(was.view(-1)[now.view(-1)], position, 0.25)
    assert torch.equal(ours[1][1], expected)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.sampled_from([1, 3, 10, 16, 17, 32, 50, 64, 65, 200, 300]),
    density=st.sampled_from([0.02, 0.1, 0.25, 0.5, 0.9, 1.0]),
    fraction=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0]),
    encoding=st.sampled_from(ENCODINGS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kind=st.sampled_from(["normal", "ties", "equal", "zeros"]),
    padded=st.booleans(),
    some_rows=st.booleans(),
    random=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_small_weights(
    rows: int, cols: int, density: float, fraction: float, encoding: str, dtype: torch.dtype, kind: str,
    padded: bool, some_rows: bool, random: bool, seed: int,
) -> None:  # fmt: skip
    skip = seed % rows if padded and rows > 1 else None
    compare((rows, cols), density, fraction, encoding, dtype, kind, skip, some_rows, random, seed)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("shape", "density", "fraction", "kind", "some_rows", "random"),
    [
        ((20_000, 64), 0.25, 0.3, "normal", False, False),  # several blocks, a sampled threshold, two threads
        ((20_000, 64), 0.5, 0.9, "ties", False, False),
        ((20_000, 64), 0.1, 0.5, "equal", False, False),
        ((20_000, 64), 0.3, 0.5, "zeros", True, False),  # few gradients: mostly random
        ((3_000, 333), 0.2, 0.4, "normal", True, False),
        ((3_000, 333), 0.7, 1.0, "normal", False, True),  # random from nothing
        ((7, 70_000), 0.3, 0.5, "normal", False, False),  # rows larger than a tile
    ],
)
def test_large_weights(
    n_threads: int, encoding: str, shape: tuple[int, int], density: float, fraction: float, kind: str,
    some_rows: bool, random: bool,
) -> None:  # fmt: skip
    compare(shape, density, fraction, encoding, torch.float32, kind, 5, some_rows, random, seed=1)


EXTREME = ("empty rows", "full rows", "one row holds all", "full", "one number", "one row", "edges")
EXPLORED = [(0.4, "ties", False, False), (1.0, "normal", True, False), (0.3, "zeros", False, True)]


def extreme(name: str, cols: int, g: torch.Generator) -> Pattern:
    """A pattern of up to seven rows, which is three where they are long."""
    rows = 1 if name == "one row" else 7 if cols < 1000 else 3
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    if name in ("empty rows", "one row"):
        mask[::2] = torch.rand(mask[::2].shape, generator=g) < 0.4
    elif name == "full rows":
        mask[1::2] = True
    elif name == "one row holds all":
        mask[rows // 2] = True
    elif name == "full":
        mask[:] = True
    elif name == "edges":
        mask[:, [0, -1]] = True
    if name == "one number" or not mask.any():
        mask[rows // 2, -1] = True
    return Pattern.from_mask(mask)


@of_numba
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("cols", [1, 8, 256, 257, 32768, 32769, 65536])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_patterns(name: str, cols: int, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one thread, and by as many as or more than there are rows; of tables with a row that stays empty, too."""
    monkeypatch.setattr(jit, "_SERIAL_WORK", 0)
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)  # put back by the fixture of conftest.py
        for case in EXPLORED:
            for skip in (None, 1) if name == "empty rows" else (None,):
                g = torch.Generator().manual_seed(cols)
                pattern = extreme(name, cols, g)
                fraction, kind, some_rows, random = case
                compare_on(pattern, fraction, encoding, torch.float32, kind, skip, some_rows, random, g)


@of_numba
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 40), (4, 17), (40, 1)])
def test_more_threads_than_rows(
    shape: tuple[int, int], dtype: torch.dtype, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "_SERIAL_WORK", 0)
    torch.set_num_threads(5)
    for fraction, kind, some_rows, random in EXPLORED:
        for density in (0.0, 0.3, 0.9):  # from one number on
            compare(shape, density, fraction, encoding, dtype, kind, None, some_rows, random, seed=2)


@of_numba
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cols", [17, 64, 300, 33_000])  # stored as uint8, int16, int32
def test_memory_that_begins_behind_a_cache_line(
    cols: int, dtype: torch.dtype, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, gradients, indices, histories and what belongs to the values."""
    monkeypatch.setattr(jit, "_SERIAL_WORK", 0)
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        for fraction, kind, some_rows, random in EXPLORED:
            g = torch.Generator().manual_seed(cols)
            pattern = Pattern.random((30 if cols < 1000 else 4, cols), 0.3, generator=g)
            compare_on(
                pattern, fraction, encoding, dtype, kind, None, some_rows, random, g, change=misaligned
            )


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
@pytest.mark.parametrize("largest", [700, 1 << 22], ids=["blocks", "one block"])
def test_a_gpu_takes_other_ways_to_the_same_decisions(
    encoding: str, kind: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_GPU_LEAST", largest)
    monkeypatch.setattr(blocks, "_GPU_BLOCK", largest)
    shape, generator = (50, 61), torch.Generator().manual_seed(1)
    pattern = Pattern.random(shape, 0.3, skip_row=5, generator=generator)
    index = index_of(pattern, encoding)
    values = numbers(kind, (pattern.nnz,), torch.float32, generator)
    gradient = numbers(kind, shape, torch.float32, generator)
    for rows in (None, torch.arange(1, 50, 3)):
        here = explore_once("torch", index, shape, values, Source(gradient, rows), 60, 5)
        with AsOnAGpu():
            assert blocks.block_height(shape, values.device) == min(largest // 61, largest)
            there = explore_once("torch", index, shape, values, Source(gradient, rows), 60, 5)
        for a, b in zip(here[0], there[0], strict=True):
            assert_same(a, b)
        for x, y in zip(here[1], there[1], strict=True):
            assert torch.equal(x, y)
        assert here[2] == there[2]


def test_how_much_of_a_weight_a_gpu_looks_at_at_a_time() -> None:
    """All of a small weight; a quarter of a larger one; never more than 16 M positions, but always a row."""
    gpu = torch.device("cuda")
    assert blocks.block_height((60_000, 64), gpu) >= 60_000
    assert blocks.block_height((500_000, 64), gpu) == 125_000
    assert blocks.block_height((10_000_000, 64), gpu) == (1 << 24) // 64
    assert blocks.block_height((3, 1 << 25), gpu) == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("direction", ["up", "down", "apart", "together"])
def test_state_moves_far(n_threads: int, encoding: str, direction: str) -> None:
    """Every weight leaves one part of the rows for another: what crosses between threads waits aside."""
    shape, g = (3000, 50), torch.Generator().manual_seed(0)
    outer = torch.zeros(shape, dtype=torch.bool)
    outer[:700] = outer[-800:] = True
    high = torch.zeros(shape, dtype=torch.bool)
    high[1500:] = True
    start, end = {
        "up": (~high, high),
        "down": (high, ~high),
        "apart": (~outer, outer),
        "together": (outer, ~outer),
    }[direction]
    nnz = 40_000
    masks = []
    for where in (start, end):
        score = torch.rand(shape, generator=g) + where  # nearly all weights in one part
        keep = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
        keep[score.view(-1).topk(nnz).indices] = True
        masks.append(keep.view(shape))
    masks[1][100:110] |= masks[0][100:110]  # some stay
    masks[1][110:120] |= masks[0][110:120]
    extra = torch.nonzero((masks[1] & ~masks[0]).view(-1)).view(-1)[: int(masks[1].sum()) - nnz]
    masks[1].view(-1)[extra] = False
    old, new = (index_of(Pattern.from_mask(mask), encoding) for mask in masks)
    dense = torch.full(shape, 0.5, dtype=torch.float64)
    dense[masks[0]] = torch.randn(nnz, dtype=torch.float64, generator=g)
    for dtype in (torch.float32, torch.float64):
        tensor = dense[masks[0]].to(dtype)
        kept = explore.realign_([(tensor, 0.5)], old, new, shape)
        assert kept == int((masks[0] & masks[1]).sum())
        assert torch.equal(tensor, dense[masks[1]].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda n, g: torch.randn(n, generator=g, dtype=torch.float64),
        lambda n, g: torch.randint(0, 3, (n,), generator=g),  # a bracket with a third of all inside
        lambda n, g: torch.ones(n),
        lambda n, g: torch.zeros(n),
        lambda n, g: torch.arange(n) % 64 * 1.0,
        lambda n, g: torch.exp(40 * torch.randn(n, generator=g, dtype=torch.float64).clamp(-2, 2)),
        lambda n, g: (torch.arange(n) // 5000) ** 3 * 1e-30,
    ],
)
@pytest.mark.parametrize("fraction", [0.0, 1e-5, 0.2, 1 / 3, 0.5, 0.999, 1.0])
def test_prune_selects_exactly(make: object, dtype: torch.dtype, fraction: float) -> None:
    shape, n = (1200, 100), 120_000
    values = make(n, torch.Generator().manual_seed(0)).to(dtype)  # type: ignore[operator]
    values = values * torch.where(torch.arange(n) % 2 == 0, 1, -1)
    k = int(fraction * n)
    full = Pattern.from_mask(torch.ones(shape, dtype=torch.bool))
    expected = torch.ones(n, dtype=torch.bool)
    expected[smallest(values.abs(), k)] = False
    for encoding in ENCODINGS:
        index = explore.prune(values, index_of(full, encoding), shape, k)
        assert torch.equal(mask_of(index, shape).view(-1), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_digits_find_what_a_bracket_missed(dtype: type) -> None:
    rng = np.random.default_rng(0)
    for x in (
        rng.normal(size=50_001),
        rng.integers(-2, 3, 50_001),
        np.zeros(10),
        10.0 ** rng.integers(-30, 30, 999),
    ):
        numbers = x.astype(dtype)
        magnitudes = np.sort(np.abs(numbers))
        for rank in {0, 1, len(x) // 3, len(x) // 2, len(x) - 1}:
            threshold, below, equal = selection._by_digits(numbers, rank)
            assert threshold == magnitudes[rank]
            assert (below, equal) == ((magnitudes < threshold).sum(), (magnitudes == threshold).sum())


@pytest.mark.parametrize("size", [40, 60_007])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_not_finite_is_seen_wherever_it_is(size: int, bad: float, fraction: float) -> None:
    k = int(fraction * size)
    index = index_of(Pattern.from_mask(torch.ones(1, size, dtype=torch.bool)), "csr")
    empty = index_of(Pattern.from_mask(torch.arange(size)[None] == 3), "bitmap")
    for place in (0, 17, size - 1):
        values = torch.ones(size)
        values[place] = bad
        with pytest.raises(FloatingPointError):
            explore.prune(values, index, (1, size), k)
        with pytest.raises(FloatingPointError):
            explore.grow(Source(values[None]), copied(empty), (1, size), k)
    with pytest.raises(FloatingPointError):  # where nothing could grow
        explore.grow(Source(torch.full((1, size), bad)), copied(empty), (1, size), k, skip_row=0)


@of_numba
def test_a_sample_that_misleads_is_noticed() -> None:
    """The sampled rows have the largest gradients by far: too few candidates pass, and all is streamed again."""
    shape, k = (20_000, 64), 100_000
    pattern = Pattern.random(shape, 0.25, generator=torch.Generator().manual_seed(0))
    gradient = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1
    spy = Source(gradient)
    explore.grow(spy, index_of(pattern, "csr"), shape, k)
    (sampled,) = (ids for ids in spy.asked if isinstance(ids, Tensor))
    once = len(spy.asked)
    gradient[sampled] *= 100
    found = []
    for name in ("numba", "torch"):
        with sparsecore.backend(name):
            source = Source(gradient)
            found.append(explore.grow(source, index_of(pattern, "csr"), shape, k))
            if name == "numba":
                assert len(source.asked) > 1.5 * once
    assert_same(*found)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_random_positions_are_spread_evenly(encoding: str) -> None:
    shape = (40, 33)
    start = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    start[7] = False
    hits = torch.zeros(shape)
    for seed in range(400):
        index = index_of(Pattern.from_mask(start), encoding)
        now = mask_of(explore.fill(index, shape, 100, torch.Generator().manual_seed(seed), 7), shape)
        assert int(now.sum()) == int(start.sum()) + 100
        hits += now & ~start
    assert not hits[7].any()
    free = ~start
    free[7] = False
    expected = 400 * 100 / int(free.sum())
    assert float((hits[free] - expected).abs().max()) < 6 * expected**0.5
    full = explore.fill(index_of(Pattern.from_mask(start), encoding), shape, 10**6, torch.Generator(), 7)
    assert torch.equal(mask_of(full, shape), start | free)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_table_explores_alike_on_both_backends(encoding: str, n_threads: int) -> None:
    def run(backend: str) -> tuple[SparseEmbedding, dict, object]:
        table = SparseEmbedding(
            3000, 40, padding_idx=4, density=0.2, generator=torch.Generator().manual_seed(0)
        )
        table.set_encoding(encoding)
        optimizer = torch.optim.Adam(table.parameters(), lr=0.01)
        explorer = DynamicSparsity(
            table, optimizer, interval=1, drop_fraction=0.4, total_steps=9,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        ids = torch.randint(0, 3000, (5, 700), generator=torch.Generator().manual_seed(2))
        with sparsecore.backend(backend):
            reports = []
            for part in ids:
                optimizer.zero_grad()
                table(part).square().sum().backward()
                optimizer.step()
                reports.append(explorer.step())
                table.check_invariants()
        return table, optimizer.state[table.values], reports

    ours, theirs = run("numba"), run("torch")
    torch.testing.assert_close(ours[0].state_dict(), theirs[0].state_dict(), rtol=1e-5, atol=1e-6)
    assert_same(ours[0].index, theirs[0].index)
    assert ours[0].encoding == encoding
    for key, state in ours[1].items():
        torch.testing.assert_close(state, theirs[1][key], rtol=1e-5, atol=1e-6)
    assert ours[2] == theirs[2]
