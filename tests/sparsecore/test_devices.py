"""The backends of a GPU on whatever device there is: the same tests on the CPU and, marked ``gpu``, on CUDA."""

from __future__ import annotations

import pytest
import scipy.sparse
import torch
from devices import devices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsecore

CASES = [pytest.param(*p.values, name, marks=p.marks) for name in ("torch", "triton") for p in devices(name)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.table = sparsecore.SparseEmbedding(30, 16, padding_idx=1, density=0.3, generator=g)
        self.bag = sparsecore.SparseEmbeddingBag(30, 16, density=0.3, generator=g)
        self.linear = sparsecore.SparseLinear(16, 12, density=0.3, bias_density=0.5, generator=g)
        self.graph = sparsecore.Graph.from_scipy(scipy.sparse.random_array((30, 30), density=0.2, rng=0))

    def forward(self, ids: Tensor) -> Tensor:
        hops = sparsecore.propagate_mean(self.graph, self.table, 2)
        return self.linear(torch.tanh(self.table(ids).sum(1) + self.bag(ids) + hops[ids[:, 0]]))


@pytest.mark.parametrize(("device", "backend"), CASES)
@pytest.mark.feature("training and exploring equals masked dense training, on a device")
def test_training_equals_masked_dense(device: str, backend: str) -> None:
    """All operations, gradients, explorations and optimizer state on the device, in float64, against dense tensors."""
    ids = torch.randint(0, 30, (6, 3), generator=torch.Generator().manual_seed(2)).to(device)
    sparse, dense = Model().double().to(device), Model().double().to(device)
    masks = sparsecore.masks_of(dense)
    sparsecore.densify(dense)
    settings: dict = {"interval": 3, "total_steps": 12, "drop_fraction": 0.4}
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (sparse, dense)]
    explorers = [
        sparsecore.DynamicSparsity(
            sparse, optimizers[0], generator=torch.Generator().manual_seed(1), **settings
        ),
        sparsecore.MaskedSparsity(
            dense, optimizers[1], masks, generator=torch.Generator().manual_seed(1), **settings
        ),
    ]
    with sparsecore.backend(backend):
        for _ in range(12):
            for model, optimizer, explorer in zip((sparse, dense), optimizers, explorers, strict=True):
                optimizer.zero_grad()
                model(ids).square().sum().backward()
                optimizer.step()
                explorer.step()
    final = sparsecore.masks_of(sparse)
    for name, mask in explorers[1].masks.items():  # type: ignore[union-attr]
        assert torch.equal(final[name], mask), name
        assert final[name].device.type == device
    sparsecore.densify(sparse)
    torch.testing.assert_close(
        {n: p.detach() for n, p in sparse.named_parameters()}, {n: p.detach() for n, p in dense.named_parameters()},
        rtol=1e-9, atol=1e-12,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.feature("models moved to a GPU")
def test_devices_agree_and_numba_is_refused_on_cuda() -> None:
    model = Model()
    ids = torch.randint(0, 30, (6, 3))
    expected = model(ids)
    moved = model.to("cuda")(ids.to("cuda"))
    torch.testing.assert_close(moved.cpu(), expected, rtol=1e-4, atol=1e-5)
    with sparsecore.backend("numba"), pytest.raises(sparsecore.SparsecoreError, match="runs on the CPU"):
        model(ids.to("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("encoding", ["csr", "bitmap"])
@pytest.mark.feature("CUDA graphs, exploring between replays")
def test_steps_of_a_cuda_graph_between_explorations(encoding: str) -> None:
    """Steps are replayed, those that explore are not: the graph reads the index sets that they have rewritten."""
    batches = [
        torch.randint(30, (20, 3), generator=torch.Generator().manual_seed(i)).cuda() for i in range(4)
    ]

    def begin() -> tuple[Model, torch.optim.Optimizer, sparsecore.DynamicSparsity]:
        model = Model().cuda()
        for module in model.modules():
            if isinstance(module, sparsecore.SparseModule):
                module.set_encoding(encoding)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True, capturable=True)
        return model, optimizer, sparsecore.DynamicSparsity(
            model, optimizer, interval=5, total_steps=100, generator=torch.Generator().manual_seed(1)
        )  # fmt: skip

    def train(model: Model, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()

    eager, captured = begin(), begin()
    side, graph, place = torch.cuda.Stream(), torch.cuda.CUDAGraph(), batches[0].clone()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(*captured[:2], place)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        train(*eager[:2], place)
    captured[1].zero_grad()
    with torch.cuda.graph(graph):
        train(*captured[:2], place)
    for step in range(1, 18):
        ids = batches[step % 4]
        train(*eager[:2], ids)
        place.copy_(ids)
        if captured[2].explores_next:
            train(*captured[:2], place)
        else:
            graph.replay()
        reports = eager[2].step(), captured[2].step()
        assert (reports[0] is None) == (reports[1] is None) == bool(step % 5)
    for mine, theirs in zip(captured[0].parameters(), eager[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    for name, buffer in captured[0].named_buffers():
        assert torch.equal(buffer, dict(eager[0].named_buffers())[name]), name


# ---------------------------------------------------------------- how people train on a GPU


def trained(model: Model, device: str, ids: Tensor, **idioms: bool) -> list[Tensor]:
    """Outputs of 6 steps, two of which explore."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    explorer = sparsecore.DynamicSparsity(
        model,
        optimizer,
        interval=3,
        total_steps=6,
        drop_fraction=0.4,
        generator=torch.Generator().manual_seed(1),
    )
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if idioms.get("compiled") else model
    outputs = []
    for _ in range(6):
        optimizer.zero_grad()
        parts = ids.split(3) if idioms.get("in_parts") else (ids,)
        y = torch.cat(
            [
                checkpoint(forward, part, use_reentrant=False) if idioms.get("recomputed") else forward(part)
                for part in parts
            ]
        )
        y.square().sum().backward()
        if idioms.get("clipped"):
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
        explorer.step()
        outputs.append(y.detach())
    return outputs


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("idiom", ["compiled", "recomputed", "clipped", "in_parts"])
@pytest.mark.feature("compile, checkpointing, clipping, micro-batches on a device")
def test_idioms_change_nothing(device: str, idiom: str) -> None:
    torch._dynamo.reset()
    ids = torch.randint(0, 30, (6, 3), generator=torch.Generator().manual_seed(2)).to(device)
    plain, other = Model().double().to(device), Model().double().to(device)
    expected, found = trained(plain, device, ids), trained(other, device, ids, **{idiom: True})
    torch.testing.assert_close(found, expected)
    for name, mask in sparsecore.masks_of(plain).items():
        assert torch.equal(sparsecore.masks_of(other)[name], mask), name
    torch._dynamo.reset()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.feature("mixed precision on a device")
def test_mixed_precision(device: str, dtype: torch.dtype) -> None:
    """A dense layer gives sparse ones 16-bit numbers; they add up in float32; losses are scaled; index sets move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), sparsecore.SparseLinear(20, 300, density=0.3), nn.ReLU())
    model = model.append(sparsecore.SparseLinear(300, 4, density=0.3)).to(device)
    x = torch.randn(8, 12, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    explorer = sparsecore.DynamicSparsity(model, optimizer, interval=3, total_steps=9)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    with torch.autocast(device, dtype):
        hidden = model[0](x)
        assert hidden.dtype is dtype
        product = model[1](hidden)
    assert product.dtype is torch.float32
    torch.testing.assert_close(product, model[1](hidden.float()), rtol=1e-5, atol=1e-5)
    losses = []
    for _ in range(9):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = (model(x).float() - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        explorer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for module in (model[1], model[3]):
        module.check_invariants()
        assert module.values.grad.dtype is torch.float32


@pytest.mark.parametrize("device", devices())
@pytest.mark.feature("torch.func on a device")
def test_functional_gradients(device: str) -> None:
    ids = torch.randint(0, 30, (6, 3), generator=torch.Generator().manual_seed(2)).to(device)
    model = Model().double().to(device)
    names = dict(model.named_parameters())
    plain = {name: p.detach() for name, p in names.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (ids,)).sin().sum()

    expected = torch.autograd.grad(model(ids).sin().sum(), list(names.values()))
    once = torch.func.grad(loss)(plain)
    value, back = torch.func.vjp(loss, plain)
    for name, right in zip(names, expected, strict=True):
        torch.testing.assert_close(once[name], right)
        torch.testing.assert_close(back(torch.ones_like(value))[0][name], right)
