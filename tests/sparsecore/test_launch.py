"""How chunks are handed to threads: arguments of every kind reach every chunk, once each."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from strategies import of_numba

from sparsecore.backends.numba.jit import kernel, share_out

pytestmark = of_numba


@kernel
def _fill(out, table, pair, triple, scale, flag, nothing, wide, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    total = pair[0] + pair[1] + triple[0].shape[0] * triple[1] + np.int64(triple[2])
    for row in range(out.shape[0] * chunk // n_chunks, out.shape[0] * (chunk + 1) // n_chunks):
        out[row] += scale * table[row, 1] + total if flag and nothing is None else -1
        wide[chunk] += 1


@kernel
def _divide(out, given, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    out[chunk] = given[chunk] / 0.0


def test_a_kernel_that_would_not_share_its_chunks_is_refused():
    def alone(out, n_chunks, chunk):
        out[chunk] = 1

    with pytest.raises(TypeError, match="alone does not begin with share_out"):
        kernel(alone)


def test_a_kernel_that_allocates_is_refused():
    """Without references to count, no thread waits for another one to count them."""

    def allocating(out, n_chunks, chunk):
        if chunk < 0:
            return share_out(chunk, n_chunks)
        out[chunk] = np.ones(3)[1]

    with pytest.raises(numba.TypingError):
        kernel(allocating)(np.zeros(2), 2)


@pytest.mark.parametrize("n_chunks", [1, 2, 3, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arguments_of_every_kind(n_chunks, dtype):
    torch.set_num_threads(2)  # put back by the fixture of conftest.py
    out, wide = np.zeros(1001, dtype), np.zeros(64, np.int64)
    table = np.arange(2002, dtype=np.float64).reshape(1001, 2)
    arguments = table, (3, 4), (np.zeros(5, np.int8), 10, np.uint8(200)), np.float32(0.5), True, None
    _fill(out, *arguments, wide, n_chunks)
    np.testing.assert_array_equal(out, (0.5 * table[:, 1] + 257).astype(dtype))
    assert wide.sum() == 1001
    assert (wide[:n_chunks] > 0).all()  # every chunk, whatever the number of threads
    _fill(out, *arguments[:-2], False, None, wide, n_chunks)
    np.testing.assert_array_equal(out, (0.5 * table[:, 1] + 257).astype(dtype) - 1)


def test_no_chunks_and_arithmetic_on_infinities():
    torch.set_num_threads(2)
    out = np.full(8, 5.0)
    _divide(out, np.array([1.0, -1.0, 0.0, 1.0]), 0)
    assert (out == 5).all()
    _divide(out, np.array([1.0, -1.0, 0.0, 1.0]), 4)
    np.testing.assert_array_equal(out, [np.inf, -np.inf, np.nan, np.inf, 5, 5, 5, 5])


def test_kernels_of_several_python_threads_at_once():
    """Each has its arguments on its own stack."""
    from concurrent.futures import ThreadPoolExecutor

    torch.set_num_threads(2)

    def fill(seed: int) -> bool:
        out, wide = np.zeros(501, np.float32), np.zeros(64, np.int64)
        table = np.full((501, 2), float(seed))
        for _ in range(50):
            out[:] = 0
            _fill(
                out,
                table,
                (seed, 0),
                (np.zeros(1, np.int8), 0, np.uint8(0)),
                np.float32(1),
                True,
                None,
                wide,
                2,
            )
            if not (out == 2 * seed).all():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, range(1, 9)))
