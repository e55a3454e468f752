"""Compiled models: whole graphs, the same numbers, and explorations between steps without compiling again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse
import torch
import torch._dynamo.testing
from devices import devices
from torch import Tensor, nn

import sparsecore
from sparsecore import (
    DynamicSparsity,
    SparseConv2d,
    SparseEmbedding,
    SparseEmbeddingBag,
    SparseLinear,
    SparseModule,
)

pytestmark = pytest.mark.feature("torch.compile, whole graphs, exploring")

IDS = torch.randint(50, (12,), generator=torch.Generator().manual_seed(0))
X = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
PICTURES = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _linear() -> nn.Module:
    return SparseLinear(20, 300, density=0.3, generator=_seeded())


class Hops(nn.Module):
    """The mean of some hops over a graph, at the nodes that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        matrix = scipy.sparse.random_array((20, 30), density=0.2, rng=0)
        self.graph = sparsecore.normalized_bipartite(scipy.sparse.csr_array(matrix))
        self.table = SparseEmbedding(50, 20, density=0.3, generator=_seeded())

    def forward(self, ids: Tensor) -> Tensor:
        whole = sparsecore.propagate_mean(self.graph, self.table, 2)
        return whole[ids] + sparsecore.propagate_mean(self.graph, self.table, 2, ids)


class Bags(nn.Module):
    """Bags of several sizes, one of them empty, with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = SparseEmbeddingBag(50, 20, density=0.3, generator=_seeded())

    def forward(self, ids: Tensor) -> Tensor:
        offsets = torch.tensor([0, 5, 5, 6], device=ids.device)
        weights = ids.to(torch.float32) / 50
        return self.bag(ids, offsets) + self.bag(ids, offsets, per_sample_weights=weights)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (_linear, X),
    "embedding": (lambda: SparseEmbedding(50, 20, density=0.3, padding_idx=3, generator=_seeded()), IDS),
    "accumulating": (
        lambda: SparseEmbedding(50, 20, density=0.3, accumulate_rows=30, generator=_seeded()),
        IDS,
    ),
    "bag": (lambda: SparseEmbeddingBag(50, 20, density=0.3, generator=_seeded()), IDS.view(4, 3)),
    "bags with offsets": (Bags, IDS),
    "mean of hops": (Hops, IDS),
    "conv": (lambda: SparseConv2d(4, 6, 3, padding=1, density=0.3, generator=_seeded()), PICTURES),
}


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(model: nn.Module, forward: Callable[..., Any], x: Tensor, steps: int = 12) -> list[Any]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    explorer = DynamicSparsity(model, optimizer, interval=3, total_steps=steps, generator=_seeded())
    reports = []
    for _ in range(steps):
        optimizer.zero_grad()
        results = forward(x)
        of_all = results if isinstance(results, tuple) else (results,)
        torch.stack([result.square().sum() for result in of_all]).sum().backward()
        optimizer.step()
        reports.append(explorer.step())
    return [report for report in reports if report is not None]


def same_as_eager(make: Callable[[], nn.Module], x: Tensor, backend: str) -> None:
    compiled, eager = make(), make()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    found = train(compiled, torch.compile(compiled, backend=counter, fullgraph=True), x)
    expected = train(eager, eager, x)
    assert counter.frame_count == 1, "explorations must not compile anew"
    assert found == expected
    assert sum(layer.grown - layer.regrown for report in found for layer in report.layers.values()) > 0
    for name, tensor in eager.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(compiled.state_dict()[name], tensor, msg=name)
        else:
            assert torch.equal(compiled.state_dict()[name], tensor), name


@pytest.mark.parametrize("encoding", ["csr", "bitmap"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_one_graph_that_outlives_explorations(kind: str, encoding: str) -> None:
    make, x = LAYERS[kind]

    def encoded() -> nn.Module:
        module = make()
        for part in module.modules():
            if isinstance(part, SparseModule):
                part.set_encoding(encoding)
        return module

    same_as_eager(encoded, x, "aot_eager")


def _in_16_bits(kind: str, dtype: torch.dtype, **options: Any) -> None:
    """A training step of the compiled layer under autocast is that of the layer."""
    make, x = LAYERS[kind]
    steps = []
    for compiled in (True, False):
        layer = make()
        forward = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        # What comes before a layer under autocast has 16 bits.
        given = x.to(dtype) if x.is_floating_point() else x
        with torch.autocast("cpu", dtype):
            y = forward(given)
        y.square().sum().backward()
        steps.append((y.detach(), *(p.grad for p in layer.parameters())))
    for found, expected in zip(*steps, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)


@pytest.mark.feature("autocast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_under_autocast(kind: str, dtype: torch.dtype) -> None:
    _in_16_bits(kind, dtype)


@pytest.mark.feature("autocast")
def test_compiled_under_autocast_where_torch_casts_for_no_operator_of_others() -> None:
    """As torch 2.6, which has no ``torch.library.register_autocast``."""
    code = """
import torch
if hasattr(torch.library, "register_autocast"):
    del torch.library.register_autocast
from test_compile import _in_16_bits
for kind in ("linear", "bag"):
    _in_16_bits(kind, torch.bfloat16)
"""
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


class Everything(nn.Module):
    """A layer, bags, hops of a graph, products of pairs, a convolution, the best of a catalogue: the results of
    each. What is computed between them is little, for every loop of it is compiled by itself, which takes seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        make: dict[str, Any] = {"density": 0.3, "generator": _seeded()}
        self.table = SparseEmbedding(50, 20, padding_idx=3, accumulate_rows=30, **make)
        self.others = SparseEmbedding(50, 20, **make)
        self.bag, self.hops = SparseEmbeddingBag(50, 20, **make), Hops()
        self.conv = SparseConv2d(1, 4, 2, stride=2, bias=False, **make)
        self.linear = SparseLinear(20, 30, bias_density=0.5, **make)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        rows = self.table(ids)
        with torch.no_grad():
            best, _ = sparsecore.score_topk(rows, self.others, 5)
        pairs = sparsecore.gather_dot(self.others, ids, self.others, ids.flip(0))
        maps, bags = self.conv(rows.view(-1, 1, 4, 5)), self.bag(ids.view(4, 3))
        return self.linear(rows), self.hops(ids), pairs, maps, bags, best


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++ on the CPU")
@pytest.mark.filterwarnings("ignore:Skipping serialization")  # of torch 2.6's own compiler
@pytest.mark.parametrize("device", devices())
def test_generated_code_trains_as_torch_does(device: str) -> None:
    same_as_eager(lambda: Everything().to(device), IDS.to(device), "inductor")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++ on the CPU")
@pytest.mark.filterwarnings("ignore:Skipping serialization")  # of torch 2.6's own compiler
@pytest.mark.parametrize("device", devices())
def test_buffers_that_compiled_code_takes_back_are_not_what_was_recorded(device: str) -> None:
    """Generated code writes other numbers into the memory of activations as soon as an operator has read them."""

    def make() -> nn.Module:
        layers = [SparseLinear(20, 300, density=0.3, generator=_seeded()), nn.Tanh()]
        layers += [SparseLinear(300, 300, density=0.1, generator=_seeded()), nn.Tanh()]
        layers += [SparseLinear(300, 20, density=0.3, generator=_seeded())]
        return nn.Sequential(*layers).to(device)

    same_as_eager(make, X.to(device), "inductor")


def test_products_of_rows_compile_too() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = SparseEmbedding(50, 20, density=0.3, generator=_seeded())

        def forward(self, ids: Tensor) -> Tensor:
            return sparsecore.gather_dot(self.table, ids, self.table, ids.flip(0))

    same_as_eager(Scores, IDS, "aot_eager")


@pytest.mark.parametrize("encoding", ["csr", "bitmap"])
def test_the_best_of_a_catalogue_in_one_graph_that_outlives_explorations(encoding: str) -> None:
    table = SparseEmbedding(50, 20, density=0.3, generator=_seeded())
    table.set_encoding(encoding)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def best(queries: Tensor) -> tuple[Tensor, Tensor]:
        return sparsecore.score_topk(queries, table, 7)

    compiled = torch.compile(best, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.01)
    explorer = DynamicSparsity(table, optimizer, interval=1, total_steps=9, generator=_seeded())
    with torch.no_grad():
        before = compiled(X)
    torch.testing.assert_close(before, best(X))
    for _ in range(3):
        optimizer.zero_grad()
        (table(IDS) - 1).square().sum().backward()
        optimizer.step()
        explorer.step()
    with torch.no_grad():
        after = compiled(X)
    torch.testing.assert_close(after, best(X))
    assert not torch.equal(after[0], before[0])
    assert counter.frame_count == 1


def test_a_frozen_table_whose_gradient_would_be_sparse() -> None:
    table = SparseEmbedding(50, 20, density=0.3, sparse=True).requires_grad_(False)
    forward = torch.compile(table, backend="aot_eager", fullgraph=True)
    assert torch.equal(forward(IDS), table(IDS))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's, after a break
def test_a_table_with_sparse_gradients_breaks_the_graph_and_trains() -> None:
    results = []
    for compiled in (False, True):
        table = SparseEmbedding(50, 20, density=0.3, sparse=True, generator=_seeded())
        optimizer = sparsecore.optim.SGD(table.parameters(), lr=0.1)
        explorer = DynamicSparsity(table, optimizer, interval=2, total_steps=6, generator=_seeded())

        def loss(ids: Tensor, table: nn.Module = table) -> Tensor:
            return table(ids).square().sum()

        run = torch.compile(loss, backend="aot_eager") if compiled else loss
        for step in range(6):
            optimizer.zero_grad()
            run((IDS + step) % 50).backward()
            assert table.values.grad is not None
            assert table.values.grad.is_sparse
            optimizer.step()
            explorer.step()
        results.append((table.pattern.to_mask(), table.values.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's, after a break
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_step_that_is_compiled_with_its_backward_pass(sparse: bool, in_backward: bool) -> None:
    results = []
    for compiled in (False, True):
        table = SparseEmbedding(50, 20, density=0.3, sparse=sparse, generator=_seeded())
        optimizer = sparsecore.optim.Adam(table.parameters(), in_backward=in_backward)
        explorer = DynamicSparsity(table, optimizer, interval=2, total_steps=6, generator=_seeded())

        def step(ids: Tensor, table: nn.Module = table, optimizer: Any = optimizer) -> None:
            table(ids).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for count in range(4):
            run((IDS + count) % 50)
            explorer.step()
        results.append((table.pattern.to_mask(), table.values.detach()))
    (mask, values), (other, others) = results
    assert torch.equal(mask, other)
    torch.testing.assert_close(others, values)


def test_training_on_any_number_of_pairs_is_compiled_once() -> None:
    """The backward pass of a few pairs has a way of its own, which compiled code does not ask for."""
    table = SparseEmbedding(50, 64, density=0.3, generator=_seeded())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def loss(left: Tensor, right: Tensor) -> Tensor:
        return sparsecore.gather_dot(table, left, table, right).square().sum()

    for n in (10, 100, 3, 200):  # 640 to 12,800 numbers
        left, right = torch.randint(50, (2, n), generator=_seeded()).unbind()
        table.values.grad = None
        loss(left.clone(), right.clone()).backward()
        found, table.values.grad = table.values.grad, None
        sparsecore.gather_dot(table, left, table, right).square().sum().backward()
        torch.testing.assert_close(found, table.values.grad, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
