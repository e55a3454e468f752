"""Inference models through torch.export: any batch size, saved, and loaded again."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse
import torch
from devices import devices
from torch import Tensor, nn
from torch.export import Dim

import sparsecore
from sparsecore import SparseConv2d, SparseEmbedding, SparseEmbeddingBag, SparseLinear
from sparsecore.encoding import ENCODINGS

pytestmark = pytest.mark.feature("torch.export")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Served(nn.Module):
    """A function of a sparse module, as something to export."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self.module, *inputs)


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(50, shape, generator=seeded(seed))


def bags(entries: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.arange(number) * entries // number
    return ids(entries), offsets, torch.rand(entries, generator=seeded(1))


N, M = Dim("n"), Dim("m")
Case = tuple[
    Callable[[], sparsecore.SparseModule], Callable[..., Any], tuple[Any, ...], list[tuple[Tensor, ...]]
]
CASES: dict[str, Case] = {
    "linear": (
        lambda: SparseLinear(20, 30, density=0.3, bias_density=0.5, generator=seeded()),
        lambda layer, x: layer(x),
        ({0: N},),
        [(torch.randn(n, 20, generator=seeded(n)),) for n in (4, 9, 1)],
    ),
    "embedding": (
        lambda: SparseEmbedding(50, 20, density=0.3, padding_idx=2, generator=seeded()),
        lambda table, ids: table(ids),
        ({0: N, 1: M},),
        [(ids(4, 3),), (ids(9, 5),), (ids(1, 2),)],
    ),
    "bags of one size": (
        lambda: SparseEmbeddingBag(50, 20, density=0.3, generator=seeded()),
        lambda bag, ids: bag(ids),
        ({0: N, 1: M},),
        [(ids(4, 3),), (ids(9, 5),), (ids(1, 2),)],
    ),
    "convolution": (
        lambda: SparseConv2d(4, 6, 3, padding=1, density=0.3, generator=seeded()),
        lambda layer, x: layer(x),
        ({0: N},),
        [(torch.randn(n, 4, 8, 8, generator=seeded(n)),) for n in (4, 9, 1)],
    ),
    "the best of a catalogue": (
        lambda: SparseEmbedding(50, 20, density=0.3, generator=seeded()),
        lambda table, queries: sparsecore.score_topk(queries, table, 7),
        ({0: N},),
        [(torch.randn(n, 20, generator=seeded(n)),) for n in (4, 9, 1)],
    ),
    "bags with offsets": (
        lambda: SparseEmbeddingBag(50, 20, density=0.3, generator=seeded()),
        lambda bag, ids, offsets, weights: bag(ids, offsets, per_sample_weights=weights),
        ({0: N}, {0: M}, {0: N}),
        [bags(12, 4), bags(31, 7), bags(3, 1)],
    ),
    "scores of pairs": (
        lambda: SparseEmbedding(50, 20, density=0.3, generator=seeded()),
        lambda table, users, items: sparsecore.gather_dot(table, users, table, items),
        ({0: N}, {0: N, 1: M}),
        [(ids(4), ids(4, 3, seed=1)), (ids(9), ids(9, 5, seed=1)), (ids(1), ids(1, 2, seed=1))],
    ),
}


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("case", CASES)
def test_inference_with_dynamic_shapes(case: str, encoding: str, device: str) -> None:
    make, run, shapes, batches = CASES[case]
    batches = [tuple(tensor.to(device) for tensor in inputs) for inputs in batches]
    module = make().to(device)
    module.set_encoding(encoding)
    program = torch.export.export(Served(module, run).eval(), batches[0], dynamic_shapes=(shapes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for inputs in batches:
        expected = run(module, *inputs)
        for served in (program.module(), loaded):
            exact = (
                {"rtol": 0, "atol": 0} if device == "cpu" else {}
            )  # elsewhere torch multiplies as it likes
            torch.testing.assert_close(served(*inputs), expected, **exact)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("some", [False, True], ids=["all nodes", "some nodes"])
def test_hops_of_a_graph(some: bool, encoding: str) -> None:
    edges = scipy.sparse.random_array((20, 30), density=0.2, rng=0)
    graph = sparsecore.normalized_bipartite(edges)
    table = SparseEmbedding(50, 20, density=0.3, generator=seeded())
    table.set_encoding(encoding)
    model = nn.ModuleDict({"graph": graph, "table": table})

    def run(model: Any, *rows: Tensor) -> Tensor:
        return sparsecore.propagate_mean(model["graph"], model["table"], 2, *rows)

    inputs = [(ids(n),) for n in (4, 9, 1)] if some else [()]
    few = Dim("few", max=25)  # more than half of the nodes are hops of all
    shapes: Any = (({0: few},),) if some else None
    program = torch.export.export(Served(model, run).eval(), inputs[0], dynamic_shapes=shapes)
    for given in inputs:
        assert torch.equal(program.module()(*given), run(model, *given))


def test_a_file_needs_the_operators_which_the_import_brings(tmp_path: Path) -> None:
    """As the README says: without `import sparsecore` torch's error does not say what to do."""
    layer = SparseLinear(6, 5, density=0.5)
    x = torch.randn(3, 6)
    file = tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(layer, (x,), dynamic_shapes=({0: N},)), file)
    torch.save((x, layer(x).detach()), tmp_path / "example.pt")
    program = f"""
import sys, torch
assert "sparsecore" not in sys.modules
try:
    torch.export.load({str(file)!r})
except Exception as error:
    print(error)
import sparsecore
x, y = torch.load({str(tmp_path / "example.pt")!r})
assert torch.equal(torch.export.load({str(file)!r}).module()(x), y)
print("loaded")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # torch 2.6 names the operator, too.
    assert "error when deserializing the saved file" in done.stdout or "Failed deserializing" in done.stdout
    assert done.stdout.endswith("loaded\n")


@pytest.mark.parametrize("strict", [False, True])
def test_a_table_with_sparse_gradients_is_exported_frozen_or_without_strict(strict: bool) -> None:
    table = SparseEmbedding(50, 20, density=0.3, sparse=True, generator=seeded()).requires_grad_(not strict)
    program = torch.export.export(table, (ids(4),), dynamic_shapes=({0: N},), strict=strict)
    assert torch.equal(program.module()(ids(9, seed=1)), table(ids(9, seed=1)))
