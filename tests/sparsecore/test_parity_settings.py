"""The proof of test_parity in either encoding, with one thread and with more than there are cores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from strategies import of_numba
from test_parity import OPTIMIZERS, Small, interactions, train_both
from torch import Tensor, nn

from recsys.models.bprmf import BPRMF
from recsys.models.lightgcn import LightGCN
from recsys.models.triples import TripleSampler
from sparsecore import optim
from sparsecore.backends.numba import jit
from sparsecore.encoding import ENCODINGS
from sparsecore.nn.base import SparseModule

pytestmark = [of_numba, pytest.mark.feature("training and exploring equals masked dense training")]
STEPS = 60


@pytest.fixture(autouse=True)
def parallel(vectors: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the problem, neither the small kernels nor one thread."""
    monkeypatch.setattr(jit, "_SERIAL_WORK", 0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("model", ["bprmf", "lightgcn", "small"])
@pytest.mark.parametrize("optimizer", ["adam", "ours"])
def test_encodings_and_threads(model: str, encoding: str, threads: int, optimizer: str) -> None:
    torch.set_num_threads(threads)  # put back by the fixture of conftest.py
    data = interactions()
    sampler, draws = TripleSampler(data), torch.Generator().manual_seed(1)
    batches = [sampler.draw(32, draws) for _ in range(STEPS)]
    ids = torch.randint(13, (STEPS, 9, 4), generator=draws)

    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(3)
        if model == "small":
            made: nn.Module = Small(0.25, 3).double()
        elif model == "bprmf":
            made = BPRMF((40, 60), dim=10, density=0.3, generator=generator).double()
        else:
            made = LightGCN(data, dim=10, hops=2, density=0.3, generator=generator).double()
        for module in made.modules():
            if isinstance(module, SparseModule):
                module.set_encoding(encoding)
        return made

    def loss(made: nn.Module, step: int) -> Tensor:
        if model == "small":
            out: Tensor = made(ids[step], ids[step])
            return out.square().sum()
        return made.loss(batches[step], step)  # type: ignore[operator, no-any-return]

    make: Callable[..., torch.optim.Optimizer] = (
        OPTIMIZERS["adam"] if optimizer == "adam" else lambda p: optim.Adam(p, lr=0.01)
    )
    assert train_both(build, loss, make, STEPS, 10) > 50
