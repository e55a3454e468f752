"""Losses against plain dense formulas, sampling against the rules, dense and sparse through one code path."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import nn

import sparsecore
from recsys.errors import ConfigError, DataError, RecsysError
from recsys.models import lightgcn
from recsys.models.base import Interactions, Triples
from recsys.models.build import build_model
from recsys.models.layers import Density, Layers
from recsys.models.lightgcn import LightGCN
from recsys.models.losses import gaussian_kl, multinomial_nll
from recsys.models.multvae import MultVAE
from recsys.models.triples import TripleSampler
from sparsecore import locality

pytestmark = pytest.mark.feature("models")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_matrix(users, items, density=0.2, seed=0, empty=()):
    dense = np.random.default_rng(seed).random((users, items)) < density
    dense[list(empty)] = False
    return csr_array(dense.astype(np.float32))


# ---- the loss of MultVAE


def plain_nll(logits, matrix):
    dense = torch.from_numpy(matrix.toarray()).to(logits.dtype)
    return -(F.log_softmax(logits, dim=1) * dense).sum(dim=1).mean()


def test_nll_and_its_gradient_equal_the_plain_formula():
    matrix = random_matrix(7, 11, empty=[2, 6])
    logits = torch.randn(7, 11, dtype=torch.float64, generator=generator()) * 3
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a, b = multinomial_nll(ours, Interactions.from_scipy(matrix)), plain_nll(plain, matrix)
    (3 * a).backward()
    (3 * b).backward()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-12)


def test_nll_gradcheck():
    batch = Interactions.from_scipy(random_matrix(4, 6, density=0.4, empty=[1]))
    logits = torch.randn(4, 6, dtype=torch.float64, generator=generator(), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: multinomial_nll(x, batch), (logits,))


def test_nll_is_finite_for_huge_logits():
    batch = Interactions.from_scipy(random_matrix(3, 5, density=0.5))
    logits = torch.tensor([[1e4, -1e4, 0, 0, 0]] * 3, requires_grad=True)
    loss = multinomial_nll(logits, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_nll_of_a_batch_without_any_interaction_is_zero():
    batch = Interactions.from_scipy(csr_array((3, 5), dtype=np.float32))
    logits = torch.randn(3, 5, requires_grad=True)
    loss = multinomial_nll(logits, batch)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits.grad.any()


def test_nll_refuses_another_number_of_users():
    with pytest.raises(ValueError, match="logits have 2 rows, but the batch has 3"):
        multinomial_nll(torch.zeros(2, 5), Interactions.from_scipy(random_matrix(3, 5)))


def test_kl_equals_torch_distributions():
    mean, log_variance = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator())
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_kl(mean, log_variance), expected.sum(dim=1).mean())


# ---- MultVAE


def dense_weights(model):
    """Weight matrices (in, out) of a MultVAE, whatever they are stored as."""

    def matrix(layer):
        weight = layer.weight.detach()
        return weight.to_dense() if weight.layout != torch.strided else weight

    return matrix(model.input), matrix(model.posterior).T, matrix(model.decoder).T, matrix(model.output).T


def plain_multvae(model, matrix, noise=None):
    """MultVAE written out with dense matrices: logits, mean, log variance (no dropout)."""
    x = F.normalize(torch.from_numpy(matrix.toarray()).to(model.input_bias.dtype))
    w1, w2, w3, w4 = dense_weights(model)
    mean, log_variance = (torch.tanh(x @ w1 + model.input_bias) @ w2 + model.posterior.bias).chunk(2, dim=1)
    z = mean if noise is None else mean + noise * (0.5 * log_variance).exp()
    logits = torch.tanh(z @ w3 + model.decoder.bias) @ w4 + model.output.bias
    return logits, mean, log_variance


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_multvae_equals_the_model_written_out(density):
    matrix = random_matrix(6, 20, empty=[3])
    model = MultVAE(20, 12, 5, dropout=0.0, density=density, generator=generator()).double()
    step = 30_000
    state = model.noise.get_state()
    loss = model.loss(Interactions.from_scipy(matrix), step)
    noise = torch.empty(6, 5, dtype=torch.float64).normal_(generator=generator())
    replay = torch.Generator()
    replay.set_state(state)
    noise.normal_(generator=replay)
    logits, mean, log_variance = plain_multvae(model, matrix, noise)
    expected = plain_nll(logits, matrix) + step / 200_000 * gaussian_kl(mean, log_variance)
    torch.testing.assert_close(loss, expected)
    model.eval()
    scores = model.score(np.full(6, -1), matrix)
    torch.testing.assert_close(scores, plain_multvae(model, matrix)[0].detach())


def test_multvae_beta_rises_to_its_cap():
    model = MultVAE(10, 4, 2)
    assert [model.beta(step) for step in (0, 20_000, 40_000, 10**6)] == [0, 0.1, 0.2, 0.2]


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_multvae_initial_values(density):
    model = MultVAE(2000, 100, 20, density=density, generator=generator())
    for layer, fans in (
        (model.input, 2100),
        (model.posterior, 140),
        (model.decoder, 120),
        (model.output, 2100),
    ):
        values = sparsecore.weight_parameter(layer)
        assert float(values.detach().std()) == pytest.approx((2 / fans) ** 0.5, rel=0.1)
        if density < 1:
            assert values.numel() == round(density * layer.shape[0] * layer.shape[1])
    biases = torch.cat([model.input_bias, model.posterior.bias, model.decoder.bias, model.output.bias])
    assert float(biases.detach().std()) == pytest.approx(1e-3, rel=0.1)


def test_multvae_dropout_keeps_the_expected_input():
    model = MultVAE(400, 30, 4, dropout=0.5, generator=generator())
    with torch.no_grad():
        model.input.weight.fill_(1e-3)  # tanh is linear here: the hidden layer is the sum of the input
        model.input_bias.zero_()
        model.posterior.weight.fill_(1.0)
        model.posterior.bias.zero_()
    batch = Interactions.from_scipy(csr_array(np.ones((64, 400), np.float32)))
    noisy = model.encode(batch)[0].detach()
    exact = model.eval().encode(batch)[0].detach()
    assert float(noisy.std()) > 0
    assert float(noisy.mean()) == pytest.approx(float(exact.mean()), rel=0.03)


def test_multvae_noise_is_the_same_for_every_density():
    states = [MultVAE(20, 8, 4, density=d, generator=generator(5)).noise.get_state() for d in (1.0, 0.5, 0.1)]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_multvae_gradients_match_between_dense_and_sparse_with_the_same_weights():
    sparse = MultVAE(20, 12, 5, density=0.4, generator=generator()).double()
    dense = MultVAE(20, 12, 5, generator=generator()).double()
    names = ("input", "posterior", "decoder", "output")
    masks = {}
    with torch.no_grad():
        for name in names:
            layer = getattr(sparse, name)
            getattr(dense, name).weight.copy_(layer.weight.to_dense())
            masks[name] = layer.pattern.to_mask()
        for name, parameter in sparse.named_parameters():
            if "bias" in name:
                dense.get_parameter(name).copy_(parameter)
    batch = Interactions.from_scipy(random_matrix(6, 20, empty=[3]))
    losses = []
    for model in (sparse, dense):
        loss = model.loss(batch, 1000)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    for name in names:
        expected = getattr(dense, name).weight.grad[masks[name]]
        torch.testing.assert_close(getattr(sparse, name).values.grad, expected)
    torch.testing.assert_close(sparse.input_bias.grad, dense.input_bias.grad)


def test_multvae_batches_cover_every_user_once(tiny):
    model = MultVAE(tiny.n_items, 8, 4)
    batches = list(model.batches(tiny, 50, generator(3)))
    assert [batch.size for batch in batches] == [50, 50, 20]
    assert len(batches) == model.steps_per_epoch(tiny, 50)
    rows = sorted(tuple(part.tolist()) for b in batches for part in b.items.split(b.counts.tolist()))
    assert rows == sorted(tuple(tiny.train[[u]].indices.tolist()) for u in range(tiny.n_users))
    again = list(model.batches(tiny, 50, generator(3)))
    assert all(torch.equal(a.items, b.items) for a, b in zip(batches, again, strict=True))
    other = next(iter(model.batches(tiny, 50, generator(4))))
    assert not torch.equal(other.counts, batches[0].counts)


# ---- LightGCN


@pytest.fixture
def small_blocks(monkeypatch):
    """Orders of nodes for graphs that are otherwise too small to have another than their own."""
    monkeypatch.setattr(locality, "_LEAF", 4)
    monkeypatch.setattr(lightgcn, "_CACHE", 0)


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_lightgcn_equals_the_model_written_out(density, tuned):
    train = random_matrix(8, 10, empty=[1], seed=3)
    model = LightGCN(train, 6, 3, regularization=0.1, density=density, generator=generator()).double()
    if tuned:
        model.tune()
    nodes = torch.arange(18)
    assert torch.equal(model.rows(nodes), nodes) != tuned
    table = model.table.weight.detach()
    table = (table.to_dense() if table.layout != torch.strided else table)[model.rows(nodes)]
    full = np.block([[np.zeros((8, 8)), train.toarray()], [train.toarray().T, np.zeros((10, 10))]])
    degree = full.sum(axis=1)
    scale = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    adjacency = torch.from_numpy(scale[:, None] * full * scale)
    hops = [table]
    for _ in range(3):
        hops.append(adjacency @ hops[-1])
    final = torch.stack(hops).mean(dim=0)
    users, positives, negatives = torch.tensor([0, 2, 2]), torch.tensor([1, 0, 4]), torch.tensor([3, 3, 9])
    u, p, n = final[users], final[8 + positives], final[8 + negatives]
    u0, p0, n0 = table[users], table[8 + positives], table[8 + negatives]
    penalty = (u0.square().sum() + p0.square().sum() + n0.square().sum()) / 2 / 3
    expected = F.softplus((u * n).sum(1) - (u * p).sum(1)).mean() + 0.1 * penalty
    # The graph was stored in float32 before the model became float64.
    torch.testing.assert_close(
        model.loss(Triples(users, positives, negatives), 0).detach(), expected, rtol=1e-6, atol=1e-7
    )
    scores = model.eval().score(np.array([2, 0]), train[[2, 0]])
    torch.testing.assert_close(scores, final[[2, 0]] @ final[8:].T, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_lightgcn_initial_values(density):
    train = random_matrix(300, 200)
    normal = LightGCN(train, 16, density=density, generator=generator())
    assert float(sparsecore.weight_parameter(normal.table).detach().std()) == pytest.approx(0.1, rel=0.05)
    xavier = LightGCN(train, 16, init="xavier_uniform", density=density, generator=generator())
    bound = (6 / (500 + 16)) ** 0.5
    assert float(sparsecore.weight_parameter(xavier.table).detach().abs().max()) == pytest.approx(
        bound, rel=0.05
    )


def test_lightgcn_scores_are_refreshed_after_training_and_loading():
    train = random_matrix(8, 10)
    model = LightGCN(train, 4, generator=generator()).eval()
    first = model.score(np.array([0]), train[[0]])
    assert torch.equal(model.score(np.array([0]), train[[0]]), first)
    model.train()
    with torch.no_grad():
        model.table.weight.mul_(2)
    doubled = model.eval().score(np.array([0]), train[[0]])
    torch.testing.assert_close(doubled, 4 * first)
    other = LightGCN(train, 4, generator=generator(9)).eval()
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.score(np.array([0]), train[[0]]), other.score(np.array([0]), train[[0]]))


@pytest.mark.usefixtures("small_blocks")
def test_lightgcn_is_saved_with_the_order_of_its_rows():
    train = random_matrix(30, 20)
    users = np.arange(30)
    model = LightGCN(train, 4, generator=generator()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "place" not in before
    plain = model.score(users, train)
    model.tune()
    model.train().eval()
    other = LightGCN(train, 4, generator=generator(9)).eval()
    other.tune()
    for one in (other, LightGCN(train, 4, generator=generator(8)).eval(), copy.deepcopy(model)):
        one.load_state_dict(model.state_dict())
        assert torch.equal(one.score(users, train), model.score(users, train))
        one.load_state_dict(before)
        assert torch.equal(one.score(users, train), plain)
    for wrong in (torch.zeros(50, dtype=torch.int32), torch.arange(49)):
        with pytest.raises(RecsysError, match="row of each of 50 nodes"):
            other.load_state_dict({**before, "place": wrong})


def test_lightgcn_leaves_a_small_graph_as_it_is():
    model = LightGCN(random_matrix(300, 200), 16, generator=generator())
    model.tune()
    assert model.place is None


def test_lightgcn_has_no_embedding_for_a_held_out_user():
    train = random_matrix(8, 10)
    with pytest.raises(DataError, match="multvae"):
        LightGCN(train, 4).score(np.array([0, -1]), train[[0, 1]])


def test_lightgcn_batches(tiny):
    model = LightGCN(tiny.train, 4)
    batches = list(model.batches(tiny, 100, generator(3)))
    assert len(batches) == model.steps_per_epoch(tiny, 100)
    assert sum(batch.size for batch in batches) == tiny.n_interactions
    again = list(model.batches(tiny, 100, generator(3)))
    assert all(torch.equal(a.negatives, b.negatives) for a, b in zip(batches, again, strict=True))


def test_sampler_draws_each_uniformly_and_negatives_exactly():
    # User 0 has none, user 4 has all items: neither can be in a triple.
    dense = np.array(
        [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], np.float32
    )
    drawn = TripleSampler(csr_array(dense)).draw(60_000, generator())
    users, positives, negatives = (t.numpy() for t in (drawn.users, drawn.positives, drawn.negatives))
    assert dense[users, positives].all()
    assert not dense[users, negatives].any()
    expected_user = 60_000 / 3
    for user in (1, 2, 3):
        mine = users == user
        assert mine.sum() == pytest.approx(expected_user, rel=0.03)
        for items, allowed in ((positives, dense[user] == 1), (negatives, dense[user] == 0)):
            counts = np.bincount(items[mine], minlength=5)
            assert counts[allowed] == pytest.approx(
                np.full(allowed.sum(), mine.sum() / allowed.sum()), rel=0.06
            )
    assert set(users) == {1, 2, 3}


def test_sampler_refuses_data_without_a_choice():
    with pytest.raises(DataError, match="nothing to rank"):
        TripleSampler(csr_array(np.ones((2, 3), np.float32)))


# ---- one code path


def test_layers_choose_storage_by_density():
    dense = Layers()
    assert type(dense.linear("l", 4, 3)) is nn.Linear
    assert type(dense.embedding("e", 4, 3)) is nn.Embedding
    assert type(dense.embedding_bag("b", 4, 3)) is nn.EmbeddingBag
    assert type(dense.bias("bias", 3)) is nn.Parameter
    layers = Layers(0.5, generator())
    for make, kind in (
        (layers.linear, sparsecore.SparseLinear),
        (layers.embedding, sparsecore.SparseEmbedding),
        (layers.embedding_bag, sparsecore.SparseEmbeddingBag),
    ):
        layer = make("layer", 8, 5)
        assert type(layer) is kind
        assert sparsecore.weight_parameter(layer).numel() == 20
    assert (
        type(layers.bias("bias", 3)) is nn.Parameter
    )  # a pattern that does not end with "bias" means weights


def test_density_by_name():
    density = Density(0.25, include=("mlp.*", "output", "*bias"), exclude=("mlp.1",))
    found = {name: density.at(name) for name in ("mlp.0", "mlp.1", "output", "output.bias", "table")}
    assert found == {"mlp.0": 0.25, "mlp.1": 1.0, "output": 0.25, "output.bias": 0.25, "table": 1.0}
    assert Density(**density.to_dict()).at("mlp.0") == 0.25
    assert Density.of(0.5).at("anything") == 0.5
    assert Density.of(0.5).at("anything.bias") == 1.0


def test_multvae_prunes_what_the_authors_prune():
    model = MultVAE(30, 8, 4, density=Density(0.5, include=MultVAE.paper), generator=generator())
    assert all(name.endswith("values") for name, _ in model.named_parameters())
    assert len(list(model.parameters())) == 8
    model.score(np.array([-1, -1]), random_matrix(2, 30))
    mixed = MultVAE(30, 8, 4, density=Density(0.5, include=("output",)), generator=generator())
    assert [n for n, _ in mixed.named_parameters() if n.endswith("values")] == ["output.values"]


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, 1e-9])
def test_bad_density_is_refused(density):
    with pytest.raises(sparsecore.SparsecoreError):
        MultVAE(20, 8, 4, density=density)


def test_build_model_names_the_nearest():
    train = random_matrix(4, 5)
    assert isinstance(build_model({"name": "multvae", "hidden": 3, "latent": 2}, train), MultVAE)
    assert isinstance(build_model({"name": "lightgcn", "dim": 3}, train), LightGCN)
    with pytest.raises(ConfigError, match="did you mean 'lightgcn'"):
        build_model({"name": "lightgnc"}, train)
