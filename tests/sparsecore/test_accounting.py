"""Exact counts of bytes and multiply-adds, the explanation of a model, and comparable times."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import scipy.sparse
import torch
from strategies import BACKENDS
from torch import nn

import sparsecore
from sparsecore import (
    DynamicSparsity,
    Graph,
    MacCounter,
    SparsecoreError,
    SparseEmbedding,
    SparseEmbeddingBag,
    SparseLinear,
    explain,
    resident_bytes,
    sparsify,
)
from sparsecore.measure import Timing, interleaved


def train_step(model: nn.Module, x: torch.Tensor) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    return optimizer


# ---------------------------------------------------------------- bytes


def test_resident_bytes_of_a_sparse_linear_with_adam() -> None:
    model = SparseLinear(300, 40, density=0.1)
    model.set_encoding("csr")
    optimizer = train_step(model, torch.ones(2, 300))
    nnz, bias = 1200, 40
    count = resident_bytes(model, optimizer)
    assert count.weights == count.gradients == 4 * (nnz + bias)
    assert count.indices == 4 * 41 + 2 * nnz  # int32 pointers, int16 columns
    assert (
        count.optimizer_state == 8 * (nnz + bias) + 2 * 4
    )  # two moments, and a step count for each parameter
    assert count.topology == count.other == 0
    assert count.total == 16 * (nnz + bias) + 8 + count.indices
    model.set_encoding("bitmap")
    assert (
        resident_bytes(model, optimizer).indices == 4 * 41 * 12
    )  # a pointer, ten words of bits and one of padding


def test_resident_bytes_of_sparse_gradients() -> None:
    """Place (int64) and value (float32) of every nonzero of the rows that were looked up."""
    table = SparseEmbedding(50, 8, density=0.5, sparse=True)
    ids = torch.tensor([3, 7, 3])
    table(ids).sum().backward()
    stored = int(table.pattern.crow.diff()[[3, 7]].sum())
    assert resident_bytes(table).gradients == stored * (8 + 4)


def test_resident_bytes_of_the_dense_counterpart() -> None:
    model = nn.Linear(300, 40)
    count = resident_bytes(model, train_step(model, torch.ones(2, 300)))
    assert count.total == 16 * (12000 + 40) + 8
    assert count.indices == 0


def test_resident_bytes_before_a_step_and_without_an_optimizer() -> None:
    model = SparseLinear(300, 40, bias=False, dtype=torch.float64, density=0.1)
    count = resident_bytes(model)
    assert (count.weights, count.gradients, count.optimizer_state) == (8 * 1200, 0, 0)


def test_shared_storage_counts_once_and_buffers_count_as_other() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = Graph(scipy.sparse.csr_array(np.array([[0, 1.0, 0], [1, 0, 0], [0, 0, 0]])))
            self.a = SparseEmbedding(3, 4, density=0.5)
            self.a.set_encoding("csr")
            self.b = self.a

    count = resident_bytes(Model())
    assert count.weights == 4 * 6
    assert count.indices == 4 * 4 + 6
    assert (
        count.other == 4 * 4 + 2 * 4 + 2 * 4
    )  # int32 pointers and columns, float32 weights of one direction


def test_several_optimizers_and_the_explorer() -> None:
    model = nn.Sequential(SparseLinear(20, 30, density=0.5), SparseLinear(30, 3, density=0.5))
    optimizers = [torch.optim.Adam(m.parameters()) for m in model]
    explorer = DynamicSparsity(model, optimizers, interval=10, total_steps=100)
    model(torch.ones(2, 20)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    explorer.step()
    count = resident_bytes(model, optimizers, explorer)
    assert count.optimizer_state == 8 * (300 + 30 + 45 + 3) + 4 * 4
    assert count.topology == 600 // 8 + -(-90 // 8)  # one history bit for each position


def test_accumulated_rows_belong_to_the_topology() -> None:
    table = SparseEmbedding(64, 16, density=0.5, accumulate_rows=8)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    explorer = DynamicSparsity(table, optimizer, interval=10, total_steps=100)
    table(torch.tensor([1, 5, 1])).sum().backward()
    assert resident_bytes(table, optimizer, explorer).topology == 64 * 16 // 8 + 2 * (8 + 16 * 4)


# ---------------------------------------------------------------- multiply-adds


def test_dense_bags_are_counted_as_sparse_ones_are() -> None:
    """torch counts them as free, which would flatter the dense baseline."""
    ids, offsets = torch.tensor([0, 3, 3, 1, 2]), torch.tensor([0, 2])
    for weighted in (False, True):
        weights = torch.ones(5, requires_grad=True) if weighted else None
        counts = {}
        for name, bag in (
            ("dense", nn.EmbeddingBag(4, 6, mode="sum")),
            ("sparse", SparseEmbeddingBag(4, 6, density=1.0)),
        ):
            counter = MacCounter()
            with counter.phase("forward"):
                out = bag(ids, offsets, weights)
            with counter.phase("backward"):
                out.sum().backward()
            counts[name] = counter.macs
            with torch.no_grad(), counter.phase("inference"):
                bag(ids, offsets, weights)
        assert counts["dense"] == {"forward": 30, "backward": 60 if weighted else 30, "inference": 30}
        assert counts["sparse"] == counts["dense"]


def test_phases_add_up_and_nothing_is_counted_outside() -> None:
    layer, x = SparseLinear(10, 8, bias=False, density=0.5), torch.ones(3, 10)
    counter = MacCounter()
    layer(x)
    for _ in range(2):
        with counter.phase("forward"):
            layer(x)
    with counter.phase("nothing"):
        torch.relu(x)
    assert counter.macs == {"forward": 2 * 3 * 40, "nothing": 0}
    assert counter.total == 240


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_a_network_costs_its_density(density: float) -> None:
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    sparsify(model, density)
    counter = MacCounter()
    with counter.phase("forward"):
        out = model(torch.ones(5, 20))
    with counter.phase("backward"):
        out.sum().backward()
    first, second = 5 * 320 * density, 5 * 64 * density
    assert counter.macs == {
        "forward": first + second,
        "backward": first + 2 * second,
    }  # the input needs no gradient


# ---------------------------------------------------------------- explain


def test_explain() -> None:
    model = nn.Sequential(nn.Linear(300, 40), nn.Linear(40, 8), nn.LayerNorm(8))
    sparsify(model, 0.1, exclude="1")
    model[0].set_encoding("csr")
    explanation = explain(model)
    (layer,) = explanation.layers
    assert (layer.name, layer.kind, layer.shape, layer.nnz) == ("0", "SparseLinear", (40, 300), 1200)
    assert layer.density == pytest.approx(0.1)
    assert layer.encoding == "csr int32/int16"
    assert layer.bytes == 4 * 1200 + 2 * 1200 + 4 * 41
    assert layer.dense_bytes == 4 * 12000
    assert layer.backend == BACKENDS[0]
    assert explanation.dense_parameters == 40 + 320 + 8 + 16
    with sparsecore.backend("torch"):
        assert explain(model).layers[0].backend == "torch"
    model[0].set_encoding("bitmap")
    (layer,) = explain(model).layers
    assert layer.encoding == "bitmap int32"
    assert layer.bytes == 4 * 1200 + 4 * 41 * 12


def test_explain_prints_a_table() -> None:
    model = nn.Sequential(nn.Linear(300, 40, bias=False))
    sparsify(model, 0.1)[0].set_encoding("csr")
    lines = str(explain(model)).splitlines()
    assert lines[0].split() == [
        "layer",
        "type",
        "shape",
        "nnz",
        "density",
        "indices",
        "bytes",
        "of",
        "dense",
        "backend",
    ]
    assert lines[1].split() == [
        "0", "SparseLinear", "40", "x", "300", "1,200", "0.1", "csr", "int32/int16", "7,364", "15%", BACKENDS[0],
    ]  # fmt: skip
    assert lines[1].index("SparseLinear") == lines[0].index("type")
    assert lines[2] == "parameters stored dense: 0"
    assert len(lines) == 3


def test_explain_covers_a_bare_layer_and_sparse_biases() -> None:
    layer = SparseLinear(6, 4, density=0.5, bias_density=0.5)
    names = [(e.name, e.kind) for e in explain(layer).layers]
    assert names == [("", "SparseLinear"), ("bias", "SparseBias")]
    assert "(model)" in str(explain(layer))


def test_explain_needs_a_sparse_weight() -> None:
    with pytest.raises(
        SparsecoreError, match=r"no sparse weight to explain; call sparsify\(model, density\) first"
    ):
        explain(nn.Linear(3, 3))


# ---------------------------------------------------------------- measure


def test_interleaved_takes_turns_and_rotates() -> None:
    calls: list[str] = []
    timings = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, least=4
    )
    assert "".join(calls) == "ab" + "abba" * 2  # one warm-up of each, then turns that begin with each in turn
    assert set(timings) == {"a", "b"}
    for timing in timings.values():
        assert isinstance(timing, Timing)
        assert timing.samples == 4
        assert 0 <= timing.minimum <= timing.median


def test_interleaved_restores_garbage_collection_even_after_an_error() -> None:
    def fail() -> None:
        if not gc.isenabled():
            raise RuntimeError("in the middle of a measurement")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="in the middle"):
        interleaved({"fail": fail}, seconds=0.0)
    assert gc.isenabled()
    with pytest.raises(SparsecoreError, match="nothing to time"):
        interleaved({})


@pytest.mark.parametrize("form", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_resident_bytes_of_a_sparse_buffer(form: str) -> None:
    model = nn.Module()
    adjacency = getattr(torch.eye(3), form)()
    model.register_buffer("adjacency", adjacency)
    indices = 3 * 2 * 8 if form == "to_sparse" else (4 + 3) * 8
    # torch makes the compressed forms in storages with some room to spare.
    assert indices + 3 * 4 <= resident_bytes(model).other <= indices + 64


def test_resident_bytes_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False))
    assert resident_bytes(model).weights == 80_000


def test_resident_bytes_know_the_results_that_are_kept() -> None:
    layer = SparseLinear(20, 20_000, density=0.05).requires_grad_(False)
    assert resident_bytes(layer).results == 0
    layer(torch.randn(200, 20))
    expected = 4 * 200 * 20_000 if sparsecore.backends.backend_name(torch.device("cpu")) == "numba" else 0
    assert resident_bytes(layer).results == expected
    assert resident_bytes(layer).total - resident_bytes(layer).weights >= expected
    sparsecore.release_results(layer)
    assert resident_bytes(layer).results == 0


def test_attention_and_products_with_a_vector_are_counted() -> None:
    q = torch.randn(3, 2, 50, 16, requires_grad=True)
    counter = MacCounter()
    with counter.phase("forward"):
        out = nn.functional.scaled_dot_product_attention(q, q, q)
    with counter.phase("backward"):
        out.sum().backward()
    product = 3 * 2 * 50 * 50 * 16
    assert counter.macs["forward"] == 2 * product
    assert counter.macs["backward"] >= 4 * product  # and the scores again, if they were not kept
    with counter.phase("vector"):
        torch.randn(5, 7) @ torch.randn(7)
    assert counter.macs["vector"] == 35
