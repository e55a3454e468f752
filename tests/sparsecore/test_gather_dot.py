"""Scores of pairs against dense torch: values, gradients dense and sparse, encodings, counts, growth."""

from __future__ import annotations

import copy
import importlib
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BACKENDS, backends, of_numba, seeds
from torch import Tensor, nn

import sparsecore
from sparsecore import DynamicSparsity, MacCounter, SparsecoreError, SparseEmbedding, gather_dot, ops
from sparsecore.backends.numba import jit
from sparsecore.encoding import ENCODINGS

pytestmark = pytest.mark.feature("scores of pairs")

kernels = importlib.import_module("sparsecore.backends.numba.gather_dot")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def table(rows: int, cols: int, seed: int, encoding: str = "csr", **options: Any) -> SparseEmbedding:
    made = SparseEmbedding(
        rows, cols, density=0.4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), **options
    )
    made.set_encoding(encoding)
    return made


def by_shared_columns(shared: bool) -> Any:
    """Bitmaps: look at the columns that two rows share, as in large tables of low density, or at whole rows."""
    return patch.multiple(kernels, _AVX2=False, _CACHED=-1, _FEW=1000 if shared else 0)


def expected(a: nn.Embedding, ids_a: Tensor, b: nn.Embedding, ids_b: Tensor) -> Tensor:
    left = a(ids_a) if ids_b.dim() == 1 else a(ids_a).unsqueeze(1)
    return (left * b(ids_b)).sum(-1)


@given(
    st.sampled_from([1, 5, 15, 16, 17, 32, 33, 64, 65, 100, 257]),
    st.sampled_from([0, 1, 2, 40]),
    st.sampled_from([None, 0, 1, 3]),
    st.sampled_from(ENCODINGS),
    st.sampled_from(ENCODINGS),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 4096]),
    backends,
    seeds,
)
def test_equals_dense(
    cols: int,
    n: int,
    each: int | None,
    first: str,
    second: str,
    same: bool,
    sparse: bool,
    shared: bool,
    few: int,
    backend: str,
    seed: int,
) -> None:
    """Two tables in any encodings or one with itself; sparse or dense gradients; by either kernel for bitmaps, and with
    few calls or general ones.
    """
    a = table(20, cols, seed, first, sparse=sparse)
    b = a if same else table(9, cols, seed + 1, second, sparse=sparse)
    g = torch.Generator().manual_seed(seed)
    ids_a = torch.randint(20, (n,), generator=g)
    ids_b = torch.randint(9, (n,) if each is None else (n, each), generator=g)
    c = a.to_dense()
    d = c if same else b.to_dense()
    for dense in (c, d):
        dense.sparse = False
    weights = torch.randn(ids_b.shape, dtype=torch.float64, generator=g)
    with sparsecore.backend(backend), by_shared_columns(shared), patch.object(ops.dot, "_FEW", few):
        ours = gather_dot(a, ids_a, b, ids_b)
        (ours * weights).sum().backward()
    theirs = expected(c, ids_a, d, ids_b)
    (theirs * weights).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for mine, right in ((a, c), (b, d)):
        grad = mine.values.grad
        assert grad is not None
        assert right.weight.grad is not None
        assert grad.is_sparse == sparse
        grad = grad.to_dense() if sparse else grad
        at_nonzeros = right.weight.grad.reshape(-1)[mine.pattern.positions()]
        torch.testing.assert_close(grad, at_nonzeros, rtol=1e-11, atol=1e-11)


@every_backend
@pytest.mark.parametrize("first", ENCODINGS)
@pytest.mark.parametrize("second", ENCODINGS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 0), (0, 3), (4, 0)])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("few", [0, 4096])
def test_no_pairs(
    few: int, threads: int, shape: tuple[int, ...], sparse: bool, second: str, first: str, backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No scores, and gradients of zeros."""
    monkeypatch.setattr(ops.dot, "_FEW", few)
    monkeypatch.setattr(jit, "_SERIAL_WORK", 0)
    torch.set_num_threads(threads)  # put back by the fixture of conftest.py
    a, b = table(20, 33, 1, first, sparse=sparse), table(9, 33, 2, second, sparse=sparse)
    ids_a, ids_b = torch.arange(shape[0]), torch.zeros(shape, dtype=torch.int64)
    for shared in (False, True):
        with sparsecore.backend(backend), by_shared_columns(shared):
            scores = gather_dot(a, ids_a, b, ids_b)
            scores.sum().backward()
        assert scores.shape == shape
        for t in (a, b):
            assert t.values.grad is not None
            assert t.values.grad.is_sparse == sparse
            assert not t.values.grad.to_dense().any()
            t.zero_grad()


@every_backend
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("right", [[[1, 3], [0, 0], [2, 1]], [1, 0, 0]])
@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("check", ["gradcheck", "opcheck"])
def test_derivatives_and_registration(
    check: str, backend: str, encoding: str, right: list[Any], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By sums over bags, and, of few single pairs, by lookups."""
    monkeypatch.setattr(ops.dot, "_FEW", few)
    a, b = table(5, 6, 1, encoding), table(4, 6, 2, encoding)
    args = (a.values, *a.index, torch.tensor([0, 4, 4]), b.values, *b.index, torch.tensor(right), 6)
    with sparsecore.backend(backend):
        if check == "opcheck":
            torch.library.opcheck(ops.gather_dot.op, args)
        else:
            assert torch.autograd.gradcheck(ops.gather_dot, args)
            assert torch.autograd.gradgradcheck(ops.gather_dot, args)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
def test_threads_do_not_change_a_bit(encoding: str, dtype: torch.dtype, shared: bool) -> None:
    a = table(300, 70, 3, encoding).to(dtype)
    ids = torch.randint(300, (2000, 3), generator=torch.Generator().manual_seed(0))
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        with by_shared_columns(shared):
            results.append(gather_dot(a, ids[:, 0].contiguous(), a, ids[:, 1:]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@of_numba
@pytest.mark.parametrize("csr_first", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [100, 900])
def test_of_a_csr_beside_a_bitmap_rows_looked_up_are_encoded(
    threads: int, csr_first: bool, batch: int
) -> None:
    """The work of a call grows with the batch and not with the table, up to the table's rows."""
    torch.set_num_threads(threads)
    csr, bitmap = table(500, 70, 3, "csr").float(), table(400, 70, 4, "bitmap").float()
    g = torch.Generator().manual_seed(0)
    a, b = (csr, bitmap) if csr_first else (bitmap, csr)
    ids_a = torch.randint(a.num_embeddings, (batch,), generator=g)
    ids_b = torch.randint(b.num_embeddings, (batch, 2), generator=g)
    with patch.object(kernels, "_encode_rows", wraps=kernels._encode_rows) as encode:
        found = gather_dot(a, ids_a, b, ids_b)
    assert len(encode.call_args.args[3]) == 1 + min(500, batch if csr_first else 2 * batch)
    torch.testing.assert_close(found, torch.einsum("nd,nmd->nm", a(ids_a), b(ids_b)))


@of_numba
@pytest.mark.parametrize(
    ("rows", "density", "permutes", "shared"),
    [
        (600_000, 0.1, False, 1),
        (600_000, 0.5, False, 0),
        (2_000, 0.1, False, 0),
        (2_000, 0.1, True, 1),
        (2_000, 0.5, True, 0),
    ],
)
def test_tables_of_low_density_share_few_columns(
    rows: int, density: float, permutes: bool, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule, with AVX2 and else, and the chosen kernel's result."""
    monkeypatch.setattr(kernels, "_AVX2", permutes)
    a = SparseEmbedding(rows, 64, density=density)
    a.set_encoding("bitmap")
    ids = torch.randint(rows, (2, 300), generator=torch.Generator().manual_seed(1))
    with (
        torch.no_grad(),
        patch.object(kernels, "_dot_shared", wraps=kernels._dot_shared) as by_columns,
        patch.object(kernels, "_dot_bitmaps", wraps=kernels._dot_bitmaps) as by_rows,
    ):
        ours = gather_dot(a, ids[0], a, ids[1])
    assert (by_columns.call_count, by_rows.call_count) == (shared, 1 - shared)
    torch.testing.assert_close(ours, (a(ids[0]) * a(ids[1])).sum(1), rtol=1e-4, atol=1e-5)


def test_counts() -> None:
    a, b = table(20, 6, 1), table(9, 6, 2)
    counter = MacCounter()
    with counter.phase("forward"):
        out = gather_dot(a, torch.tensor([1, 2]), b, torch.tensor([[3, 4, 4], [5, 6, 7]]))
    with counter.phase("backward"):
        out.sum().backward()
    of_b = b.pattern.crow.diff()
    read = 2 * of_b[[3, 4, 4, 5, 6, 7]].sum()
    assert counter.macs == {"forward": 36, "backward": int(read)}


def test_exploration_grows_where_the_gradient_is() -> None:
    """The growth scores of pair products are those of rows looked up and multiplied."""
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        a, b = table(30, 8, 1), table(40, 8, 2)
        model = nn.ModuleDict({"a": a, "b": b})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        explorer = DynamicSparsity(model, optimizer, interval=1, total_steps=10)
        for _ in range(3):
            ids_a, ids_b = torch.randint(30, (25,)), torch.randint(40, (25, 2))
            scores = gather_dot(a, ids_a, b, ids_b) if fused else (a(ids_a).unsqueeze(1) * b(ids_b)).sum(-1)
            optimizer.zero_grad()
            nn.functional.softplus(scores[:, 1] - scores[:, 0]).sum().backward()
            optimizer.step()
            explorer.step()
        results.append((a.pattern.positions(), b.pattern.positions(), a.values.detach(), b.values.detach()))
    for fused_part, plain_part in zip(*results, strict=True):
        torch.testing.assert_close(fused_part, plain_part, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frozen", ["a", "b"])
def test_one_frozen_table(frozen: str) -> None:
    """The other's gradient is a sparse vector all the same, so that an optimizer stays lazy."""
    grads = []
    for sparse in (True, False):
        tables = {"a": table(6, 8, 1, sparse=sparse), "b": table(7, 8, 2, sparse=sparse)}
        tables[frozen].requires_grad_(False)
        gather_dot(
            tables["a"], torch.tensor([1, 1]), tables["b"], torch.tensor([[2, 0], [2, 3]])
        ).sum().backward()
        assert tables[frozen].values.grad is None
        grads.append(tables["b" if frozen == "a" else "a"].values.grad)
    assert grads[0].layout == torch.sparse_coo
    torch.testing.assert_close(grads[0].to_dense(), grads[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_gradients_of_16_bit_tables(dtype: torch.dtype) -> None:
    a, b = (table(6, 8, seed, sparse=True).to(dtype) for seed in (1, 2))
    a(torch.tensor([1, 1, 4])).sum().backward()
    assert a.values.grad.layout == torch.sparse_coo
    assert a.values.grad.dtype == dtype
    assert a.values.grad.to_dense().sum() == 2 * a.pattern.to_mask()[1].sum() + a.pattern.to_mask()[4].sum()
    a.zero_grad()
    gather_dot(a, torch.tensor([1, 1]), b, torch.tensor([2, 3])).sum().backward()
    exact_a, exact_b = (copy.deepcopy(t).float() for t in (a, b))
    exact_a.zero_grad()
    exact_b.zero_grad()
    gather_dot(exact_a, torch.tensor([1, 1]), exact_b, torch.tensor([2, 3])).sum().backward()
    for half, exact in ((a, exact_a), (b, exact_b)):
        torch.testing.assert_close(
            half.values.grad.to_dense().float(), exact.values.grad.to_dense(), rtol=2e-2, atol=2e-2
        )


def test_errors() -> None:
    a, b = table(5, 6, 1), table(5, 7, 1)
    ids = torch.tensor([0, 1])
    with pytest.raises(SparsecoreError, match="one width, got 6 and 7"):
        gather_dot(a, ids, b, ids)
    with pytest.raises(SparsecoreError, match=r"ids_a \(n,\) and ids_b .*got \(2,\) and \(3,\)"):
        gather_dot(a, ids, a, torch.tensor([0, 1, 2]))
    with pytest.raises(SparsecoreError, match="both tables sparse=True, or neither"):
        gather_dot(a, ids, table(5, 6, 1, sparse=True), ids)
    with pytest.raises(IndexError, match=r"ids must be in 0 .. 4, got 5"):
        gather_dot(a, ids, a, torch.tensor([0, 5]))


@every_backend
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_strided_and_misaligned_values_and_ids(backend: str, encoding: str) -> None:
    a = table(300, 65, 3, encoding).float()
    ids = torch.randint(300, (400, 2), generator=torch.Generator().manual_seed(0))
    values = a.values.detach()
    moved = torch.empty(values.numel() + 1)[1:].copy_(values)
    spread = torch.empty(2 * values.numel())[::2].copy_(values)
    with sparsecore.backend(backend):
        want = ops.gather_dot(
            values, *a.index, ids[:, 0].contiguous(), values, *a.index, ids[:, 1].clone(), 65
        )
        for v in (moved, spread):
            found = ops.gather_dot(v, *a.index, ids[:, 0], v, *a.index, ids[:, 1], 65)
            assert torch.equal(found, want)


@of_numba
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("cols", [65_535, 65_536, 65_537])
def test_widths_around_65536(encoding: str, cols: int) -> None:
    a = table(6, cols, 3, encoding)
    ids = torch.tensor([0, 5, 3])
    found = gather_dot(a, ids, a, ids.flip(0))
    torch.testing.assert_close(found, (a(ids) * a(ids.flip(0))).sum(1), rtol=1e-11, atol=1e-11)
