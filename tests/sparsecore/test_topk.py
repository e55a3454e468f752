"""Scores with top-k: against the sorted dense product, ties, exclusions, threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_portable
from strategies import BACKENDS, dtypes, of_numba, patterns, seeds
from torch import Tensor

import sparsecore
from sparsecore import Pattern, ops
from sparsecore.encoding import encode

pytestmark = pytest.mark.feature("best of a catalogue")

Seen = tuple[Tensor | None, Tensor | None]
ENCODINGS = ("csr", "bitmap")


def coarse(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Quarters: their sums of products are exact in any order, and there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype) / 4


def expected(queries: Tensor, table: Tensor, k: int, seen: Seen = (None, None)) -> tuple[Tensor, Tensor]:
    scores = queries @ table.t()
    crow, col = seen
    if crow is not None and col is not None:
        owner = torch.repeat_interleave(crow.diff().to(torch.int64))
        scores[owner, col.to(torch.int64)] = -torch.inf
    best, ids = scores.sort(dim=1, descending=True, stable=True)
    missing = max(0, k - table.shape[0])
    best = torch.nn.functional.pad(best[:, :k], (0, missing), value=-torch.inf)
    ids = torch.nn.functional.pad(ids[:, :k], (0, missing), value=-1)
    return best, ids.masked_fill(best == -torch.inf, -1)


def seen_rows(n: int, rows: int, share: float, seed: int, dtype: torch.dtype = torch.int64) -> Seen:
    mask = torch.rand(n, rows, generator=torch.Generator().manual_seed(seed)) < share
    crow = torch.zeros(n + 1, dtype=dtype)
    crow[1:] = mask.sum(1).cumsum(0)
    return crow, mask.nonzero()[:, 1].to(dtype)


def run(
    queries: Tensor, values: Tensor, pattern: Pattern, encoding: str, k: int, seen: Seen
) -> tuple[Tensor, Tensor]:
    if encoding == "bitmap":
        index: Seen = (encode(pattern.crow, pattern.col, pattern.shape[1]), None)
    else:
        index = (pattern.crow, pattern.col)
    return ops.score_topk(queries, values, *index, k, *seen)


def check(
    n: int, pattern: Pattern, k: int, share: float, dtype: torch.dtype, encoding: str, seed: int = 0
) -> None:
    rows, cols = pattern.shape
    queries, values = coarse((n, cols), seed, dtype), coarse((pattern.nnz,), seed + 1, dtype)
    seen = (
        seen_rows(n, rows, share, seed, torch.int32 if seed % 2 else torch.int64) if share else (None, None)
    )
    scores, ids = run(queries, values, pattern, encoding, k, seen)
    want_scores, want_ids = expected(queries, pattern.to_dense(values), k, seen)
    assert scores.dtype == dtype
    assert ids.dtype == torch.int64
    assert torch.equal(scores, want_scores)
    assert torch.equal(ids, want_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("density", [0.3, 0.6])  # below and above what one query depends on with AVX2
def test_every_number_of_queries(dtype: torch.dtype, encoding: str, density: float) -> None:
    pattern = Pattern.random((1500, 24), density, generator=torch.Generator().manual_seed(0))
    for n in (0, 1, 2, 3, 16, 17, 64, 65, 128, 129, 300):
        check(n, pattern, 10, 0.05, dtype, encoding, seed=n)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("n", [1, 20, 130])
def test_every_width(encoding: str, n: int) -> None:
    for cols in (1, 10, 15, 16, 17, 31, 33, 50, 64, 65, 200, 257):
        check(n, Pattern.random((90, cols), 0.4), 5, 0.1, torch.float32, encoding)


@given(
    patterns(max_rows=40), st.integers(1, 40), st.integers(1, 60), st.sampled_from((0.0, 0.3, 1.0)), dtypes,
    st.sampled_from(ENCODINGS), seeds,
)  # fmt: skip
def test_any_table(
    pattern: Pattern, n: int, k: int, share: float, dtype: torch.dtype, encoding: str, seed: int
) -> None:
    check(n, pattern, k, share, dtype, encoding, seed % 1000)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_large_k_and_several_passes_over_the_table(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecore.backends.numba import topk

    monkeypatch.setattr(topk, "_HEAP_BYTES", 1)  # one panel of queries at a time
    check(200, Pattern.random((3000, 16), 0.3), 1000, 0.02, torch.float32, encoding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("n", [1, 9])
def test_all_scores_equal(backend: str, encoding: str, n: int) -> None:
    pattern = Pattern.random((5000, 3), 0.2)
    with sparsecore.backend(backend):
        scores, ids = run(torch.ones(n, 3), torch.zeros(pattern.nnz), pattern, encoding, 7, (None, None))
    assert not scores.any()
    assert torch.equal(ids, torch.arange(7).expand(n, 7))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_of_very_different_lengths(encoding: str) -> None:
    """All nonzeros in a few rows: rows without any score 0."""
    mask = torch.zeros(4000, 40, dtype=torch.bool)
    mask[::500] = True
    check(70, Pattern.from_mask(mask), 30, 0.01, torch.float32, encoding)


@of_numba
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("n", "density"), [(1, 0.3), (1, 0.6), (5, 0.3), (100, 0.3), (256, 0.3)])
def test_threads_give_the_same_bits(encoding: str, n: int, density: float) -> None:
    pattern = Pattern.random((6000, 50), density, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    queries, values = torch.randn(n, 50, generator=generator), torch.randn(pattern.nnz, generator=generator)
    seen = seen_rows(n, 6000, 0.01, 3)
    found = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        found.append(run(queries, values, pattern, encoding, 20, seen))
    for scores, ids in found[1:]:
        assert torch.equal(scores, found[0][0])
        assert torch.equal(ids, found[0][1])
    torch.testing.assert_close(
        found[0][0], expected(queries, pattern.to_dense(values), 20, seen)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("n", [1, 5])
def test_scores_that_are_not_finite(encoding: str, n: int) -> None:
    pattern = Pattern.from_mask(torch.ones(6, 1, dtype=torch.bool))
    values = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 2.0, 1.0])
    scores, ids = run(torch.ones(n, 1), values, pattern, encoding, 6, (None, None))
    assert ids[0].tolist() == [2, 4, 0, 5, -1, -1]
    assert scores[0].tolist() == [torch.inf, 2, 1, 1, -torch.inf, -torch.inf]


PORTABLE = """
import torch
import test_topk as t
for encoding in t.ENCODINGS:
    for n, density in ((1, 0.3), (1, 0.6), (20, 0.3), (150, 0.3)):
        pattern = t.Pattern.random((300, 20), density)
        t.check(n, pattern, 10, 0.05, torch.float32, encoding)
"""


def test_without_avx512() -> None:
    run_portable(PORTABLE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_opcheck(backend: str, encoding: str) -> None:
    table = sparsecore.SparseEmbedding(30, 8, density=0.4)
    table.set_encoding(encoding)
    queries = torch.randn(3, 8)
    with sparsecore.backend(backend):
        for seen in ((), seen_rows(3, 30, 0.2, seed=1)):
            torch.library.opcheck(ops.score_topk, (queries, table.values.detach(), *table.index, 4, *seen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_of_an_autocast_model(dtype: torch.dtype) -> None:
    table, encoder = sparsecore.SparseEmbedding(30, 8, density=0.4), torch.nn.Linear(5, 8)
    x = torch.randn(3, 5)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        queries = encoder(x)
        assert queries.dtype is dtype
        scores, ids = sparsecore.score_topk(queries, table, 4)
    right, best = sparsecore.score_topk(queries.float(), table, 4)
    assert torch.equal(ids, best)
    assert torch.equal(scores, right)


def test_other_modules_are_named() -> None:
    table = sparsecore.SparseEmbedding(30, 8, density=0.4)
    dense, ids = torch.nn.Embedding(30, 8), torch.tensor([1])
    with pytest.raises(sparsecore.SparsecoreError, match="needs a sparse table, got Embedding"):
        sparsecore.score_topk(torch.randn(2, 8), dense, 3)  # type: ignore[arg-type]
    with pytest.raises(sparsecore.SparsecoreError, match="needs two SparseEmbedding, got Embedding"):
        sparsecore.gather_dot(table, ids, dense, ids)  # type: ignore[arg-type]


def test_seen_must_be_a_scipy_matrix() -> None:
    table = sparsecore.SparseEmbedding(7, 4, density=0.5)
    with pytest.raises(sparsecore.SparsecoreError, match=r"seen must be a scipy\.sparse matrix, got Tensor"):
        sparsecore.score_topk(torch.randn(2, 4), table, 3, seen=torch.zeros(2, 7))  # type: ignore[arg-type]


@of_numba
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("n", [1, 20, 130])
def test_strided_and_misaligned_queries_and_weights(encoding: str, n: int) -> None:
    pattern = Pattern.random((90, 33), 0.4, generator=torch.Generator().manual_seed(0))
    queries, values = coarse((n, 33), 1, torch.float32), coarse((pattern.nnz,), 2, torch.float32)
    want = run(queries, values, pattern, encoding, 5, (None, None))
    turned = queries.t().contiguous().t()
    shifted = torch.empty(queries.numel() + 1)[1:].view(n, 33).copy_(queries)
    moved = torch.empty(values.numel() + 1)[1:].copy_(values)
    spread = torch.empty(2 * values.numel())[::2].copy_(values)
    for q, v in ((turned, values), (shifted, moved), (queries, spread)):
        found = run(q, v, pattern, encoding, 5, (None, None))
        assert torch.equal(found[0], want[0])
        assert torch.equal(found[1], want[1])


@of_numba
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_widths_around_65536(encoding: str) -> None:
    for cols in (65_535, 65_536, 65_537):
        check(3, Pattern.random((5, cols), 0.001), 3, 0.0, torch.float32, encoding)
