"""MultVAE's step as one graph: the same loss, batches of several sizes, explorations between steps."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import scipy.sparse
import torch
import torch._dynamo.testing

from recsys.models.base import Interactions
from recsys.models.multvae import MultVAE
from sparsecore import DynamicSparsity

pytestmark = pytest.mark.feature("torch.compile, whole graphs, exploring")


def batches(users: int) -> list[Interactions]:
    rng = np.random.default_rng(0)
    history = scipy.sparse.csr_array((rng.random((10 * users, 40)) < 0.2).astype(np.float32))
    return [Interactions.from_scipy(history[users * i : users * (i + 1)]) for i in range(10)]


def model(dropout: float) -> MultVAE:
    return MultVAE(40, 16, 6, dropout=dropout, density=0.3, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_multvae_trains_as_one_graph() -> None:
    torch._dynamo.reset()
    compiled, eager = model(0.5).eval(), model(0.5).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss = torch.compile(compiled.loss, backend=counter, fullgraph=True)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (compiled, eager)]
    explorers = [
        DynamicSparsity(m, optimizer, interval=5, total_steps=30, generator=torch.Generator().manual_seed(1))
        for m, optimizer in zip((compiled, eager), optimizers, strict=True)
    ]
    for step in range(30):  # without noise, so that the two can be compared
        batch = batches(30)[step % 10]
        for run, optimizer, explorer in zip((loss, eager.loss), optimizers, explorers, strict=True):
            optimizer.zero_grad()
            run(batch, step).backward()
            optimizer.step()
            explorer.step()
    assert counter.frame_count <= 2  # for one number of interactions, then for any
    for name, tensor in eager.state_dict().items():
        found = compiled.state_dict()[name]
        if tensor.is_floating_point():
            torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert torch.equal(found, tensor), name
    compiled.train()
    noisy = [float(loss(batches(30)[0], 30).detach()) for _ in range(2)]
    assert noisy[0] != noisy[1]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++ on the CPU")
@pytest.mark.filterwarnings("ignore:Skipping serialization")  # of torch 2.6's own compiler
def test_multvae_trains_in_generated_code() -> None:
    torch._dynamo.reset()
    models = model(0.5).eval(), model(0.5).eval()
    runs = torch.compile(models[0].loss, fullgraph=True), models[1].loss
    batch = batches(30)[0]
    for run, trained in zip(runs, models, strict=True):
        optimizer = torch.optim.Adam(trained.parameters(), lr=0.01)
        draw = torch.Generator().manual_seed(1)
        explorer = DynamicSparsity(trained, optimizer, interval=3, total_steps=9, generator=draw)
        for _ in range(9):
            optimizer.zero_grad()
            run(batch, 30).backward()
            optimizer.step()
            explorer.step()
    found = models[0].state_dict()
    for name, tensor in models[1].state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert torch.equal(found[name], tensor), name
    torch._dynamo.reset()
