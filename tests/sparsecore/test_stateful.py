"""nnz is constant for every tensor, whatever is done to the model in whatever order."""

from __future__ import annotations

import io

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from strategies import BACKENDS
from torch import Tensor, nn

import sparsecore

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


class Model(nn.Module):
    def __init__(self, density: float, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.table = sparsecore.SparseEmbedding(
            23, 6, padding_idx=0, density=density, accumulate_rows=7, generator=g
        )
        self.bag = sparsecore.SparseEmbeddingBag(19, 6, density=density, generator=g)
        self.linear = sparsecore.SparseLinear(6, 11, density=density, bias_density=0.5, generator=g)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.table(ids).sum(1) + self.bag(ids)))


class Training(RuleBasedStateMachine):
    @initialize(
        density=st.sampled_from([0.02, 0.1, 0.5, 0.95, 1.0]),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        grow=st.sampled_from(["gradient", "random"]),
        rho=st.sampled_from([0.0, 0.2, 1.0]),
    )
    def begin(self, density: float, optimizer: str, grow: str, rho: float) -> None:
        self.density, self.optimizer_name, self.grow, self.rho = density, optimizer, grow, rho
        self.backend = "numba"
        self.random = torch.Generator().manual_seed(1)
        self.build()
        self.nnz = {name: p.numel() for name, p in self.model.named_parameters() if name.endswith("values")}
        self.identity = {name: id(p) for name, p in self.model.named_parameters()}

    def build(self) -> None:
        self.model = Model(self.density, seed=2).double()
        self.optimizer = OPTIMIZERS[self.optimizer_name](self.model.parameters())
        self.explorer = sparsecore.DynamicSparsity(
            self.model, self.optimizer, interval=2, drop_fraction=self.rho, schedule="constant",
            total_steps=1000, grow=self.grow, generator=torch.Generator().manual_seed(3),
        )  # fmt: skip

    @rule(count=st.integers(1, 3))
    def train(self, count: int) -> None:
        for _ in range(count):
            ids = torch.randint(0, 19, (4, 3), generator=self.random)
            with sparsecore.backend(self.backend):
                self.optimizer.zero_grad()
                (self.model(ids) - 1).square().sum().backward()
                self.optimizer.step()
                report = self.explorer.step()
            if report is not None:
                assert report.pruned == report.grown
                assert report.nnz == sum(self.nnz.values())

    @rule()
    def save_and_load(self) -> None:
        """Into new objects, through bytes; everything goes on from where it was."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        buffer = io.BytesIO()
        torch.save([part.state_dict() for part in (self.model, self.optimizer, self.explorer)], buffer)
        buffer.seek(0)
        states = torch.load(buffer, weights_only=True)
        self.build()
        for part, state in zip((self.model, self.optimizer, self.explorer), states, strict=True):
            part.load_state_dict(state)
        torch.testing.assert_close(self.model.state_dict(), before, rtol=0, atol=0)
        self.identity = {name: id(p) for name, p in self.model.named_parameters()}

    @rule(name=st.sampled_from(BACKENDS))
    def change_backend(self, name: str) -> None:
        self.backend = name

    @rule()
    def convert_and_back(self) -> None:
        """To float32 and back: the index sets do not notice."""
        positions = [m.pattern.positions() for m in self.sparse_modules()]
        self.model.float().double()
        assert all(
            torch.equal(a, m.pattern.positions())
            for a, m in zip(positions, self.sparse_modules(), strict=True)
        )

    def sparse_modules(self) -> list[sparsecore.SparseModule]:
        return [m for m in self.model.modules() if isinstance(m, sparsecore.SparseModule)]

    @invariant()
    def everything_is_consistent(self) -> None:
        if not hasattr(self, "nnz"):
            return
        for name, parameter in self.model.named_parameters():
            assert id(parameter) == self.identity[name]
            if name in self.nnz:
                assert parameter.numel() == self.nnz[name]
            for value in self.optimizer.state.get(parameter, {}).values():
                assert not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameter.shape
        for module in self.sparse_modules():
            module.check_invariants()
            assert bool(torch.isfinite(module.values).all())


TestTraining = Training.TestCase
TestTraining.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
