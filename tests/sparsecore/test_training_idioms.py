"""The ways in which people train with torch: transforms, deferred initialisation, checkpoints, mixed precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import scipy.sparse
import torch
from devices import devices
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.utils.checkpoint import checkpoint

import sparsecore
from sparsecore import (
    DynamicSparsity,
    Graph,
    SparseConv2d,
    SparsecoreError,
    SparseEmbedding,
    SparseEmbeddingBag,
    SparseLinear,
    SparseModule,
    TopologyError,
)
from sparsecore.encoding import ENCODINGS

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IDS = torch.randint(50, (12,), generator=seeded())
LAYERS: dict[str, tuple[Callable[[], SparseModule], Tensor]] = {
    "linear": (
        lambda: SparseLinear(20, 30, density=0.3, bias_density=0.5, dtype=DOUBLE),
        torch.randn(12, 20, dtype=DOUBLE),
    ),
    "embedding": (lambda: SparseEmbedding(50, 20, density=0.3, dtype=DOUBLE, padding_idx=2), IDS),
    "bag": (lambda: SparseEmbeddingBag(50, 20, density=0.3, dtype=DOUBLE), IDS.view(4, 3)),
    "conv": (
        lambda: SparseConv2d(4, 6, 3, padding=1, density=0.3, dtype=DOUBLE),
        torch.randn(3, 4, 8, 8, dtype=DOUBLE),
    ),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


@every_layer
@pytest.mark.feature("torch.func.grad, first and second order")
def test_functional_gradients_of_first_and_second_order(kind: str) -> None:
    make, x = LAYERS[kind]
    module = make()
    names = dict(module.named_parameters())
    plain = {name: p.detach() for name, p in names.items()}
    along = {name: torch.randn_like(p) for name, p in plain.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(module, parameters, (x,)).sin().sum()

    def slope(parameters: dict[str, Tensor]) -> Tensor:
        found = grad(loss)(parameters)
        return sum((found[name] * along[name]).sum() for name in along)  # type: ignore[return-value]

    first = torch.autograd.grad(loss(names), list(names.values()), create_graph=True)
    directed = sum((g * along[name]).sum() for g, name in zip(first, names, strict=True))
    second = torch.autograd.grad(directed, list(names.values()))
    by_transform, twice = grad(loss)(plain), grad(slope)(plain)
    for name, once, other in zip(names, first, second, strict=True):
        torch.testing.assert_close(by_transform[name], once)
        torch.testing.assert_close(twice[name], other)
    if x.is_floating_point():
        torch.testing.assert_close(
            grad(lambda x: module(x).sin().sum())(x),
            torch.autograd.grad(module(y := x.clone().requires_grad_()).sin().sum(), y)[0],
        )


@every_layer
@pytest.mark.feature("torch.func.vjp")
def test_what_vjp_returns_can_be_called(kind: str) -> None:
    make, x = LAYERS[kind]
    module = make()
    names = dict(module.named_parameters())

    def call(parameters: dict[str, Tensor], x: Tensor = x) -> Tensor:
        return functional_call(module, parameters, (x,))

    plain = {name: p.detach() for name, p in names.items()}
    y, back = vjp(call, plain)
    along = torch.randn_like(y)
    found = back(along)[0]
    expected = torch.autograd.grad(module(x), list(names.values()), along)
    for name, right in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], right)
    if x.is_floating_point():
        of_input = vjp(lambda x: call(plain, x), x)[1](along)[0]
        start = x.clone().requires_grad_()
        torch.testing.assert_close(of_input, torch.autograd.grad(module(start), start, along)[0])


def test_vmap_says_that_it_cannot() -> None:
    layer = SparseLinear(4, 4, density=0.5)
    with pytest.raises(RuntimeError, match="does not have vmap support"):
        vmap(layer)(torch.ones(2, 3, 4))


@every_layer
@pytest.mark.feature("meta device, deferred initialisation")
def test_deferred_initialisation(kind: str) -> None:
    make, x = LAYERS[kind]
    trained = make()
    for assign in (False, True):
        with torch.device("meta"):
            module = make()
        assert all(tensor.is_meta for tensor in module.state_dict().values())
        assert module.nnz == trained.nnz
        if not assign:
            module = module.to_empty(device="cpu")
            with pytest.raises(SparsecoreError, match=r"no index set yet: after to_empty"):
                module(x)
            for part in module.modules():
                part._forward_pre_hooks.clear()
            module(x)  # whatever the memory held, nothing is read out of place
        module.load_state_dict(trained.state_dict(), assign=assign)
        module.check_invariants()
        torch.testing.assert_close(module(x), trained(x))


@every_layer
@pytest.mark.feature("meta device, deferred initialisation")
def test_emptying_a_module_that_had_an_index_set(kind: str) -> None:
    make, x = LAYERS[kind]
    module, trained = make().to_empty(device="cpu"), make()
    with pytest.raises(SparsecoreError, match=r"no index set yet: after to_empty"):
        module(x)
    module.load_state_dict(trained.state_dict())
    module.check_invariants()
    torch.testing.assert_close(module(x), trained(x))


@pytest.mark.feature("meta device, deferred initialisation")
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_graph_keeps_its_edges_through_deferred_initialisation(symmetric: bool) -> None:
    """They are data: no state has them, and nothing would fill them in."""
    matrix = scipy.sparse.random_array((30, 30), density=0.2, rng=5, dtype="float32")
    x = torch.randn(30, 3)
    with torch.device("meta"):
        graph = Graph.from_scipy(matrix + matrix.T if symmetric else matrix)
    expected = graph(x)
    assert torch.equal(graph.to_empty(device="cpu")(x), expected)
    torch.testing.assert_close(graph.to(torch.float64)(x.double()).float(), expected)
    graph.to("meta")
    with pytest.raises(SparsecoreError, match="make it anew"):
        graph.to_empty(device="cpu")


@every_layer
@pytest.mark.feature("meta device, deferred initialisation")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_deferred_initialisation_without_a_checkpoint(kind: str, encoding: str) -> None:
    make, x = LAYERS[kind]
    with torch.device("meta"):
        module = make()
    module = module.to_empty(device="cpu")
    module.set_encoding(encoding)
    assert not module.has_index
    nn.init.normal_(module.values)
    with pytest.raises(SparsecoreError, match="no index set yet"):
        copy.deepcopy(module)(x)
    with pytest.raises(TopologyError, match="has no index set yet: after to_empty"):
        DynamicSparsity(module, torch.optim.SGD(module.parameters(), lr=0.1), total_steps=9)
    module.reset_parameters(seeded(7))  # type: ignore[operator]
    assert not module._forward_pre_hooks
    module.check_invariants()
    other = make()
    other.set_encoding(encoding)
    before = other.pattern.to_mask()
    other.reset_parameters(seeded(8))  # type: ignore[operator]
    assert torch.equal(before, other.pattern.to_mask())  # one that is there stays
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    explorer = DynamicSparsity(module, optimizer, interval=1, total_steps=9, drop_fraction=0.5)
    for _ in range(3):
        module(x).sin().sum().backward()
        explorer.step()
    module.check_invariants()
    assert module(x).abs().max() > 0


@every_layer
@pytest.mark.feature("meta device, deferred initialisation")
def test_shapes_without_data(kind: str) -> None:
    make, x = LAYERS[kind]
    with torch.device("meta"):
        module = make()
    y = module(x.to("meta"))
    assert y.is_meta
    assert y.shape == make()(x).shape
    y.sum().backward()
    assert module.values.grad is not None
    assert module.values.grad.shape == module.values.shape


def test_a_table_on_the_meta_device_costs_nothing() -> None:
    with torch.device("meta"):
        table = SparseEmbedding(1 << 40, 64, density=0.25)
    assert table.nnz == 1 << 44


@every_layer
@pytest.mark.feature("activation checkpointing")
def test_recomputed_activations(kind: str) -> None:
    make, x = LAYERS[kind]
    module = make()
    module(x).sin().sum().backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    checkpoint(module, x, use_reentrant=False).sin().sum().backward()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name  # type: ignore[arg-type]


@pytest.mark.feature("gradient accumulation, clipping")
def test_micro_batches_with_clipping_explore_like_one_batch() -> None:
    def train(parts: int) -> dict[str, Tensor]:
        model = nn.Sequential(
            SparseLinear(20, 40, density=0.3, dtype=DOUBLE, generator=seeded()),
            nn.Tanh(),
            SparseLinear(40, 5, density=0.3, dtype=DOUBLE, generator=seeded(1)),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        explorer = DynamicSparsity(model, optimizer, interval=4, total_steps=40, generator=seeded(2))
        for step in range(40):
            x = torch.randn(12, 20, dtype=DOUBLE, generator=seeded(100 + step))
            for part in x.chunk(parts):
                (model(part).square().mean() / parts).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            explorer.step()
            optimizer.zero_grad()
        return model.state_dict()

    whole, parts = train(1), train(3)
    for name, tensor in whole.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(parts[name], tensor)
        else:
            assert torch.equal(parts[name], tensor), name


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    return sparsecore.sparsify(model, density=0.3)


def learns(model: nn.Module, optimizer: torch.optim.Optimizer, logits: Callable[[Tensor], Tensor]) -> None:
    """Sixty steps of a classifier: the loss falls to less than 0.6 of it, and weights are exchanged."""
    explorer = DynamicSparsity(model, optimizer, interval=5, total_steps=60)
    x = torch.randn(64, 20).to(next(model.parameters()).device)
    losses, exchanged = [], 0
    for _ in range(60):
        loss = nn.functional.cross_entropy(logits(x), x[:, :5].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report = explorer.step()
        losses.append(loss.item())
        exchanged += 0 if report is None else report.grown - report.regrown
    assert losses[-1] < 0.6 * losses[0]
    assert exchanged > 0


@pytest.mark.feature("autocast")
def test_autocast_trains_and_explores() -> None:
    model = small_model()

    def logits(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    learns(model, torch.optim.Adam(model.parameters(), lr=0.01), logits)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.feature("float16 and bfloat16 weights")
def test_weights_of_sixteen_bits_train_and_explore(dtype: torch.dtype, device: str) -> None:
    model = small_model().to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    learns(model, optimizer, lambda x: model(x.to(dtype)).float())
    for module in model.modules():
        if isinstance(module, SparseModule):
            module.check_invariants()
            assert module.values.dtype == dtype


@pytest.mark.feature("share_memory")
def test_shared_memory() -> None:
    layer = SparseLinear(20, 30, density=0.3).share_memory()
    assert all(tensor.is_shared() for tensor in layer.state_dict().values())


def _train_elsewhere(layer: SparseLinear, x: Tensor, seen: Any) -> None:
    seen.put(layer(x).detach().numpy())  # not a tensor, whose memory would go with this process
    with torch.no_grad():
        layer.values.mul_(2)


@pytest.mark.feature("share_memory")
def test_another_process_reads_and_writes_shared_values() -> None:
    layer, x = SparseLinear(20, 30, bias=False, density=0.3).share_memory(), torch.randn(4, 20)
    before = layer(x).detach()
    context = torch.multiprocessing.get_context("spawn")
    seen = context.SimpleQueue()
    other = context.Process(target=_train_elsewhere, args=(layer, x, seen), daemon=True)
    other.start()
    other.join(timeout=300)  # kernels may have to be compiled
    assert other.exitcode == 0
    torch.testing.assert_close(torch.from_numpy(seen.get()), before)
    torch.testing.assert_close(layer(x).detach(), 2 * before)


@pytest.mark.feature("torch.func.grad, first and second order")
@pytest.mark.parametrize("detached", [True, False])
def test_growth_is_scored_by_functional_gradients(detached: bool) -> None:
    grown = []
    for functional in (True, False):
        layer = SparseLinear(12, 9, density=0.3, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        explorer = sparsecore.DynamicSparsity(layer, optimizer, interval=1, total_steps=10)
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
        if functional:
            names = {k: p.detach() if detached else p for k, p in layer.named_parameters()}
            found = grad(lambda p, x=x, layer=layer: functional_call(layer, p, (x,)).square().sum())(names)
            for name, parameter in layer.named_parameters():
                parameter.grad = found[name].detach()
        else:
            layer(x).square().sum().backward()
        optimizer.step()
        assert explorer.step() is not None
        grown.append(layer.pattern.positions())
    assert torch.equal(*grown)
