"""Columns that are listed for a call are those of the bitmap, and serve as well."""

from __future__ import annotations

import pytest
import torch

from sparsecore import Pattern
from sparsecore.backends import numba as kernels
from sparsecore.backends.numba import bags, listing
from sparsecore.encoding import encode


@pytest.fixture(params=[1, 2, 5], ids=["one thread", "two threads", "five threads"], autouse=True)
def always(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Whatever the processor, the density and the number of entries."""
    torch.set_num_threads(request.param)
    for module in (listing, bags):
        monkeypatch.setattr(module, "threads", lambda work: request.param)
    monkeypatch.setattr(listing, "has_permute", lambda: True)
    monkeypatch.setattr(listing, "_MOST_ROWS", 1 << 30)
    monkeypatch.setattr(listing, "_CROWDED", 2.0)


def patterns(rows: int, cols: int) -> list[Pattern]:
    drawn = torch.rand(rows, cols, generator=torch.Generator().manual_seed(cols)) < 0.3
    drawn[::3] = False
    full, last = torch.ones(rows, cols, dtype=torch.bool), torch.zeros(rows, cols, dtype=torch.bool)
    last[-1, -1] = True
    return [Pattern.from_mask(mask) for mask in (drawn, full, last)]


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("cols", [1, 8, 31, 32, 33, 63, 64, 65, 128, 200, 300])
def test_listed_columns(rows: int, cols: int) -> None:
    for pattern in patterns(rows, cols):
        bitmap = encode(pattern.crow, pattern.col, cols)
        for _ in range(2):  # scratch of the call before
            crow, col = listing.by_columns(bitmap, None, cols, pattern.nnz, 1)
            assert col is not None
            assert torch.equal(crow.long(), pattern.crow.long())
            assert torch.equal(col.long(), pattern.col.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cols", [7, 64, 130])
def test_bags_by_listed_columns(cols: int, dtype: torch.dtype) -> None:
    for pattern in patterns(40, cols):
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(pattern.nnz, dtype=dtype, generator=generator)
        bitmap = encode(pattern.crow, pattern.col, cols)
        ids = torch.randint(40, (300,), generator=generator)
        offsets = torch.tensor([0, 0, 100, 300])
        weights = torch.randn(300, dtype=dtype, generator=generator)
        of_entry, grad = torch.repeat_interleave(offsets.diff()), torch.randn(3, cols, dtype=dtype)
        results = [
            (
                kernels.bag(values, *index, ids, offsets, weights, cols),
                kernels.bag_grad(*index, ids, of_entry, weights, grad, pattern.nnz),
                kernels.bag_dot(values, *index, ids, of_entry, grad),
            )
            for index in ((bitmap, None), (pattern.crow, pattern.col))
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    (pattern, *_) = patterns(40, 64)
    bitmap = encode(pattern.crow, pattern.col, 64)
    assert listing.by_columns(pattern.crow, pattern.col, 64, pattern.nnz, 99) == (pattern.crow, pattern.col)
    for name, value in (
        ("_MOST_ROWS", 0),
        ("_CROWDED", 0.0),
        ("_MOST_COLUMNS", 63),
        ("has_permute", lambda: False),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(listing, name, value)
            assert listing.by_columns(bitmap, None, 64, pattern.nnz, 99) == (bitmap, None)
