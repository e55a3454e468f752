"""Lanes moved by AVX2's permutations, for every mask; compiled here whatever else the processor has."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from llvmlite.binding import get_host_cpu_features  # noqa: E402

from sparsecore.backends.numba import simd_lanes, simd_masks  # noqa: E402
from sparsecore.backends.numba.simd import (  # noqa: E402
    compress,
    expand,
    load,
    positions,
    positions_few,
    spread,
    store,
)

MASKS = np.arange(1 << 16, dtype=np.uint16)
BITS = (MASKS[:, None] >> np.arange(16, dtype=np.uint16) & 1).astype(bool)


@pytest.fixture(autouse=True)
def permuted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not get_host_cpu_features().get("avx2", False):
        pytest.skip("this processor has no AVX2")
    for module in (simd_lanes, simd_masks):
        monkeypatch.setattr(module, "has_avx2", lambda: True)


def test_numbers_go_to_the_lanes_of_a_mask() -> None:
    @numba.njit
    def run(numbers, masks, out):
        for i in range(masks.shape[0]):
            store(out, 32 * i, expand(numbers, 3, masks[i]))
            store(out, 32 * i + 16, spread(load(numbers, 3), masks[i]))

    numbers, out = np.arange(1, 20, dtype=np.float32), np.empty((len(MASKS), 2, 16), np.float32)
    numbers[5] = np.nan
    run(numbers, MASKS, out)
    rank = np.cumsum(BITS, 1) - 1
    expected = np.where(BITS, numbers[3 + np.maximum(rank, 0)], np.float32(0))
    np.testing.assert_array_equal(out[:, 0], expected)
    np.testing.assert_array_equal(out[:, 1], expected)
    assert _permutations(run) >= 5


@pytest.mark.skipif(sys.platform == "win32", reason="memory is protected by mprotect")
def test_expansion_reads_only_what_the_mask_counts() -> None:
    @numba.njit
    def run(numbers, n, mask, out):
        store(out, 0, expand(numbers, numbers.shape[0] - n, mask))

    page, out = mmap.PAGESIZE, np.empty(16, np.float32)
    memory = mmap.mmap(-1, 2 * page)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(behind), ctypes.c_size_t(page), 0) != 0:
        pytest.skip("no memory can be made unreadable here")
    numbers = np.frombuffer(memory, np.float32, page // 4)
    numbers[:] = np.arange(1, page // 4 + 1)
    for mask in (0, 1, 0x8000, 0xFF, 0xFF00, 0xF80F, 0xFFFF):
        bits = [mask >> lane & 1 for lane in range(16)]
        run(numbers, sum(bits), np.uint16(mask), out)
        packed = iter(numbers[page // 4 - sum(bits) :].tolist())
        assert out.tolist() == [next(packed) if bit else 0 for bit in bits]


def test_the_lanes_of_a_mask_go_to_the_front() -> None:
    @numba.njit
    def run(numbers, masks, out):
        for i in range(masks.shape[0]):
            store(out, 16 * i, compress(load(numbers, 0), masks[i]))

    numbers, out = np.arange(1, 17, dtype=np.float32), np.empty((len(MASKS), 16), np.float32)
    run(numbers, MASKS, out)
    front = np.arange(16) < BITS.sum(1)[:, None]
    expected = np.broadcast_to(numbers, BITS.shape)[BITS]
    np.testing.assert_array_equal(out[front], expected)
    assert _permutations(run) >= 2


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.uint32, np.int64])
@pytest.mark.parametrize("few", [False, True])
def test_places_of_set_bits(kind: type, few: bool) -> None:
    """In order, then the base alone, and no more than 16 numbers too many."""
    write = positions_few if few else positions

    @numba.njit
    def run(out, mask, base):
        write(out, 2, mask, base)

    generator = np.random.default_rng(0)
    masks = [0, 1, 1 << 63, (1 << 32) - 1, (1 << 64) - 1]
    masks += [int(generator.integers(1 << 63)) << 1 | i % 2 for i in range(50)]
    for mask in masks:
        mask &= (1 << 32) - 1 if few else (1 << 64) - 1
        out = np.full(100, 9, kind)
        run(out, np.uint64(mask), 128)
        places = [128 + bit for bit in range(64) if mask >> bit & 1]
        assert out[:2].tolist() == [9, 9]
        assert out[2:].tolist() == [*places, *[128] * 16, *[9] * (82 - len(places))]


def _permutations(function) -> int:
    (assembly,) = function.inspect_asm().values()
    return assembly.count("vpermps") + assembly.count("vpermd")
