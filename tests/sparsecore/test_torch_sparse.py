"""The torch_sparse backend, and torch-sparse's matrices to and from ours; skipped where the package is missing."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from devices import devices
from hypothesis import given
from hypothesis import strategies as st
from strategies import patterns, seeds, values_for

import sparsecore
from sparsecore import Pattern, PatternError, SparsecoreError, SparseEmbedding, SparseLinear, ops, split

installed = importlib.util.find_spec("torch_sparse") is not None
needs_it = pytest.mark.skipif(not installed, reason="torch-sparse is not installed")
pytestmark = pytest.mark.feature("torch-sparse (PyTorch Geometric's)")


@needs_it
@pytest.mark.parametrize("device", devices())
@given(pattern=patterns(), batch=st.integers(0, 5), seed=seeds)
def test_products_equal_dense_ones(device: str, pattern: Pattern, batch: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    pattern, values = pattern.to(device), values_for(pattern, seed).to(device).requires_grad_()
    cols = pattern.shape[1]
    dense = pattern.to_dense(values.detach()).requires_grad_()
    x = torch.randn(batch, cols, generator=g, dtype=torch.float64).to(device).requires_grad_()
    with sparsecore.backend("torch_sparse"):
        y = ops.spmm(values, pattern.crow, pattern.col, x)
        y.sin().sum().backward()
    expected = x.detach().clone().requires_grad_()
    y_dense = expected @ dense.t()
    y_dense.sin().sum().backward()
    torch.testing.assert_close(y, y_dense)
    torch.testing.assert_close(x.grad, expected.grad)
    torch.testing.assert_close(pattern.to_dense(values.grad), dense.grad * pattern.to_mask())


@needs_it
@pytest.mark.parametrize("device", devices())
@given(pattern=patterns(), seed=seeds)
def test_there_and_back(device: str, pattern: Pattern, seed: int) -> None:
    pattern, values = pattern.to(device), values_for(pattern, seed, torch.float32).to(device)
    matrix = pattern.to_torch_sparse(values)
    assert matrix.storage.value().data_ptr() == values.data_ptr()
    again, same = split(matrix)
    again.check(same)
    assert torch.equal(again.crow, pattern.crow)
    assert torch.equal(again.col, pattern.col)
    assert torch.equal(same, values)
    assert same.data_ptr() != values.data_ptr()


@needs_it
def test_graphs_without_weights_repeated_edges_and_features() -> None:
    from torch_sparse import SparseTensor

    row, col = torch.tensor([1, 0, 1]), torch.tensor([2, 1, 2])
    _, values = split(SparseTensor(row=row, col=col, sparse_sizes=(2, 3)).coalesce())
    assert values.tolist() == [1.0, 1.0]
    weighted = SparseTensor(row=row, col=col, value=torch.tensor([1.0, 2.0, 3.0]), sparse_sizes=(2, 3))
    pattern, values = split(weighted)
    assert (pattern.nnz, values.tolist()) == (2, [2.0, 4.0])
    with pytest.raises(PatternError, match=r"got values of shape \(3, 4\)"):
        split(SparseTensor(row=torch.arange(3), col=torch.arange(3), value=torch.ones(3, 4)))


@needs_it
@pytest.mark.parametrize("device", devices())
def test_layers_of_it(device: str) -> None:
    from torch_sparse import SparseTensor

    dense = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [5.0, 0.0, 3.0]], device=device)
    matrix, x = SparseTensor.from_dense(dense), torch.randn(4, 3, device=device)
    torch.testing.assert_close(SparseLinear.from_sparse(matrix)(x), x @ dense.t())
    assert torch.equal(SparseEmbedding.from_sparse(matrix)(torch.arange(3, device=device)), dense)


def test_where_it_is_missing_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_sparse", None)
    monkeypatch.delitem(sys.modules, "sparsecore.backends.torch_sparse", raising=False)
    monkeypatch.setattr(sparsecore.backends, "_loaded", {})
    with (
        pytest.raises(SparsecoreError, match=r"needs the package torch_sparse.*pip install"),
        sparsecore.backend("torch_sparse"),
    ):
        raise AssertionError("not reached")
    with pytest.raises(SparsecoreError, match="needs the package torch_sparse"):
        Pattern.from_mask(torch.eye(2)).to_torch_sparse(torch.ones(2))
