"""What kernels would take on trust, or would say in the words of others, is refused first."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from strategies import of_numba
from torch import nn

import sparsecore
from sparsecore import Graph, Pattern, SparsecoreError, ops
from sparsecore.errors import PatternError
from sparsecore.nn.graph import normalized_bipartite, propagate_mean

EYE = scipy.sparse.eye_array(6, format="csr", dtype=np.float32)


@pytest.mark.parametrize("shape", [(6,), (6, 2, 3), (5, 2)])
def test_a_graph_takes_one_row_a_node(shape):
    graph = Graph.from_scipy(EYE)
    with pytest.raises(SparsecoreError, match=r"(6, d)|6 nodes"):
        graph(torch.ones(shape))
    if len(shape) != 2:
        with pytest.raises(SparsecoreError, match="propagate needs x of shape"):
            ops.propagate(*graph.arrays(), torch.ones(shape))
        with pytest.raises(SparsecoreError, match="propagate_rows needs x of shape"):
            ops.propagate_rows(*graph.arrays(), torch.ones(shape), torch.arange(2))


LAYERS = {
    "linear": (lambda: sparsecore.SparseLinear(8, 6, density=0.5), torch.ones(2, 8)),
    "bias": (lambda: sparsecore.SparseBias(8, density=0.5), torch.ones(2, 8)),
    "conv": (lambda: sparsecore.SparseConv2d(2, 3, 3, density=0.5), torch.ones(1, 2, 5, 5)),
    "embedding": (lambda: sparsecore.SparseEmbedding(9, 4, density=0.5), torch.arange(3)),
    "bag": (lambda: sparsecore.SparseEmbeddingBag(9, 4, density=0.5), torch.arange(4).view(2, 2)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("n", [1, 100])
def test_values_of_another_density(kind, n):
    make, x = LAYERS[kind]
    layer, values = make(), torch.randn(n, requires_grad=True)
    with pytest.raises(
        SparsecoreError, match=f"stores {layer.nnz} values, got {n}: they are of a model of another"
    ):
        torch.func.functional_call(layer, {"values": values}, (x,))
    torch.func.functional_call(layer, {"values": torch.randn(layer.nnz)}, (x,))


def test_values_of_another_density_where_tables_are_read():
    table, other = (sparsecore.SparseEmbedding(6, 4, density=0.5) for _ in "ab")
    table.values.data = torch.ones(3)
    for call in (
        lambda: sparsecore.gather_dot(table, torch.arange(3), other, torch.arange(3)),
        lambda: sparsecore.score_topk(torch.ones(2, 4), table, 3),
        lambda: propagate_mean(Graph.from_scipy(EYE), table, 2),
    ):
        with pytest.raises(SparsecoreError, match="stores 12 values, got 3"):
            call()


@pytest.mark.parametrize("values", [torch.ones(3), torch.ones(100), torch.ones(12, 2)])
@pytest.mark.parametrize("to", ["to_csr", "to_coo", "to_dense", "to_scipy"])
def test_a_pattern_with_other_values(to, values):
    pattern = Pattern.random((6, 4), 0.5)
    with pytest.raises(PatternError, match="expected 12 values in one dimension, got shape"):
        getattr(pattern, to)(values)


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_that_is_skipped_is_one_of_the_rows(row):
    with pytest.raises(PatternError, match=r"skip_row must be in 0 \.\. 3"):
        Pattern.random((4, 3), nnz=9, skip_row=row)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@of_numba
def test_sparse_activations(layout):
    x = getattr(torch.ones(2, 8), layout)()
    with pytest.raises(SparsecoreError, match="SparseEmbeddingBag"):
        sparsecore.SparseLinear(8, 6, density=0.5)(x)


def test_rows_and_tables_of_a_propagation():
    graph, table = Graph.from_scipy(EYE), sparsecore.SparseEmbedding(6, 4, density=0.5)
    for one in (table, nn.Embedding(6, 4)):
        for rows in (torch.tensor([0.0]), torch.ones(6, dtype=torch.bool), torch.ones(5, dtype=torch.uint8)):
            with pytest.raises(SparsecoreError, match="rows must be int64 or int32"):
                propagate_mean(graph, one, 2, rows)
    for wrong in (nn.Linear(4, 6), sparsecore.SparseEmbeddingBag(6, 4, density=0.5)):
        with pytest.raises(SparsecoreError, match=r"needs a SparseEmbedding or an nn\.Embedding"):
            propagate_mean(graph, wrong, 2)


@pytest.mark.parametrize("make", [Pattern.from_scipy, Graph.from_scipy, normalized_bipartite])
def test_what_is_no_sparse_matrix_of_scipy(make):
    for wrong, message in (
        (np.eye(3), r"got ndarray; scipy\.sparse\.csr_array"),
        (torch.eye(3).to_sparse(), "got Tensor"),
        (scipy.sparse.coo_array(np.array([0.0, 1.0])), "of two dimensions, got 1"),
    ):
        with pytest.raises(PatternError, match=message):
            make(wrong)


def test_complex_graphs():
    with pytest.raises(PatternError, match="got complex ones"):
        Graph.from_scipy(EYE.astype(np.complex64))


def test_patterns_of_arrays_of_numpy_and_dlpack():
    class Speaks:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    expected = Pattern.from_csr(torch.tensor([0, 1, 3]), torch.tensor([1, 0, 1]), (2, 2))
    read_only = np.array([1, 0, 1])
    read_only.flags.writeable = False
    for crow, col in (
        (np.array([0, 1, 3]), read_only),
        (Speaks(torch.tensor([0, 1, 3])), Speaks(torch.tensor([1, 0, 1]))),
    ):
        found = Pattern.from_csr(crow, col, (2, 2))
        assert torch.equal(found.crow, expected.crow)
        assert torch.equal(found.col, expected.col)
    assert torch.equal(Pattern.from_coo(np.array([0, 1, 1]), read_only, (2, 2)).crow, expected.crow)
    assert torch.equal(Pattern.from_mask(np.array([[0, 1], [1, 1]])).col, expected.col)
    with pytest.raises(PatternError, match="speaks DLPack, got str"):
        Pattern.from_csr("0 1", read_only, (1, 2))


def test_settings_of_other_types():
    layer = sparsecore.SparseConv2d(3, 4, np.int64(3), stride=(np.int32(1), 2), density=0.5)
    assert layer(torch.ones(1, 3, 7, 7)).shape == (1, 4, 5, 3)
    with pytest.raises(SparsecoreError, match="offsets must be 1-D, got 2-D"):
        sparsecore.SparseEmbeddingBag(9, 4, density=0.5)(torch.arange(4), torch.tensor([[0], [2]]))
    with pytest.raises(SparsecoreError, match="8 features"):
        sparsecore.SparseLinear(8, 6, density=0.5)(torch.tensor(1.0))


@of_numba
def test_python_threads_where_numba_has_no_pool_that_serves_several():
    """numba's own pool, used without OpenMP and TBB, aborts a process that two threads enter at once."""
    code = """
import threading, torch, numba
torch.set_num_threads(2)
from sparsecore.backends.numba import jit
jit._SERIAL_WORK = 0
import sparsecore
table, ids = sparsecore.SparseEmbedding(2000, 64, density=0.1), torch.arange(2000)
expected = table(ids)
wrong = []
def work():
    for _ in range(60):
        if not torch.equal(table(ids), expected):
            wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(numba.threading_layer(), len(wrong))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env={**os.environ, "NUMBA_THREADING_LAYER": "workqueue"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["workqueue", "0"]
