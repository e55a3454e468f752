"""``spmm`` of one example from CSR, one number after the other: against dense torch, and where it is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, misaligned, of_numba, patterns, seeds, values_for
from torch import Tensor

from sparsecore import Pattern
from sparsecore.backends.numba import linear, one_csr

pytestmark = of_numba


def dense_of(pattern: Pattern, values: Tensor) -> Tensor:
    return torch.zeros(pattern.shape, dtype=values.dtype).masked_scatter(pattern.to_mask(), values)


def check(pattern: Pattern, dtype: torch.dtype, seed: int = 0, change: Any = lambda t: t) -> Tensor:
    """Against dense torch, with one chunk and several; ``change`` alters the memory, not the numbers, of operands."""
    values = values_for(pattern, seed, dtype)
    x = torch.randn(1, pattern.shape[1], generator=torch.Generator().manual_seed(seed), dtype=dtype)
    operands = [change(t) for t in (values, pattern.crow, pattern.col, x)]
    found = one_csr.spmm(*operands, 1)
    tolerance = pattern.shape[1] ** 0.5 * (4e-6 if dtype is torch.float32 else 1e-14)
    torch.testing.assert_close(found, x @ dense_of(pattern, values).t(), rtol=1e-5, atol=tolerance)
    for n_chunks in (2, 3):
        assert torch.equal(one_csr.spmm(*operands, n_chunks), found)
    return found


@settings(max_examples=60)
@given(patterns(max_rows=40), st.sampled_from(DTYPES), seeds)
def test_patterns(pattern: Pattern, dtype: torch.dtype, seed: int) -> None:
    check(pattern, dtype, seed)


@pytest.mark.parametrize("cols", [1, 7, 255, 256, 257, 65_535, 65_537])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths_of_the_index(cols: int, dtype: torch.dtype) -> None:
    check(Pattern.random((20, cols), 0.2, generator=torch.Generator().manual_seed(1)), dtype)


def test_memory_that_is_not_contiguous() -> None:
    def spaced(t: Tensor) -> Tensor:
        return torch.stack((t, t), -1)[..., 0]

    check(Pattern.random((30, 50), 0.3, generator=torch.Generator().manual_seed(2)), torch.float32, 0, spaced)


@pytest.mark.parametrize("cols", [50, 300, 33_000])  # stored as uint8, int16, int32
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_that_begins_behind_a_cache_line(cols: int, dtype: torch.dtype) -> None:
    pattern = Pattern.random((30, cols), 0.3, generator=torch.Generator().manual_seed(2))
    assert torch.equal(check(pattern, dtype), check(pattern, dtype, 0, misaligned))


def test_infinity_where_nothing_is_stored() -> None:
    pattern = Pattern.random((30, 20), 0.3, generator=torch.Generator().manual_seed(3))
    x = torch.ones(1, 20)
    x[0, 4] = torch.inf
    found = one_csr.spmm(torch.ones(pattern.nnz), pattern.crow, pattern.col, x, 1)[0]
    assert torch.equal(found.isinf(), pattern.to_mask()[:, 4])
    assert not found.isnan().any()


def test_infinite_weights_stay_in_their_rows() -> None:
    """What follows a row in memory is read with it."""
    pattern = Pattern.random((30, 20), 0.3, generator=torch.Generator().manual_seed(3))
    lengths = pattern.crow.diff()
    values = torch.tensor([1.0, torch.inf]).repeat(15).repeat_interleave(lengths)
    found = one_csr.spmm(values, pattern.crow, pattern.col, torch.ones(1, 20), 1)[0]
    assert torch.equal(found[0::2], lengths[0::2].float())
    assert torch.equal(found[1::2].isinf(), lengths[1::2] > 0)


@pytest.mark.parametrize(
    ("examples", "dtype", "expand", "most", "long", "taken"),
    [
        (1, torch.float32, True, 0, 0, True),
        (1, torch.float64, True, 0, 0, True),
        (2, torch.float32, True, 0, 0, False),
        (1, torch.float32, True, -1, 0, True),
        (1, torch.float32, True, -1, 1, False),
        (1, torch.float32, False, -1, 1, True),
        (2, torch.float32, False, 0, 0, False),
    ],
)
def test_where_it_is_taken(
    examples: int,
    dtype: torch.dtype,
    expand: bool,
    most: int,
    long: int,
    taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``expand``: whether there is AVX-512; ``most`` and ``long``: how far the weight is above its limits."""
    used: list[int] = []
    run = one_csr.spmm
    monkeypatch.setattr(one_csr, "spmm", lambda *args: (used.append(1), run(*args))[1])
    pattern = Pattern.random((30, 400), 0.5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(one_csr, "has_expand", lambda: expand)
    monkeypatch.setattr(one_csr, "_MOST_NONZEROS", pattern.nnz + most)
    monkeypatch.setattr(one_csr, "_LONG_ROW", pattern.nnz // 30 + long)
    values = values_for(pattern, dtype=dtype)
    x = torch.randn(examples, 400, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = linear.spmm(values, pattern.crow, pattern.col, x)
    torch.testing.assert_close(found, x @ dense_of(pattern, values).t(), rtol=1e-4, atol=1e-4)
    assert bool(used) is taken
