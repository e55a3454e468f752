"""The numba kernels of embedding tables against plain torch: encodings, types, threads, widths around the vectors'."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import misaligned
from torch import Tensor

from sparsecore import Pattern
from sparsecore.backends import numba as kernels
from sparsecore.backends.numba import grouping, memory, row_updates, scatter
from sparsecore.encoding import encode

gather_dot = importlib.import_module("sparsecore.backends.numba.gather_dot")

WIDTHS = (1, 10, 16, 17, 50, 63, 64, 65, 200, 257)
ROWS = 60
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}

every_width = pytest.mark.parametrize("width", WIDTHS)
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float64"])
every_encoding = pytest.mark.parametrize("encoding", ["csr", "bitmap"])


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> int:
    """Two threads even for the smallest case."""
    torch.set_num_threads(request.param)
    for module in ("embedding", "scatter", "bags", "optimizer", "row_updates"):
        monkeypatch.setattr(f"sparsecore.backends.numba.{module}.threads", lambda work: request.param)
    monkeypatch.setattr(gather_dot, "threads", lambda work: request.param)
    return request.param


@pytest.fixture(autouse=True)
def vectors_alone(vectors: None) -> None:
    """A few rows have kernels of their own: test_small_kernels.py."""


class Table:
    """A random table with empty rows, in both forms."""

    def __init__(self, width: int, dtype: torch.dtype, encoding: str) -> None:
        generator = torch.Generator().manual_seed(width)
        mask = torch.rand(ROWS, width, generator=generator) < 0.4
        mask[::7] = False
        mask[1] = mask[-1, -1] = True
        pattern = Pattern.from_mask(mask)
        self.mask, self.width = mask, width
        self.dense = torch.randn(ROWS, width, generator=generator, dtype=dtype) * mask
        self.values = self.dense[mask]
        self.index: tuple[Tensor, Tensor | None] = (pattern.crow, pattern.col)
        if encoding == "bitmap":
            self.index = (encode(pattern.crow, pattern.col, width), None)


def ids_of(n: int) -> Tensor:
    """Ids with repetitions; the first and the last row are among them."""
    ids = torch.randint(ROWS, (n,), generator=torch.Generator().manual_seed(n))
    return torch.cat((torch.tensor([ROWS - 1, 0])[:n], ids[2:]))


def grad_of(n: int, width: int, dtype: torch.dtype, contiguous: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(n + width)
    if contiguous:
        return torch.randn(n, width, generator=generator, dtype=dtype)
    return torch.randn(width, n, generator=generator, dtype=dtype).t()


def close(ours: Tensor, reference: Tensor) -> None:
    tolerance = TOLERANCE[reference.dtype]
    torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)


@every_width
@every_dtype
@every_encoding
@pytest.mark.parametrize("n", [0, 1, 150])
def test_gather(width: int, dtype: torch.dtype, encoding: str, n: int) -> None:
    table, ids = Table(width, dtype, encoding), ids_of(n)
    assert torch.equal(kernels.gather(table.values, *table.index, ids, width), table.dense[ids])


@every_width
@every_dtype
@every_encoding
@pytest.mark.parametrize(("n", "contiguous"), [(0, True), (1, True), (150, True), (150, False)])
def test_scatter_grad_and_touched(
    width: int, dtype: torch.dtype, encoding: str, n: int, contiguous: bool
) -> None:
    table, ids, grad = Table(width, dtype, encoding), ids_of(n), grad_of(n, width, dtype, contiguous)
    reference = torch.zeros(ROWS, width, dtype=dtype).index_add(0, ids, grad)
    ours = kernels.scatter_grad(*table.index, ids, grad, table.values.numel())
    close(ours, reference[table.mask])
    places, values = kernels.touched(*table.index, ids, grad, table.values.numel())
    rows = torch.nonzero(table.mask)[:, 0]
    assert torch.equal(places, torch.nonzero(torch.isin(rows, ids)).view(-1))
    assert torch.equal(values, ours[places])


@every_width
@every_dtype
@every_encoding
@pytest.mark.parametrize(("n", "n_bags"), [(0, 2), (1, 1), (150, 20)])
def test_bags(width: int, dtype: torch.dtype, encoding: str, n: int, n_bags: int) -> None:
    table, ids = Table(width, dtype, encoding), ids_of(n)
    generator = torch.Generator().manual_seed(n)
    weights = torch.randn(n, generator=generator, dtype=dtype)
    cuts = torch.randint(n + 1, (n_bags - 1,), generator=generator).sort().values
    offsets = torch.cat((torch.tensor([0]), cuts, torch.tensor([n])))
    bags = torch.repeat_interleave(offsets.diff())
    grad = grad_of(n_bags, width, dtype, contiguous=False)
    summed = torch.zeros(n_bags, width, dtype=dtype).index_add(0, bags, weights[:, None] * table.dense[ids])
    close(kernels.bag(table.values, *table.index, ids, offsets, weights, width), summed)
    reference = torch.zeros(ROWS, width, dtype=dtype).index_add(0, ids, weights[:, None] * grad[bags])
    nnz = table.values.numel()
    close(kernels.bag_grad(*table.index, ids, bags, weights, grad, nnz), reference[table.mask])
    dots = (table.dense[ids] * grad[bags]).sum(1)
    close(kernels.bag_dot(table.values, *table.index, ids, bags, grad), dots)
    places, values = kernels.touched(*table.index, ids, grad, nnz, bags, weights)
    close(torch.zeros(nnz, dtype=dtype).index_put((places,), values), reference[table.mask])


@every_width
@every_dtype
@every_encoding
def test_no_bags(width: int, dtype: torch.dtype, encoding: str) -> None:
    table, nothing = Table(width, dtype, encoding), torch.zeros(0, dtype=torch.int64)
    weights, grad, nnz = torch.zeros(0, dtype=dtype), torch.zeros(0, width, dtype=dtype), table.values.numel()
    found = kernels.bag(table.values, *table.index, nothing, torch.tensor([0]), weights, width)
    assert found.shape == (0, width)
    found = kernels.bag_grad(*table.index, nothing, nothing, weights, grad, nnz)
    assert torch.equal(found, torch.zeros(nnz, dtype=dtype))
    assert kernels.bag_dot(table.values, *table.index, nothing, nothing, grad).shape == (0,)
    places, values = kernels.touched(*table.index, nothing, grad, nnz, nothing, weights)
    assert places.shape == values.shape == (0,)


@every_width
@every_dtype
@every_encoding
@pytest.mark.parametrize(("n", "bagged"), [(0, False), (1, False), (150, False), (150, True)])
@pytest.mark.parametrize("counted", [False, True], ids=["one count", "counts"])
def test_adam_of_rows_is_adam_of_their_gradient(
    width: int, dtype: torch.dtype, encoding: str, n: int, bagged: bool, counted: bool
) -> None:
    table, ids, grad = Table(width, dtype, encoding), ids_of(n), grad_of(n, width, dtype)
    generator = torch.Generator().manual_seed(7)
    sources = torch.randint(max(n, 1), (n,), generator=generator) if bagged else None
    weights = torch.randn(n, generator=generator, dtype=dtype) if bagged else None
    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1, "decoupled": False}
    states = [[table.values.clone(), *torch.zeros(3, table.values.numel(), dtype=dtype)] for _ in range(2)]
    for step in (1.0, 2.0):
        for rows, (values, first, second, counts) in enumerate(states):
            rest: dict[str, Any] = {**options, "step": step, "step_per_weight": counts if counted else None}
            if rows:
                lookup = (*table.index, ids, grad, sources, weights)
                kernels.adam_rows_(values, first, second, *lookup, **rest)
            else:
                spans, summed = kernels.touched_spans(*table.index, ids, grad, sources, weights)
                kernels.adam_(values, summed, first, second, spans=spans, **rest)
    assert n == 0 or not torch.equal(states[0][0], table.values)
    for expected, found in zip(*states, strict=True):
        assert torch.equal(found, expected)


def masked(shape: tuple[int, int], *places: Any) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for place in places:
        mask[place] = True
    return mask


EVERY = slice(None)
EXTREME = {
    "full": masked((6, 64), EVERY),
    "full rows": masked((9, 50), slice(0, None, 2)),
    "empty rows at both ends": masked((9, 50), (slice(2, -2), slice(0, None, 3))),
    "one row of all holds all": masked((9, 17), 4),
    "one nonzero": masked((7, 50), (3, 33)),
    "one row": masked((1, 50), (0, slice(0, None, 2))),
    "one column": masked((9, 1), slice(1, None, 3)),
    "one position": masked((1, 1), EVERY),
    "first and last columns": masked((9, 65), (EVERY, 0), (EVERY, -1)),
    "8 columns": masked((9, 8), (EVERY, slice(1, None, 3)), 5),
    "256 columns": masked((9, 256), (EVERY, slice(0, None, 5)), (EVERY, -1), 5),
}
WIDE = {
    f"{cols} columns": masked((4, cols), (slice(1, None), slice(0, None, 1000)), (0, -1), (2, EVERY))
    for cols in (65_535, 65_536, 65_537)
}


def check_all(
    mask: Tensor, dtype: torch.dtype, encoding: str, ids: Tensor, change: Any = lambda t: t
) -> None:
    """Every operation on a table with this mask; ``change`` alters the memory, not the numbers, of what it is given."""
    (rows, width), n = mask.shape, ids.numel()
    generator = torch.Generator().manual_seed(width)
    dense = torch.randn(rows, width, generator=generator, dtype=dtype) * mask
    pattern, values = Pattern.from_mask(mask), change(dense[mask])
    csr: tuple[Tensor, Tensor | None] = (change(pattern.crow), change(pattern.col))
    bitmap = (change(encode(pattern.crow, pattern.col, width)), None)
    index, other = (csr, bitmap) if encoding == "csr" else (bitmap, csr)
    nnz, moved = pattern.nnz, change(ids)

    assert torch.equal(kernels.gather(values, *index, moved, width), dense[ids])

    of_pairs = change(ids.flip(0)), change(torch.stack((ids.flip(0), ids), 1))
    for few in (0, 1 << 30):  # bitmaps: whole rows, and the columns that two rows share
        # How much is asked for in advance is a kernel of its own each: one will do.
        with patch.multiple(gather_dot, _AVX2=False, _CACHED=-1, _FEW=few, row_of=lambda *args: (0, 0, 0)):
            for second in (index, other):
                for others in of_pairs:
                    found = kernels.gather_dot(values, *index, moved, values, *second, others, width)
                    products = dense[ids].view(n, 1, width) * dense[others].view(n, others[:1].numel(), width)
                    close(found, products.sum(2).view(others.shape))

    grad = torch.randn(n, width, generator=generator, dtype=dtype)
    summed = torch.zeros(rows, width, dtype=dtype).index_add(0, ids, grad)[mask]
    looked_up = torch.isin(torch.nonzero(mask)[:, 0], ids)
    close(kernels.scatter_grad(*index, moved, change(grad), nnz), summed)
    places, there = kernels.touched(*index, moved, change(grad), nnz)
    assert torch.equal(places, torch.nonzero(looked_up).view(-1))
    close(there, summed[looked_up])

    offsets = torch.tensor([0, n // 3, n // 3, n])  # the second of three bags is empty
    bags, weights = torch.repeat_interleave(offsets.diff()), torch.randn(n, generator=generator, dtype=dtype)
    weighted, of_bags = weights[:, None] * dense[ids], torch.randn(3, width, generator=generator, dtype=dtype)
    rest = (moved, change(offsets), change(weights))
    found = kernels.bag(values, *index, *rest, width)
    close(found, torch.zeros(3, width, dtype=dtype).index_add(0, bags, weighted))
    spread = weights[:, None] * of_bags[bags]
    of_rows = torch.zeros(rows, width, dtype=dtype).index_add(0, ids, spread)[mask]
    rest = (moved, change(bags), change(weights), change(of_bags), nnz)
    close(kernels.bag_grad(*index, *rest), of_rows)
    found = kernels.bag_dot(values, *index, moved, change(bags), change(of_bags))
    close(found, (dense[ids] * of_bags[bags]).sum(1))
    rest = (moved, change(of_bags), nnz, change(bags), change(weights))
    places, there = kernels.touched(*index, *rest)
    assert torch.equal(places, torch.nonzero(looked_up).view(-1))
    close(there, of_rows[looked_up])

    for total, entries in (
        (summed, (change(grad), None, None)),
        (of_rows, (change(of_bags), change(bags), change(weights))),
    ):
        stepped = dense[mask].requires_grad_()
        stepped.grad = total
        torch.optim.Adam([stepped], lr=0.1, betas=(0.8, 0.9), weight_decay=0.1).step()
        updated, *moments = (change(t) for t in (dense[mask], *torch.zeros(2, nnz, dtype=dtype)))
        kernels.adam_rows_(
            updated, *moments, *index, moved, *entries,
            lr=0.1, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1, decoupled=False, step=1.0,
        )  # fmt: skip
        close(updated, torch.where(looked_up, stepped.detach(), dense[mask]))
        assert torch.equal(moments[1] > 0, looked_up)


def repeated(rows: int, n: int) -> Tensor:
    ids = torch.randint(rows, (n,), generator=torch.Generator().manual_seed(n))
    ids[::3] = rows // 2
    return ids


@every_encoding
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, dtype) for name in EXTREME for dtype in TOLERANCE), *((name, torch.float64) for name in WIDE)],
    ids=str,
)
def test_extreme_tables(name: str, dtype: torch.dtype, encoding: str) -> None:
    """No ids, one, and more, of which a third are one and the same."""
    mask = {**EXTREME, **WIDE}[name]
    for n in (0, 1, 40 if name in EXTREME else 3):
        check_all(mask, dtype, encoding, repeated(len(mask), n))


@every_encoding
@every_dtype
@pytest.mark.parametrize("width", [10, 64, 65])
def test_memory_that_begins_behind_a_cache_line(width: int, dtype: torch.dtype, encoding: str) -> None:
    check_all(Table(width, dtype, encoding).mask, dtype, encoding, ids_of(150), misaligned)


@every_encoding
def test_adam_of_more_rows_than_are_summed_at_a_time(encoding: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = Pattern.random((5000, 24), 0.3, generator=generator)
    index = (
        (pattern.crow, pattern.col) if encoding == "csr" else (encode(pattern.crow, pattern.col, 24), None)
    )
    start = torch.randn(pattern.nnz, generator=generator)
    ids = torch.randint(5000, (9000,), generator=generator)
    grad = torch.randn(9000, 24, generator=generator)
    assert ids.unique().numel() > 2 * 2 * row_updates._ROWS  # for each of two threads
    rest: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.0}
    rest |= {"decoupled": False, "step": 1.0}
    found, expected = ([start.clone(), *torch.zeros(2, pattern.nnz)] for _ in range(2))
    kernels.adam_rows_(*found, *index, ids, grad, None, None, **rest)
    spans, summed = kernels.touched_spans(*index, ids, grad, None, None)
    kernels.adam_(expected[0], summed, *expected[1:], spans=spans, **rest)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@every_dtype
@every_encoding
def test_a_row_of_more_entries_than_all_others_together(dtype: torch.dtype, encoding: str) -> None:
    table = Table(50, dtype, encoding)
    ids = torch.cat((torch.full((900,), 5), torch.arange(ROWS)))
    grad = grad_of(ids.numel(), 50, dtype)
    reference = torch.zeros(ROWS, 50, dtype=dtype).index_add(0, ids, grad)
    close(kernels.scatter_grad(*table.index, ids, grad, table.values.numel()), reference[table.mask])


@every_encoding
def test_the_number_of_threads_changes_no_bit(
    encoding: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, ids, grad = Table(64, torch.float32, encoding), ids_of(500), grad_of(500, 64, torch.float32)
    several = kernels.touched(*table.index, ids, grad, table.values.numel())[1]
    monkeypatch.setattr("sparsecore.backends.numba.scatter.threads", lambda work: 3 - threads)
    assert torch.equal(several, kernels.touched(*table.index, ids, grad, table.values.numel())[1])


def test_memory_of_a_large_result_is_used_again_only_when_free() -> None:
    indices, n = [torch.zeros(2, dtype=torch.int32)], 3 << 20

    def result(operation: str = "gradient", dtype: torch.dtype = torch.float32) -> Tensor:
        return memory.result_of(indices[0], operation, (3, n // 3), dtype)

    first = result()
    place = first.data_ptr()
    view = first.fill_(1.0)[1, 10:20]
    del first
    second = result()  # beside the view of the first
    assert second.data_ptr() != place
    assert torch.equal(view, torch.ones(10))
    del second, view
    assert result("spmm").data_ptr() != place
    third = result()
    assert third.data_ptr() == place
    assert not scatter.gradient(indices[0], n, torch.float32).any()
    shared = third.numpy()
    del third
    assert result().data_ptr() != shared.ctypes.data
    assert result(dtype=torch.float64).dtype == torch.float64
    before = len(memory._results)
    indices.clear()
    gc.collect()
    assert len(memory._results) == before - 1


@given(
    st.integers(1, 2**40).flatmap(
        lambda n_rows: st.tuples(st.just(n_rows), st.lists(st.integers(0, n_rows - 1), max_size=60))
    )
)
def test_group_is_a_stable_sort(case: tuple[int, list[int]]) -> None:
    n_rows, ids = case
    rows, starts, order = grouping.group(torch.tensor(ids, dtype=torch.int64), n_rows)
    assert order.tolist() == sorted(range(len(ids)), key=lambda e: ids[e])
    assert rows.tolist() == sorted(set(ids))
    assert starts.tolist() == [sum(i < row for i in ids) for row in rows] + [len(ids)]


@every_dtype
def test_sum_rows(dtype: torch.dtype) -> None:
    for width in WIDTHS:
        ids, grad = ids_of(150), grad_of(150, width, dtype, contiguous=False)
        rows, sums = kernels.sum_rows(ids, grad, ROWS)
        assert torch.equal(rows, ids.unique())
        close(sums, torch.zeros(ROWS, width, dtype=dtype).index_add(0, ids, grad)[rows])


pieces = st.lists(st.lists(st.integers(0, 40), unique=True, max_size=30).map(sorted), max_size=5)


@given(pieces)
def test_spans_merge_lookups(found: list[list[int]]) -> None:
    places = torch.tensor([place for piece in found for place in piece], dtype=torch.int64)
    values = torch.randn(places.numel(), dtype=torch.float64)
    (begins, offsets), sums = kernels.spans_of_places(places, values, 41)
    merged = torch.tensor(
        [begin + i for begin, n in zip(begins, np.diff(offsets), strict=True) for i in range(n)],
        dtype=torch.int64,
    )
    assert merged.tolist() == sorted(set(places.tolist()))
    assert len(begins) == sum(place - 1 not in merged for place in merged)
    reference = torch.zeros(41, dtype=torch.float64).index_add(0, places, values)
    close(sums, reference[merged])


@pytest.mark.parametrize("places", [[-1, 2], [3, 41], [5, 1, 41], [2, -4, 3]])
def test_spans_refuse_places_outside(places: list[int]) -> None:
    with pytest.raises(IndexError, match="41 elements"):
        kernels.spans_of_places(torch.tensor(places), torch.ones(len(places)), 41)


Update = Callable[..., Any]


def adam(x: Tensor, g: Tensor, a: Tensor, b: Tensor, spans: Any) -> None:
    options: dict[str, Any] = {
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "decoupled": False,
    }
    kernels.adam_(x, g, a, b, step=3, spans=spans, **options)


def counted_adam(x: Tensor, g: Tensor, a: Tensor, b: Tensor, spans: Any) -> None:
    options: dict[str, Any] = {
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "decoupled": True,
    }
    counts = torch.arange(x.numel()).to(x.dtype) % 5
    kernels.adam_(x, g, a, b, step=9, step_per_weight=counts, spans=spans, **options)


def sgd(x: Tensor, g: Tensor, a: Tensor, b: Tensor, spans: Any) -> None:
    options: dict[str, Any] = {
        "lr": 0.1,
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 0.1,
        "nesterov": True,
    }
    kernels.sgd_(x, g, a, spans=spans, **options)


def adagrad(x: Tensor, g: Tensor, a: Tensor, b: Tensor, spans: Any) -> None:
    kernels.adagrad_(x, g, b, lr=0.1, weight_decay=0.1, eps=1e-8, spans=spans)


@every_dtype
@pytest.mark.parametrize("update", [adam, counted_adam, sgd, adagrad])
@pytest.mark.parametrize("run", [1, 7, 15, 16, 17, 40])
def test_places_in_runs_of_every_length(dtype: torch.dtype, update: Update, run: int) -> None:
    """The dense update, at the places that are named; nothing anywhere else, up to the last element of an array."""
    generator = torch.Generator().manual_seed(run)
    n = 400
    x, g, a = (torch.randn(n, generator=generator, dtype=dtype) for _ in range(3))
    b = torch.rand(n, generator=generator, dtype=dtype)
    named = torch.from_numpy(np.arange(n) % (run + 3) < run)
    named[-1] = True
    places = torch.nonzero(named).view(-1)
    dense, lazy = [t.clone() for t in (x, a, b)], [t.clone() for t in (x, a, b)]
    update(dense[0], g, dense[1], dense[2], None)
    spans, there = kernels.spans_of_places(places, g[places], n)
    update(lazy[0], there, lazy[1], lazy[2], spans)
    for before, everywhere, there in zip((x, a, b), dense, lazy, strict=True):
        assert torch.equal(there[~named], before[~named])
        torch.testing.assert_close(there[named], everywhere[named], atol=1e-6, rtol=1e-6)


@every_dtype
@pytest.mark.parametrize("update", [adam, counted_adam, sgd, adagrad])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 400])
def test_parameters_that_begin_behind_a_cache_line(dtype: torch.dtype, update: Update, n: int) -> None:
    """Parameters, gradients and each moment alone, and all of them: to the same bits, by dense and by lazy updates."""
    generator = torch.Generator().manual_seed(n)
    x, g, a = (torch.randn(n, generator=generator, dtype=dtype) for _ in range(3))
    b = torch.rand(n, generator=generator, dtype=dtype)
    places = torch.nonzero(torch.arange(n) % 20 < 17).view(-1)
    for spans, gradient in ((None, g), kernels.spans_of_places(places, g[places], n)):
        expected = [t.clone() for t in (x, gradient, a, b)]
        update(*expected, spans)
        for moved in ([0], [1], [2], [3], [0, 1, 2, 3]):
            found = [misaligned(t) if k in moved else t.clone() for k, t in enumerate((x, gradient, a, b))]
            update(*found, spans)
            for ours, right in zip(found, expected, strict=True):
                assert torch.equal(ours, right)


def test_a_long_run_is_cut_for_several_threads() -> None:
    places = torch.arange(3, 5003)
    (begins, offsets), values = kernels.spans_of_places(places, torch.ones(5000), 6000)
    assert begins.tolist() == [3 + k for k in offsets[:-1]]
    assert offsets[-1] == 5000
    assert max(np.diff(offsets)) <= 1025
    assert values.numel() == 5000
