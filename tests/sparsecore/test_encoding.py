"""Bitmaps and columns are two forms of one index set."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import NARROW_WIDTHS, WIDE_WIDTHS, patterns

import sparsecore
from sparsecore import (
    Pattern,
    PatternError,
    SparsecoreError,
    SparseEmbedding,
    SparseEmbeddingBag,
    SparseLinear,
    backends,
)
from sparsecore import encoding as codec


@given(patterns(max_rows=40, widths=NARROW_WIDTHS + WIDE_WIDTHS))
def test_round_trip(pattern: Pattern) -> None:
    cols = pattern.shape[1]
    bitmap = codec.encode(pattern.crow, pattern.col, cols)
    codec.check_bitmap(bitmap, pattern.shape)
    crow, col = codec.decode(bitmap, cols)
    assert torch.equal(crow, pattern.crow)
    assert torch.equal(col, pattern.col)
    assert col.dtype == pattern.col.dtype
    assert torch.equal(codec._encode_on_device(pattern.crow, pattern.col, cols), bitmap)
    crow, col = codec._decode_on_device(bitmap, cols)
    assert torch.equal(crow, pattern.crow)
    assert torch.equal(col, pattern.col)
    assert col.dtype == pattern.col.dtype


@given(patterns(max_rows=40, widths=NARROW_WIDTHS + WIDE_WIDTHS), st.randoms())
def test_mask_of_some_rows(pattern: Pattern, random: Random) -> None:
    rows = torch.tensor([r for r in range(pattern.shape[0]) if random.random() < 0.6], dtype=torch.int64)
    expected = pattern.to_mask()[rows]
    cols = pattern.shape[1]
    bitmap = codec.encode(pattern.crow, pattern.col, cols)
    assert torch.equal(codec.stored_mask((bitmap, None), rows, cols), expected)
    assert torch.equal(codec.stored_mask((pattern.crow, pattern.col), rows, cols), expected)


def test_layout() -> None:
    """Pointer, then 32 columns a word, the lowest bit first; the last row counts everything."""
    pattern = Pattern.from_coo(torch.tensor([0, 0, 2]), torch.tensor([0, 33, 5]), (3, 40))
    bitmap = codec.encode(pattern.crow, pattern.col, 40)
    assert bitmap.tolist() == [[0, 1, 2, 0], [2, 0, 0, 0], [2, 32, 0, 0], [3, 0, 0, 0]]


def test_blocks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Pattern.random((100, 50), 0.4, generator=torch.Generator().manual_seed(0))
    expected = codec.encode(pattern.crow, pattern.col, 50)
    monkeypatch.setattr(codec, "_BLOCK", 64 * 7)
    assert torch.equal(codec.encode(pattern.crow, pattern.col, 50), expected)
    assert torch.equal(codec.decode(expected, 50)[1], pattern.col)


@pytest.mark.parametrize(
    ("cols", "expected"), [(1, 2), (32, 2), (33, 4), (96, 4), (97, 8), (224, 8), (225, 12), (600, 20)]
)
def test_words_of_a_row(cols: int, expected: int) -> None:
    assert codec.words(cols) == expected


def test_too_many_for_int32_pointers() -> None:
    huge = torch.empty(2**31, dtype=torch.uint8, device="meta")
    with pytest.raises(SparsecoreError, match=r"fewer than 2\^31 nonzeros.*use the csr encoding"):
        codec.encode(torch.zeros(2, dtype=torch.int64), huge, 1)


@pytest.mark.parametrize("vectors", ["AVX512", "AVX2", "DEFAULT"])
def test_the_rule(vectors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documented in `choose_encoding`: bitmaps from density 1/16 on, where kernels read them fast."""
    monkeypatch.setattr(codec, "_vectors", lambda: vectors)
    monkeypatch.setattr(backends, "_environment", None)
    dense_enough = "bitmap" if vectors == "AVX512" else "csr"
    of_table = "csr" if vectors == "DEFAULT" else "bitmap"
    assert codec.choose_encoding(400, (100, 64)) == dense_enough
    assert codec.choose_encoding(399, (100, 64)) == "csr"
    assert codec.choose_encoding(400, (100, 64), table=True) == of_table
    assert codec.choose_encoding(399, (100, 64), table=True) == "csr"
    assert codec.choose_encoding(400, (100, 64), dtype=torch.float64, table=True) == dense_enough
    for triton in (True, False):
        monkeypatch.setattr(backends, "has_triton", lambda: triton)  # noqa: B023
        assert codec.choose_encoding(1000, (100, 64), "cuda") == ("bitmap" if triton else "csr")
        assert codec.choose_encoding(600, (100, 64), "cuda") == "csr"
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    assert codec.choose_encoding(1000, (100, 64), "cuda", torch.float64) == "csr"
    with sparsecore.backend("torch"):
        assert codec.choose_encoding(1000, (100, 64), "cuda") == "csr"
        # What decodes a whole bitmap in every call has none unless that is chosen for what computes without it.
        assert codec.choose_encoding(400, (100, 64), table=True) == dense_enough
    with monkeypatch.context() as told:
        told.setenv("NUMBA_CPU_NAME", "generic")
        assert codec.choose_encoding(400, (100, 64), table=True) == dense_enough
    assert codec.choose_encoding(400, (100, 64), "meta") == "csr"
    assert codec.choose_encoding(2**31, (2**26, 64)) == "csr"
    assert SparseLinear(64, 100, density=0.5).encoding == dense_enough
    assert SparseEmbedding(100, 64, density=0.5).encoding == of_table
    assert SparseEmbeddingBag(100, 64, density=0.5).encoding == dense_enough
    assert SparseEmbedding(100, 64, density=0.05).encoding == "csr"


@pytest.mark.parametrize("found", ["AVX512", "AVX2", "DEFAULT"])
def test_portable_code_chooses_as_without_avx512(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECORE_SIMD", "portable")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: found)
    codec._vectors.cache_clear()
    try:
        assert not codec.has_expand()
        assert codec.has_permute() == (found != "DEFAULT")
        assert SparseLinear(64, 100, density=0.5).encoding == "csr"
    finally:
        codec._vectors.cache_clear()


def test_damage_is_named() -> None:
    pattern = Pattern.random((10, 40), 0.4, generator=torch.Generator().manual_seed(0))
    bitmap = codec.encode(pattern.crow, pattern.col, 40)
    bitmap[3, 0] += 1
    with pytest.raises(PatternError, match="must count its bits"):
        codec.check_bitmap(bitmap, (10, 40))
