"""``spmm`` of one example from a bitmap: every way to bring values and activations together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strategies import DTYPES, values_for

from sparsecore import Pattern
from sparsecore.backends.numba import few_one, jit
from sparsecore.encoding import encode

FORMS = {"spread": {64: 0.0, 32: 0.0}, "32": {64: 0.0, 32: 1.0}, "64": {64: 1.0, 32: 1.0}}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    if request.param != "spread" and not few_one.can_pick(np.dtype(np.float32)):
        pytest.skip("this processor has no instructions that pick by a bitmap (AVX-512 VBMI2)")
    monkeypatch.setattr(few_one, "_SPARSE", FORMS[request.param])
    monkeypatch.setattr(jit, "_SERIAL_WORK", 0)
    return request.param


def product(pattern, values, x, n_threads=1):
    torch.set_num_threads(n_threads)  # put back by the fixture of conftest.py
    crow = encode(pattern.crow, pattern.col, pattern.shape[1]).numpy()
    y = np.full(pattern.shape[0], np.nan, dtype=x.numpy().dtype)
    few_one.spmm(values.numpy(), crow, x.numpy(), y, n_threads)
    return torch.from_numpy(y)


def places(pattern):
    return torch.repeat_interleave(pattern.crow.long().diff()), pattern.col.long()


def dense_of(pattern, values):
    weight = torch.zeros(pattern.shape, dtype=values.dtype)
    weight[places(pattern)] = values
    return weight


def check(pattern, dtype):
    values = values_for(pattern, dtype=dtype)
    x = torch.randn(pattern.shape[1], generator=torch.Generator().manual_seed(0), dtype=dtype)
    one, two = product(pattern, values, x), product(pattern, values, x, 2)
    assert torch.equal(one, two)
    tolerance = pattern.shape[1] ** 0.5 * (4e-6 if dtype is torch.float32 else 1e-14)
    torch.testing.assert_close(one, dense_of(pattern, values) @ x, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.03, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("cols", [1, 31, 32, 33, 63, 64, 65, 96, 97, 200, 1024])
def test_widths(cols, density, dtype, form):
    generator = torch.Generator().manual_seed(cols)
    check(Pattern.random((37, cols), density, generator=generator), dtype)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 150])
def test_heights(rows, form):
    check(Pattern.random((rows, 130), 0.3, generator=torch.Generator().manual_seed(rows)), torch.float32)


@pytest.mark.parametrize("shape", [(1, 5000), (200, 64)], ids=("one row", "one word a row"))
def test_no_value_beyond_the_last_is_read_as_one(shape, form):
    """Values that end where memory of others begins: NaN there must not be seen."""
    pattern = Pattern.random(shape, 0.4, generator=torch.Generator().manual_seed(1))
    values = values_for(pattern, dtype=torch.float32)
    longer = torch.cat([values, torch.full((100,), float("nan"))])
    x = torch.randn(shape[1], generator=torch.Generator().manual_seed(0))
    right = product(pattern, values, x)
    assert torch.equal(product(pattern, longer[: pattern.nnz], x), right)
    assert not right.isnan().any()


def test_crowded_and_empty_words(form):
    """From no bit to 64 in a word, so that every count of vectors is needed, in any of the four streams."""
    counts = torch.arange(65).repeat(3)
    col = torch.cat([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:n].sort()[0] for i, n in
                     enumerate(counts)])  # fmt: skip
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    check(Pattern(crow, col, (len(counts), 64)), torch.float32)


def test_what_is_not_stored_is_not_multiplied(form):
    pattern = Pattern.random((60, 90), 0.3, generator=torch.Generator().manual_seed(8))
    values = values_for(pattern, dtype=torch.float32)
    x = torch.randn(90, generator=torch.Generator().manual_seed(0))
    right = product(pattern, values, x)
    for column, worst in ((0, float("nan")), (17, float("inf")), (89, float("nan"))):
        spoilt = x.clone()
        spoilt[column] = worst
        reached = torch.zeros(60, dtype=torch.bool)
        reached[places(pattern)[0][places(pattern)[1] == column]] = True
        result = product(pattern, values, spoilt)
        assert 0 < reached.sum() < 60
        assert not result[reached].isfinite().any()
        assert torch.equal(result[~reached], right[~reached])
