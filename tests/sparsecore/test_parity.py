"""The proof: training on index sets equals training on masked dense tensors, decision for decision, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BACKENDS
from torch import Tensor, nn

import sparsecore
from recsys.data import Dataset, EvalSet
from recsys.models.base import Interactions, Triples
from recsys.models.bprmf import BPRMF
from recsys.models.cdae import CDAE
from recsys.models.convncf import ConvNCF
from recsys.models.layers import Density
from recsys.models.lightgcn import LightGCN
from recsys.models.multvae import MultVAE
from recsys.models.negatives import NegativeSampler, negative_batches
from recsys.models.neumf import NeuMF
from recsys.models.sasrec import SASRec
from recsys.models.triples import TripleSampler
from recsys.models.ultragcn import UltraGCN
from sparsecore.nn.base import SparseModule

pytestmark = pytest.mark.feature("training and exploring equals masked dense training")


@pytest.fixture(autouse=True)
def kernels(every_size: None) -> None:
    """Each test twice: its problems are small enough for numba's small kernels."""


STEPS, INTERVAL = 220, 20  # 11 explorations

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


def interactions(n_users: int = 40, n_items: int = 60, seed: int = 0) -> scipy.sparse.csr_array:
    rng = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, n_items + 1)
    dense = rng.random((n_users, n_items)) < 4 * popularity / popularity.max() * 0.3
    dense[:, 0] = dense.sum(1) == 0  # nobody is without an item
    return scipy.sparse.csr_array(dense.astype(np.float32))


def dense_twin(build: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The same model with dense weights (zeros where nothing is stored), and the masks."""
    model = build()
    masks = sparsecore.masks_of(model)
    return sparsecore.densify(model), masks


def assert_equal(sparse: nn.Module, dense: nn.Module, masked: sparsecore.MaskedSparsity, where: str) -> None:
    names = dict(dense.named_parameters())
    for name, module in sparse.named_modules():
        if isinstance(module, SparseModule):
            module.check_invariants()
            key = name if isinstance(module, sparsecore.SparseBias) else f"{name}.weight".lstrip(".")
            mask = masked.masks[key].view(module.shape)
            assert torch.equal(module.pattern.to_mask(), mask), f"{where}: index sets of {name} differ"
            values = names[key].detach().view(module.shape)[mask]
            torch.testing.assert_close(module.values.detach(), values, rtol=1e-9, atol=1e-11)
            assert not names[key].detach().view(module.shape)[~mask].any()


def train_both(
    build: Callable[[], nn.Module],
    losses: Callable[[nn.Module, int], Tensor],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    steps: int = STEPS,
    interval: int = INTERVAL,
    **settings: object,
) -> int:
    sparse = build()
    dense, masks = dense_twin(build)
    explorers, optimizers = [], []
    for model, kind, extra in (
        (sparse, sparsecore.DynamicSparsity, {}),
        (dense, sparsecore.MaskedSparsity, {"masks": masks}),
    ):
        model.train()
        optimizers.append(optimizer(list(model.parameters())))
        explorers.append(
            kind(model, optimizers[-1], interval=interval, total_steps=steps,
                 generator=torch.Generator().manual_seed(5), **extra, **settings)  # type: ignore[arg-type]
        )  # fmt: skip
    exchanged = 0
    for step in range(steps):
        reports = []
        for model, opt, explorer in zip((sparse, dense), optimizers, explorers, strict=True):
            opt.zero_grad()
            losses(model, step).backward()
            opt.step()
            reports.append(explorer.step())
        assert_equal(sparse, dense, explorers[1], f"step {step}")
        assert (reports[0] is None) == (reports[1] is None)
        if reports[0] is not None:
            a, b = reports
            assert (a.pruned, a.grown, a.regrown, a.nnz) == (b.pruned, b.grown, b.regrown, b.nnz)
            assert a.ever_active == pytest.approx(b.ever_active)
            exchanged += a.grown - a.regrown
    return exchanged


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_multvae(backend: str, optimizer: str) -> None:
    data = interactions()
    batches = [Interactions.from_scipy(data[np.arange(k, k + 10)]) for k in range(0, 40, 10)]

    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(3)
        return MultVAE(60, hidden=24, latent=6, density=0.3, generator=generator).double()

    with sparsecore.backend(backend):
        exchanged = train_both(build, lambda m, t: m.loss(batches[t % 4], t), OPTIMIZERS[optimizer])  # type: ignore[operator]
    assert exchanged > 1000  # the comparison is empty if nothing ever moves


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["bce", "sampled", "multinomial"])
def test_cdae(backend: str, loss: Literal["bce", "sampled", "multinomial"]) -> None:
    data = interactions()
    batches = [Interactions.from_scipy(data[rows], rows) for rows in np.arange(40).reshape(4, 10)]

    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(3)
        density = Density(0.3, ("*", "output.bias"))
        return CDAE((40, 60), 24, "tanh", loss=loss, density=density, generator=generator).double()

    with sparsecore.backend(backend):
        exchanged = train_both(build, lambda m, t: m.loss(batches[t % 4], t), OPTIMIZERS["adam"])  # type: ignore[operator]
    assert exchanged > 1000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_lightgcn(backend: str, optimizer: str) -> None:
    data = interactions()
    sampler, generator = TripleSampler(data), torch.Generator().manual_seed(1)
    batches = [sampler.draw(32, generator) for _ in range(STEPS)]

    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(3)
        return LightGCN(data, dim=10, hops=3, density=0.3, generator=generator).double()

    with sparsecore.backend(backend):
        exchanged = train_both(build, lambda m, t: m.loss(batches[t], t), OPTIMIZERS[optimizer])  # type: ignore[operator]
    assert exchanged > 500


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["bprmf", "ultragcn"])
def test_factors(backend: str, optimizer: str, model: str) -> None:
    """Dense tables take scores of pairs by other code than sparse ones."""
    data = interactions()
    sampler, draws = TripleSampler(data), torch.Generator().manual_seed(1)
    batches = [sampler.draw(32, draws) for _ in range(STEPS)]
    if model == "ultragcn":
        batches = [
            Triples(b.users, b.positives, torch.randint(60, (32, 7), generator=draws)) for b in batches
        ]

    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(3)
        if model == "bprmf":
            return BPRMF((40, 60), dim=10, regularization=0.01, density=0.3, generator=generator).double()
        weights = {"negative_weight": 1.0, "item_weight": 0.1, "regularization": 0.02}
        return UltraGCN(
            data, dim=10, negatives=7, neighbors=3, init_std=0.1, density=0.3, generator=generator, **weights
        ).double()

    with sparsecore.backend(backend):
        exchanged = train_both(build, lambda m, t: m.loss(batches[t], t), OPTIMIZERS[optimizer])  # type: ignore[operator]
    assert exchanged > 500


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("optimizer", "loss"), [("adam", "sampled"), ("sgd-momentum", "sampled"), ("adam", "softmax")]
)
def test_sasrec(backend: str, optimizer: str, loss: str) -> None:
    """Attention, dropout, and one item table for input and output: of some items, or of all that are looked up."""
    data = interactions()
    order = np.random.default_rng(2).permutation(data.nnz)
    users = np.arange(40)
    empty = EvalSet(data[:0], data[:0], users[:0])
    dataset = Dataset("toy", data, empty, empty, users, np.arange(60), order)

    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(3)
        return SASRec(
            data,
            order,
            hidden=10,
            blocks=1,
            heads=2,
            max_length=8,
            dropout=0.2,
            density=0.3,
            generator=generator,
        ).double()

    draws = torch.Generator().manual_seed(1)
    batches = [batch for _ in range(4) for batch in build().batches(dataset, 16, draws)]  # type: ignore[operator]

    def of_step(model: nn.Module, step: int) -> Tensor:
        batch = batches[step % len(batches)]
        if loss == "sampled":
            return model.loss(batch, step)  # type: ignore[operator]
        scores = model.encode(batch.sequences) @ model.items(torch.arange(60)).T  # type: ignore[operator]
        return torch.nn.functional.cross_entropy(scores, batch.positives)

    with sparsecore.backend(backend):
        exchanged = train_both(build, of_step, OPTIMIZERS[optimizer], steps=100, interval=10)
    assert exchanged > 500


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("negatives", [2, 9])
def test_neumf(backend: str, optimizer: str, negatives: int) -> None:
    """With 9 negatives a batch looks up more items than there are: the first layer is then made once for each."""
    data = interactions()
    draws = torch.Generator().manual_seed(1)
    sampler = NegativeSampler(data)
    batches = [
        batch
        for _ in range(3)
        for batch in negative_batches(sampler, negatives, 15, draws)
        if batch.size == 15
    ]

    def build() -> nn.Module:
        return NeuMF(
            data.shape, factors=6, layers=[12, 10, 8], negatives=negatives, dropout=0.2, regularization=0.01,
            init_std=0.3, density=0.4, generator=torch.Generator().manual_seed(3),
        ).double()  # fmt: skip

    with sparsecore.backend(backend):
        exchanged = train_both(
            build,
            lambda m, t: m.loss(batches[t % len(batches)], t),
            OPTIMIZERS[optimizer],
            steps=60,
            interval=10,
        )  # type: ignore[operator]
    assert exchanged > 200


@pytest.mark.parametrize("backend", BACKENDS)
def test_convncf(backend: str) -> None:
    """Every weight and bias sparse; dropout; L2 penalties, which just pruned weights feel too."""
    data = interactions()
    sampler, draws = TripleSampler(data), torch.Generator().manual_seed(1)
    batches = [sampler.draw(20, draws) for _ in range(60)]

    def build() -> nn.Module:
        return ConvNCF(
            (40, 60), 8, [6, 8], [2, 4], dropout=0.2, conv_regularization=0.02, output_regularization=0.1,
            init_std=0.3, density=Density(0.4, ("*", "*bias")), generator=torch.Generator().manual_seed(3),
        ).double()  # fmt: skip

    with sparsecore.backend(backend):
        exchanged = train_both(
            build, lambda m, t: m.loss(batches[t], t), lambda p: torch.optim.Adagrad(p, lr=0.05), 60, 6  # type: ignore[operator]
        )  # fmt: skip
    assert exchanged > 200


class Small(nn.Module):
    """One of everything: padded table, bag, two linear layers, a sparse bias, a layer used twice."""

    def __init__(self, density: float, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.table = sparsecore.SparseEmbedding(17, 8, padding_idx=2, density=density, generator=g)
        self.bag = sparsecore.SparseEmbeddingBag(13, 8, density=density, generator=g)
        self.twice = sparsecore.SparseLinear(8, 8, density=density, bias_density=0.5, generator=g)
        self.head = sparsecore.SparseLinear(8, 5, density=min(1.0, 2 * density), generator=g)

    def forward(self, ids: Tensor, bags: Tensor) -> Tensor:
        h = torch.tanh(self.table(ids).sum(1) + self.bag(bags))
        return self.head(torch.relu(self.twice(torch.tanh(self.twice(h)))))


@settings(max_examples=20, deadline=None)
@given(
    density=st.sampled_from([0.05, 0.25, 0.6]),
    seed=st.integers(0, 10_000),
    rho=st.sampled_from([0.01, 0.3, 0.9, 1.0]),
    grow=st.sampled_from(["gradient", "random"]),
    optimizer=st.sampled_from(["sgd", "sgd-momentum", "adam", "adamw", "adagrad", "rmsprop"]),
    backend=st.sampled_from(BACKENDS),
    accumulate=st.booleans(),
    penalty=st.sampled_from([0.0, 0.3]),
)
def test_small_models(
    density: float,
    seed: int,
    rho: float,
    grow: str,
    optimizer: str,
    backend: str,
    accumulate: bool,
    penalty: float,
) -> None:
    """Any density, drop fraction and optimizer; ids so few that random positions must fill up (the budget drift).

    A penalty on the weights themselves counts where a weight that was just pruned may be grown again.
    """
    make: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
        "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    }
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (4, 4, 3), generator=g)
    bags = torch.randint(0, 5, (4, 4, 2), generator=g)
    target = torch.randn(4, 4, 5, dtype=torch.float64, generator=g)

    def loss(model: nn.Module, step: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for micro in (0, 1) if accumulate else (0,):
            part = (step + micro) % 4
            total = total + (model(ids[part], bags[part]) - target[part]).square().mean()
        return total + penalty * sum(p.square().sum() for p in model.parameters()) if penalty else total

    with sparsecore.backend(backend):
        train_both(
            lambda: Small(density, seed).double(), loss, make[optimizer], steps=12, interval=3,
            drop_fraction=rho, end_drop_fraction=rho / 2, grow=grow,
        )  # fmt: skip
