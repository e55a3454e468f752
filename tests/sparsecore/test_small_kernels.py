"""Small calls have kernels of their own: against dense torch, and where their range ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, NARROW_WIDTHS, WIDE_WIDTHS, misaligned, of_numba, patterns, seeds, values_for
from torch import Tensor

from sparsecore import Pattern, SparsecoreError, ops
from sparsecore.backends import numba as kernels
from sparsecore.backends.numba import lanes_csr, linear, small
from sparsecore.encoding import ENCODINGS, encode

pytestmark = of_numba


def index_of(pattern: Pattern, encoding: str) -> tuple[Tensor, Tensor | None]:
    if encoding == "csr":
        return pattern.crow, pattern.col
    return encode(pattern.crow, pattern.col, pattern.shape[1]), None


def dense_of(pattern: Pattern, values: Tensor) -> Tensor:
    return torch.zeros(pattern.shape, dtype=values.dtype).masked_scatter(pattern.to_mask(), values)


def check(
    pattern: Pattern, encoding: str, n: int, dtype: torch.dtype, seed: int, change: Any = lambda t: t
) -> list[Tensor]:
    """Every small kernel against dense torch; ``change`` alters the memory, not the numbers, of what it is given."""
    (rows, cols), generator = pattern.shape, torch.Generator().manual_seed(seed)
    index = [None if t is None else change(t) for t in index_of(pattern, encoding)]
    values, mask = values_for(pattern, seed, dtype), pattern.to_mask()
    weight = dense_of(pattern, values)
    x = torch.randn(n, cols, generator=generator, dtype=dtype)
    dy = torch.randn(n, rows, generator=generator, dtype=dtype)
    ids = torch.randint(rows, (n,), generator=generator)
    start = torch.randn(pattern.nnz, generator=generator, dtype=dtype)
    v = change(values)
    found = [
        small.gather(v, *index, change(ids), cols),
        small.scatter_grad_(start.clone(), *index, change(ids), change(x)),
        small.spmm(v, *index, change(x)),
        small.spmm_t(v, *index, change(dy), cols),
        small.sddmm(*index, change(dy), change(x), pattern.nnz),
    ]
    expected = [
        weight[ids],
        start + torch.zeros_like(weight).index_add(0, ids, x)[mask],
        x @ weight.t(),
        dy @ weight,
        (dy.t() @ x)[mask],
    ]
    tolerance = 1e-4 if dtype is torch.float32 else 1e-11
    assert torch.equal(found[0], expected[0])
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance)
    return found


@given(patterns(), st.sampled_from(ENCODINGS), st.integers(0, 20), st.sampled_from(DTYPES), seeds)
def test_any_pattern(pattern: Pattern, encoding: str, n: int, dtype: torch.dtype, seed: int) -> None:
    check(pattern, encoding, n, dtype, seed)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("cols", [*NARROW_WIDTHS, *WIDE_WIDTHS])
def test_columns_of_every_type(cols: int, encoding: str) -> None:
    pattern = Pattern.random((7, cols), min(0.5, 100 / cols) if cols > 2 else 1.0)
    check(pattern, encoding, 3, torch.float32, seed=1)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_wide_pointers(encoding: str) -> None:
    pattern = Pattern.random((30, 20), 0.3)
    wide = Pattern(pattern.crow.to(torch.int64), pattern.col, pattern.shape)
    check(wide, encoding, 5, torch.float64, seed=1)


def every_second(t: Tensor) -> Tensor:
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [20, 300, 33_000])  # stored as uint8, int16, int32
@pytest.mark.parametrize("change", [every_second, misaligned])
def test_memory_layout_does_not_matter(encoding: str, dtype: torch.dtype, cols: int, change: Any) -> None:
    pattern = Pattern.random((30, cols), min(0.3, 100 / cols))
    plain = check(pattern, encoding, 5, dtype, seed=1)
    for a, b in zip(plain, check(pattern, encoding, 5, dtype, 1, change), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_type(dtype: torch.dtype, encoding: str) -> None:
    pattern = Pattern.random((30, 20), 0.3)
    values, ids = values_for(pattern), torch.tensor([3, 29, 0, 3], dtype=dtype)
    assert small.id_range(ids) == (0, 29)
    assert small.id_range(ids[1:2]) == (29, 29)
    rows = small.gather(values, *index_of(pattern, encoding), ids, 20)
    assert torch.equal(rows, dense_of(pattern, values)[ids.long()])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_where_their_range_ends(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number or example more goes to the vector kernels, with the same result."""
    used: list[str] = []

    def noted(name: str) -> Callable[..., Tensor]:
        run = getattr(small, name)
        return lambda *args: (used.append(name), run(*args))[1]

    for name in ("gather", "scatter_grad_", "spmm", "spmm_t", "sddmm"):
        monkeypatch.setattr(small, name, noted(name))
    monkeypatch.setattr(lanes_csr, "_MOST_EXAMPLES", -1)  # what comes before it, from CSR
    pattern = Pattern.random((60, 64), 0.3, generator=torch.Generator().manual_seed(0))
    index, values = index_of(pattern, encoding), values_for(pattern, dtype=torch.float32)
    weight, nnz = dense_of(pattern, values), pattern.nnz
    most = small._MOST_NUMBERS // 64
    for n, expected in ((most, ["gather", "scatter_grad_"]), (most + 1, [])):
        ids = torch.arange(n) % 60
        grad = torch.randn(n, 64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(kernels.gather(values, *index, ids, 64), weight[ids])
        summed = torch.zeros(60, 64).index_add(0, ids, grad)[pattern.to_mask()]
        torch.testing.assert_close(kernels.scatter_grad(*index, ids, grad, nnz), summed, rtol=1e-5, atol=1e-5)
        assert used == expected
        used.clear()
    most = (small._MOST_WORK - 60) // nnz - 2
    for n, expected in ((most, ["spmm", "spmm_t", "sddmm"]), (most + 1, [])):
        x, dy = torch.randn(2, n, 64, generator=torch.Generator().manual_seed(0))
        dy = dy[:, :60]
        torch.testing.assert_close(linear.spmm(values, *index, x), x @ weight.t(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(linear.spmm_t(values, *index, dy, 64), dy @ weight, rtol=1e-4, atol=1e-4)
        found, right = linear.sddmm(*index, dy, x, nnz), (dy.t() @ x)[pattern.to_mask()]
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
        assert used == expected
        used.clear()


def test_ids_of_another_type_are_refused() -> None:
    pattern = Pattern.random((30, 20), 0.3)
    with pytest.raises(SparsecoreError, match=r"ids must be int64 or int32, got torch\.int16"):
        ops.gather(values_for(pattern), pattern.crow, pattern.col, torch.tensor([1], dtype=torch.int16), 20)


def test_sixteen_bit_numbers_are_refused_here_too() -> None:
    pattern = Pattern.random((30, 20), 0.3)
    values, index = values_for(pattern).half(), (pattern.crow, pattern.col)
    with pytest.raises(Exception, match="float32 or float64"):
        kernels.gather(values, *index, torch.tensor([1]), 20)
    with pytest.raises(Exception, match="float32 or float64"):
        kernels.spmm(values, *index, torch.randn(2, 20).half())
