"""The torch_sparse backend, and torch-sparse's matrices to and from ours; skipped where the package is missing."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import patterns, seeds, values_for

import sparsecore
from sparsecore import Pattern, PatternError, SparsecoreError, ops, split

installed = importlib.util.find_spec("torch_sparse") is not None
needs_it = pytest.mark.skipif(not installed, reason="torch-sparse is not installed")
pytestmark = pytest.mark.feature("torch-sparse (PyTorch Geometric's)")


@needs_it
@given(patterns(), st.integers(0, 5), seeds)
def test_products_equal_dense_ones(pattern: Pattern, batch: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = values_for(pattern, seed).requires_grad_()
    cols = pattern.shape[1]
    dense = pattern.to_dense(values.detach()).requires_grad_()
    x = torch.randn(batch, cols, generator=g, dtype=torch.float64, requires_grad=True)
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
@given(patterns(), seeds)
def test_there_and_back(pattern: Pattern, seed: int) -> None:
    values = values_for(pattern, seed, torch.float32)
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
