"""Products of a few examples from CSR, with vectors along the batch: against dense torch, and where they are taken."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, misaligned, of_numba, patterns, seeds, values_for
from torch import Tensor

from sparsecore import Pattern
from sparsecore.backends.numba import lanes_csr, linear
from sparsecore.encoding import encode

pytestmark = of_numba


def random_pattern(shape: tuple[int, int], density: float, seed: int = 0) -> Pattern:
    return Pattern.random(shape, density, generator=torch.Generator().manual_seed(seed))


def dense_of(pattern: Pattern, values: Tensor) -> Tensor:
    return torch.zeros(pattern.shape, dtype=values.dtype).masked_scatter(pattern.to_mask(), values)


def check(
    pattern: Pattern, batch: int, dtype: torch.dtype, seed: int = 0, change: Any = lambda t: t
) -> list[Tensor]:
    """Against dense torch, with one chunk and several; ``change`` alters the memory, not the numbers, of operands."""
    values = values_for(pattern, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, pattern.shape[1], generator=generator, dtype=dtype)
    dy = torch.randn(batch, pattern.shape[0], generator=generator, dtype=dtype)
    values_, crow, col, x_, dy_ = (change(t) for t in (values, pattern.crow, pattern.col, x, dy))
    tolerance = max(*pattern.shape, batch) ** 0.5 * (4e-6 if dtype is torch.float32 else 1e-14)
    found = lanes_csr.spmm(values_, crow, col, x_, 1)
    torch.testing.assert_close(found, x @ dense_of(pattern, values).t(), rtol=1e-5, atol=tolerance)
    gradient = lanes_csr.sddmm(crow, col, dy_, x_, pattern.nnz, 1)
    torch.testing.assert_close(gradient, (dy.t() @ x)[pattern.to_mask()], rtol=1e-5, atol=tolerance)
    for n_chunks in (1, 2, 3):
        turned = lanes_csr.spmm_t(values_, crow, col, dy_, pattern.shape[1], n_chunks)
        torch.testing.assert_close(turned, dy @ dense_of(pattern, values), rtol=1e-5, atol=tolerance)
        assert torch.equal(lanes_csr.spmm(values_, crow, col, x_, n_chunks), found)
        assert torch.equal(lanes_csr.sddmm(crow, col, dy_, x_, pattern.nnz, n_chunks), gradient)
    return [found, gradient, turned]


@settings(max_examples=60)
@given(patterns(max_rows=40), st.integers(1, 40), st.sampled_from(DTYPES), seeds)
def test_patterns(pattern: Pattern, batch: int, dtype: torch.dtype, seed: int) -> None:
    check(pattern, batch, dtype, seed)


@pytest.mark.parametrize("cols", [1, 7, 63, 64, 65, 255, 256, 257, 65_537])
@pytest.mark.parametrize("batch", [2, 5, 16, 17])
def test_widths(cols: int, batch: int) -> None:
    for rows in (1, 15, 16, 33):
        check(random_pattern((rows, cols), 0.2 if rows * cols > 4 else 1.0, 1), batch, torch.float32)


def test_memory_that_is_not_contiguous() -> None:
    def spaced(t: Tensor) -> Tensor:
        return torch.stack((t, t), -1)[..., 0]

    check(random_pattern((30, 50), 0.3, 2), 3, torch.float32, 0, spaced)


@pytest.mark.parametrize(
    ("cols", "dtype"),  # columns stored as uint8, int16, int32
    [(50, torch.float32), (50, torch.float64), (300, torch.float32), (33_000, torch.float32)],
)
@pytest.mark.parametrize("batch", [3, 8, 20])
def test_memory_that_begins_behind_a_cache_line(batch: int, cols: int, dtype: torch.dtype) -> None:
    pattern = random_pattern((30, cols), 0.3 if cols < 1000 else 0.02, 2)
    found = (check(pattern, batch, dtype, 0, change) for change in (lambda t: t, misaligned))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch", [3, 8, 20])
def test_infinite_weights_stay_in_their_rows(batch: int) -> None:
    """What follows a row in memory is read with it."""
    pattern = random_pattern((37, 20), 0.3, 3)
    lengths, odd = pattern.crow.diff(), torch.arange(37) % 2 == 1
    values = torch.where(odd, torch.inf, 1.0).repeat_interleave(lengths)
    found = lanes_csr.spmm(values, pattern.crow, pattern.col, torch.ones(batch, 20), 1)
    assert torch.equal(found[:, ~odd], lengths[~odd].float().expand(batch, -1))
    assert torch.equal(found[:, odd].isinf(), (lengths[odd] > 0).expand(batch, -1))
    # Backwards a row's weights reach the columns that it stores alone.
    dy = torch.zeros(batch, 37)
    dy[:, 4] = 1.0
    turned = lanes_csr.spmm_t(values.nan_to_num(posinf=2.0), pattern.crow, pattern.col, dy, 20, 1)
    assert torch.equal(turned, pattern.to_mask()[4].float().expand(batch, -1))


@pytest.mark.parametrize("batch", [3, 8, 20])
def test_nothing_is_multiplied_that_is_not_stored_nor_read_that_was_not_written(batch: int) -> None:
    """Scratch of an earlier call holds NaN; infinity reaches the rows that store its column, of its example, alone."""
    pattern = random_pattern((37, 20), 0.3, 3)
    values = torch.ones(pattern.nnz)
    spoilt = torch.full((16, 400), torch.nan)
    lanes_csr.spmm(
        torch.ones(400), torch.tensor([0, 400], dtype=torch.int32), torch.arange(400).int(), spoilt, 3
    )
    x = torch.ones(batch, 20)
    x[1, 4] = torch.inf
    found = lanes_csr.spmm(values, pattern.crow, pattern.col, x, 1)
    assert not found.isnan().any()
    assert torch.equal(found[1].isinf(), pattern.to_mask()[:, 4])
    found[1] = 0
    assert found.isfinite().all()
    dy = torch.ones(batch, 37)
    dy[1, 4] = torch.inf
    found = lanes_csr.spmm_t(values, pattern.crow, pattern.col, dy, 20, 2)
    assert not found.isnan().any()
    assert torch.equal(found[1].isinf(), pattern.to_mask()[4])
    gradient = lanes_csr.sddmm(pattern.crow, pattern.col, torch.ones(batch, 37), x, pattern.nnz, 1)
    assert torch.equal(gradient.isinf(), pattern.col == 4)
    assert not gradient.isnan().any()


NNZ, ROWS = 8000, 40


@pytest.mark.parametrize(
    ("examples", "wide_vectors", "changed", "taken"),
    [
        (1, False, {}, False),
        (2, False, {}, True),
        (2, True, {}, True),
        (96, False, {}, True),
        (97, False, {}, False),
        (2, False, {"_LEAST_WORK": (4 * NNZ + 40, 0)}, False),
        (2, False, {"_LEAST_WORK": (4 * NNZ + 39, 0)}, True),
        (2, True, {"_SMALL": NNZ - 1}, True),
        (48, True, {"_SMALL": 0}, True),
        (49, True, {"_SMALL": 0}, False),
        (2, True, {"_SMALL": 0, "_MOST_NONZEROS": NNZ - 1}, False),
        (2, True, {"_SMALL": 0, "_LONG_ROW": 201}, False),
        (4, True, {"_SMALL": 0, "_WIDE": 399}, True),
        (5, True, {"_SMALL": 0, "_WIDE": 399}, False),
        (20, True, {"_SMALL": 0, "_MOST_NUMBERS": 799}, False),
        (50, False, {"_MOST_NUMBERS": 1999}, False),
        (50, False, {"_MOST_NUMBERS": 2000}, True),
        (17, False, {"_MOST_NONZEROS": 0}, True),
        (48, False, {"_MOST_NONZEROS": 0}, True),
        (16, False, {"_MOST_NONZEROS": 0}, True),
        (16, False, {"_MOST_NUMBERS": 0, "_LONG_ROW": 201}, True),
        (49, False, {"_MOST_NONZEROS": 0}, False),
        (64, False, {"_MOST_NONZEROS": 0}, False),
        (65, False, {"_MOST_NONZEROS": 0}, True),
        (65, False, {"_MOST_NONZEROS": 0, "_LONG_ROW": 201}, False),
        (17, False, {"_MOST_NONZEROS": 0, "_LONG_ROW": 201}, True),
        (8, False, {"_WIDE": 399}, True),
        (9, False, {"_WIDE": 399}, False),
        (17, False, {"_WIDE": 399}, True),
        (48, False, {"_WIDE": 399, "_MOST_NONZEROS": 0, "_CROWDED": 0.6}, True),
        (48, False, {"_WIDE": 399, "_MOST_NONZEROS": 0, "_CROWDED": 0.5}, False),
        (65, False, {"_WIDE": 399, "_MOST_NONZEROS": 0}, False),
    ],
)
def test_where_it_is_taken(
    examples: int, wide_vectors: bool, changed: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_csr, "has_expand", lambda: wide_vectors)
    for name, limit in changed.items():
        monkeypatch.setattr(lanes_csr, name, limit)
    for dtype in DTYPES:
        assert lanes_csr.suits(examples, NNZ, (ROWS, 400), dtype) is taken


@pytest.mark.parametrize(
    ("examples", "wide_vectors", "changed", "taken"),  # spmm_t, sddmm
    [
        (1, False, {}, (False, False)),
        (2, True, {}, (True, True)),
        (48, True, {}, (True, True)),
        (49, False, {}, (False, False)),
        (48, False, {"_MOST_EXAMPLES": 47}, (False, False)),
        (2, False, {"_LEAST_WORK": (0, 4 * NNZ + ROWS)}, (False, False)),
        (8, True, {"_SMALL": NNZ - 1}, (True, True)),
        (9, True, {"_SMALL": NNZ - 1}, (False, False)),
        (16, True, {"_SMALL": NNZ - 1, "_LONG_ROW": NNZ // 2000}, (False, True)),
        (17, True, {"_SMALL": NNZ - 1, "_LONG_ROW": NNZ // 2000}, (False, False)),
        (8, False, {"_SMALL": NNZ - 1}, (True, True)),
        (49, True, {}, (False, False)),
        (65, True, {}, (False, False)),
        (9, False, {"_SMALL": NNZ - 1}, (False, True)),
        (16, False, {"_SMALL": NNZ - 1}, (False, True)),
        (17, False, {"_SMALL": NNZ - 1}, (False, False)),
        (17, False, {"_SMALL": NNZ - 1, "_LONG_ROW": NNZ // 2000}, (True, True)),
        (33, False, {"_SMALL": NNZ - 1}, (True, True)),
        (49, False, {"_LONG_ROW": 0}, (False, False)),
        (64, False, {"_LONG_ROW": 0}, (False, False)),
        (65, False, {}, (True, True)),
        (96, False, {}, (True, True)),
        (97, False, {}, (False, False)),
        (48, False, {"_SMALL": 0, "_WIDE": 1999}, (True, True)),
        (48, False, {"_SMALL": 0, "_WIDE": 1999, "_CROWDED": 0.1}, (False, False)),
        (65, False, {"_WIDE": 1999}, (False, False)),
    ],
)
def test_where_gradients_are_taken(
    examples: int,
    wide_vectors: bool,
    changed: dict[str, Any],
    taken: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lanes_csr, "has_expand", lambda: wide_vectors)
    for name, limit in changed.items():
        monkeypatch.setattr(lanes_csr, name, limit)
    for dtype in DTYPES:
        for operation, expected in zip(("spmm_t", "sddmm"), taken, strict=True):
            assert lanes_csr.suits_gradient(operation, examples, NNZ, (ROWS, 2000), dtype) is expected


def test_it_gives_way_to_blocks_that_are_multiplied_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_csr, "has_expand", lambda: False)
    monkeypatch.setattr(lanes_csr, "_SMALL", 0)
    monkeypatch.setattr(lanes_csr, "_MOST_NONZEROS", 0)
    for examples in (16, 40, 65):
        for in_blocks in (False, True):
            taken = examples == 16 or not in_blocks
            assert lanes_csr.suits(examples, NNZ, (ROWS, 400), torch.float32, in_blocks) is taken
            assert (
                lanes_csr.suits_gradient("sddmm", examples, NNZ, (ROWS, 400), torch.float32, in_blocks)
                is taken
            )


def test_scratch_of_a_thread_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same number whatever the number of threads."""
    for n_threads, (dtype, width) in product((1, 16), ((torch.float32, 1 << 17), (torch.float64, 1 << 16))):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        assert lanes_csr.suits(2, NNZ, (ROWS, width), dtype)
        assert not lanes_csr.suits(2, NNZ, (ROWS, width + 1), dtype)
        for operation in ("spmm_t", "sddmm"):
            for examples, share in ((4, width), (8, width // 2)):
                assert lanes_csr.suits_gradient(operation, examples, NNZ, (ROWS, share), dtype)
                assert not lanes_csr.suits_gradient(operation, examples, NNZ, (ROWS, share + 1), dtype)


@pytest.mark.parametrize("encoding", ["csr", "bitmap"])
def test_products_take_it_from_csr(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def noted(name: str) -> Any:
        run = getattr(lanes_csr, name)
        return lambda *args: (used.append(name), run(*args))[1]

    for name in ("spmm", "sddmm", "spmm_t"):
        monkeypatch.setattr(lanes_csr, name, noted(name))
    pattern = random_pattern((80, 90), 0.5)
    values, x = (
        values_for(pattern, dtype=torch.float32),
        torch.randn(7, 90, generator=torch.Generator().manual_seed(0)),
    )
    index: tuple[Tensor, Tensor | None] = (pattern.crow, pattern.col)
    if encoding == "bitmap":
        index = (encode(pattern.crow, pattern.col, 90), None)
    found = linear.spmm(values, *index, x)
    torch.testing.assert_close(found, x @ dense_of(pattern, values).t(), rtol=1e-4, atol=1e-4)
    dy = torch.randn(7, 80, generator=torch.Generator().manual_seed(1))
    found = linear.sddmm(*index, dy, x, pattern.nnz)
    torch.testing.assert_close(found, (dy.t() @ x)[pattern.to_mask()], rtol=1e-4, atol=1e-4)
    found = linear.spmm_t(values, *index, dy, 90)
    torch.testing.assert_close(found, dy @ dense_of(pattern, values), rtol=1e-4, atol=1e-4)
    assert used == (["spmm", "sddmm", "spmm_t"] if encoding == "csr" else [])
