"""Existing sparse matrices become layers: values stay with their places, however the matrix is ordered."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import torch
from devices import devices
from torch import nn

import sparsecore
from sparsecore import (
    ConversionError,
    Graph,
    PatternError,
    SparseEmbedding,
    SparseEmbeddingBag,
    SparseLinear,
    split,
)

# torch's own notice on CSR matrices is about the caller's matrix here, not about us.
pytestmark = [
    pytest.mark.feature("matrices of other libraries"),
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR) tensor support"),
]

DENSE = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 3.0, 4.0]])


def unsorted_csr() -> scipy.sparse.csr_array:
    data, columns = np.array([1, 2, 3, 4, 5], np.float32), np.array([3, 1, 2, 3, 0])
    return scipy.sparse.csr_array((data, columns, np.array([0, 2, 2, 5])), shape=(3, 4))


def with_duplicates() -> torch.Tensor:
    places = torch.tensor([[2, 0, 2, 0, 2, 2], [0, 1, 3, 3, 2, 0]])
    parts = torch.tensor([2.0, 2.0, 4.0, 1.0, 3.0, 3.0])
    with torch.sparse.check_sparse_tensor_invariants():  # torch warns where nothing is said about the checks
        return torch.sparse_coo_tensor(places, parts, (3, 4))


class SparseTensor:
    """What torch-sparse's class of this name tells of a matrix, where that is not installed."""

    __module__ = "torch_sparse.tensor"

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix.to_sparse_csr()

    def coalesce(self) -> SparseTensor:
        return self

    def csr(self) -> tuple[torch.Tensor, ...]:
        return self.matrix.crow_indices(), self.matrix.col_indices(), self.matrix.values()

    def sparse_sizes(self) -> list[int]:
        return list(self.matrix.shape)


@pytest.mark.parametrize(
    "make",
    [
        unsorted_csr,
        lambda: scipy.sparse.coo_array(DENSE.numpy()),
        lambda: scipy.sparse.csc_matrix(DENSE.numpy()),
        DENSE.to_sparse_coo,
        with_duplicates,
        DENSE.to_sparse_csr,
        DENSE.to_sparse_csc,
        lambda: SparseTensor(DENSE),
    ],
    ids=[
        "unsorted csr", "scipy coo", "scipy csc", "torch coo", "torch coo with duplicates", "torch csr", "torch csc",
        "torch-sparse",
    ],
)  # fmt: skip
def test_split_and_layers(make: Callable[[], object]) -> None:
    matrix = make()
    pattern, values = split(matrix)
    pattern.check(values)
    assert torch.equal(pattern.to_dense(values), DENSE)
    layer = SparseLinear.from_sparse(matrix, bias=torch.ones(3))
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), x @ DENSE.T + 1)
    table = SparseEmbedding.from_sparse(matrix, padding_idx=1)
    assert torch.equal(table(torch.arange(3)), DENSE)
    bag = SparseEmbeddingBag.from_sparse(matrix)
    assert torch.equal(bag(torch.tensor([[0, 2]])), DENSE[[0, 2]].sum(0, keepdim=True))
    assert isinstance(layer.to_dense(), nn.Linear)
    sparsecore.explain(layer)


SQUARE = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [5.0, 0.0, 3.0]])


@pytest.mark.feature("graphs")
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize(
    "make",
    [
        lambda dense: dense.to_sparse_coo(),
        lambda dense: dense.to_sparse_csr(),
        lambda dense: dense.to_sparse_csc(),
        SparseTensor,
        lambda dense: scipy.sparse.coo_array(dense.cpu().numpy()),
    ],
    ids=["torch coo", "torch csr", "torch csc", "torch-sparse", "scipy coo"],
)
def test_graphs_of_other_libraries_and_back(make: Callable[[torch.Tensor], object], device: str) -> None:
    dense, x = SQUARE.to(device), torch.randn(3, 4, device=device)
    matrix = make(dense)
    graph = Graph.from_sparse(matrix)
    if not scipy.sparse.issparse(matrix):
        assert all(buffer.device == dense.device for buffer in graph.buffers())
    graph = graph.to(device)
    torch.testing.assert_close(graph(x), dense @ x)
    weights = graph.get_buffer("edge_weight")
    for back in (graph.pattern.to_csr(weights), graph.pattern.to_coo(weights)):
        assert torch.equal(back.to_dense(), dense)
        again = Graph.from_sparse(back, torch.float64)
        assert again.get_buffer("edge_weight").dtype == torch.float64
        torch.testing.assert_close(again(x.double()), dense.double() @ x.double())
    assert np.array_equal(graph.pattern.to("cpu").to_scipy(weights).toarray(), SQUARE.numpy())


@pytest.mark.parametrize("wrong", [SQUARE, DENSE.to_sparse_csr(), (SQUARE / 0).to_sparse_csr(), "edges"])
def test_what_is_no_graph(wrong: object) -> None:
    with pytest.raises(PatternError, match=r"expected a sparse|square matrix|NaN or infinite"):
        Graph.from_sparse(wrong)


def test_values_are_shared_with_coo_and_with_numpy() -> None:
    layer = SparseLinear(4, 3, density=0.5)
    matrix, array = layer.pattern.to_coo(layer.values.detach()), np.from_dlpack(layer.values.detach())
    with torch.no_grad():
        layer.values.fill_(7.0)
    assert (array == 7).all()
    assert (matrix.to_dense() == 7 * layer.pattern.to_mask()).all()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_layers_are_where_the_matrix_is(layout: torch.layout, device: str) -> None:
    dense = DENSE.to(device)
    matrix, x = dense.to_sparse(layout=layout), torch.randn(5, 4, device=device)
    layer = SparseLinear.from_sparse(matrix, bias=torch.ones(3, device=device))
    torch.testing.assert_close(layer(x), x @ dense.T + 1)
    assert torch.equal(SparseEmbedding.from_sparse(matrix)(torch.arange(3, device=device)), dense)
    bag = SparseEmbeddingBag.from_sparse(matrix)
    assert torch.equal(bag(torch.tensor([[0, 2]], device=device)), dense[[0, 2]].sum(0, keepdim=True))
    for module in (layer, bag):
        assert all(tensor.device == dense.device for tensor in module.state_dict().values())


@pytest.mark.parametrize("cols", [4, 200, 300, 70_000], ids=["uint8", "uint8 too", "int16", "int32"])
def test_a_layer_shares_no_index_with_what_it_was_made_of(cols: int) -> None:
    """Where the matrix has the narrowest types already, nothing needs another one; explorations write in place."""
    narrow = SparseLinear(cols, 20, density=0.25, bias=False)
    crow, col = narrow.pattern.crow, narrow.pattern.col
    wide = torch.sparse_csr_tensor(
        crow.to(torch.int32), col.to(torch.int32), narrow.values.detach(), (20, cols), check_invariants=True
    )
    for given in (narrow.weight, wide, narrow.weight.to_sparse_coo()):
        before = given.to_dense()
        layer = SparseLinear.from_sparse(given)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        explorer = sparsecore.DynamicSparsity(layer, optimizer, interval=1, total_steps=9, drop_fraction=0.5)
        for _ in range(3):
            layer(torch.randn(2, cols)).sum().backward()
            explorer.step()
        assert not torch.equal(layer.pattern.to_mask(), before != 0)
        assert torch.equal(given.to_dense(), before)
    narrow.check_invariants()
    pattern = sparsecore.Pattern.from_csr(crow, col, (20, cols))
    assert pattern.crow.data_ptr() != crow.data_ptr()
    assert pattern.col.data_ptr() != col.data_ptr()


def test_refusals() -> None:
    with pytest.raises(
        PatternError, match="expected a sparse matrix of torch, scipy or torch-sparse, got ndarray"
    ):
        split(DENSE.numpy())
    with pytest.raises(PatternError, match="got 2-D with layout"):
        split(DENSE)
    with pytest.raises(PatternError, match="of two dimensions, got 1"):
        split(scipy.sparse.coo_array(np.array([1.0, 0.0, 2.0])))
    with pytest.raises(PatternError, match=r"no numbers of type longdouble|no numbers of type float128"):
        split(scipy.sparse.csr_array(DENSE.numpy().astype(np.longdouble)))
    layer = SparseLinear.from_sparse(DENSE.to_sparse_csr())
    with pytest.raises(PatternError, match="no bfloat16"):
        layer.pattern.to_scipy(layer.values.to(torch.bfloat16))
    with pytest.raises(ConversionError, match="stores nothing"):
        SparseLinear.from_sparse(scipy.sparse.csr_array((3, 4), dtype=np.float32))
    with pytest.raises(ConversionError, match="bias must have shape"):
        SparseLinear.from_sparse(DENSE.to_sparse_csr(), bias=torch.ones(4))
    with pytest.raises(PatternError, match="padding row 2 must be empty"):
        SparseEmbedding.from_sparse(DENSE.to_sparse_csr(), padding_idx=2)


def test_blocks_are_stored_whole() -> None:
    square = torch.block_diag(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    for blocks in (square.to_sparse_bsr((2, 2)), square.to_sparse_bsc((2, 2))):
        pattern, values = split(blocks)
        pattern.check(values)
        assert pattern.nnz == 8  # the two zeros of the first block too
        assert torch.equal(pattern.to_dense(values), square)
    back = pattern.to_csr(values).to_sparse_bsr((2, 2))
    assert torch.equal(back.to_dense(), square)


@pytest.mark.parametrize("device", devices())
def test_other_libraries_share_the_values_without_a_copy(device: str) -> None:
    layer = SparseLinear.from_sparse(DENSE.to(device).to_sparse_csr())
    layer.set_encoding("csr")
    assert torch.equal(torch.from_numpy(layer.pattern.to_scipy(layer.values).toarray()), DENSE)
    if device == "cpu":
        assert layer.pattern.to_scipy(layer.values).data.ctypes.data == layer.values.data_ptr()
    assert layer.pattern.to_csr(layer.values.detach()).values().data_ptr() == layer.values.data_ptr()
    for tensor in (layer.values.detach(), layer.crow_indices, layer.col_indices):
        assert torch.from_dlpack(torch.to_dlpack(tensor)).data_ptr() == tensor.data_ptr()
