"""ConvNCF against its score and loss written out with outer products and torch's convolutions."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torch import nn

import sparsecore
from recsys.config import load_config
from recsys.errors import ConfigError, DataError
from recsys.models import convncf
from recsys.models.base import Triples
from recsys.models.bprmf import BPRMF
from recsys.models.build import build_model
from recsys.models.convncf import ConvNCF
from recsys.models.layers import Density, Layers
from recsys.models.lightgcn import LightGCN
from recsys.models.negatives import NegativeSampler, negative_batches
from recsys.models.transfer import copy_layer

pytestmark = pytest.mark.feature("models")

SHAPE = (6, 9)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(density=1.0, seed=0, **options):
    """Numbers so large that every part of the loss and every relu matters."""
    options = {"dim": 8, "channels": [5, 4, 3], "kernels": [2, 2, 2], "init_std": 1.0, **options}
    return ConvNCF(SHAPE, density=density, generator=generator(seed), **options).double()


def dense_twin(model):
    """The same weights in a model of dense layers."""
    twin = ConvNCF(
        SHAPE,
        model.users.embedding_dim,
        [conv.out_channels for conv in model.convs],
        [conv.kernel_size[0] for conv in model.convs],
        model.dropout,
        model.embedding_regularization,
        model.conv_regularization,
        model.output_regularization,
    ).double()
    if any(isinstance(module, sparsecore.SparseModule) for module in model.modules()):
        twin.load_state_dict(sparsecore.densify(copy.deepcopy(model)).state_dict())
    else:
        twin.load_state_dict(model.state_dict())
    return twin


def plain_scores(model, users, items):
    """(B, M) of a dense model, one pair after the other."""
    scores = []
    for user, row in zip(users.tolist(), items.tolist(), strict=True):
        for item in row:
            maps = torch.outer(model.users.weight[user], model.items.weight[item])[None, None]
            for conv in model.convs:
                maps = F.relu(F.conv2d(maps, conv.weight, conv.bias, stride=conv.stride))
            assert maps.shape[2:] == (1, 1)
            scores.append((model.output.weight[0] * maps[0, :, 0, 0]).sum())
    return torch.stack(scores).view(items.shape)


BATCH = Triples(torch.tensor([0, 5, 5, 2]), torch.tensor([1, 0, 8, 3]), torch.tensor([3, 3, 1, 7]))


@pytest.mark.parametrize("pairs", [1, 3, 64])
@pytest.mark.parametrize(
    "density", [1.0, 0.5, Density(0.6, ("*", "*bias")), Density(0.5, ("users", "items"))]
)
def test_loss_and_gradients_equal_the_formula(density, pairs, monkeypatch):
    monkeypatch.setattr(convncf, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(convncf, "_FEWEST_PAIRS", pairs)
    model = small(density, embedding_regularization=0.3, conv_regularization=0.2, output_regularization=0.7)
    twin = dense_twin(model)
    scores = plain_scores(twin, BATCH.users, torch.stack((BATCH.positives, BATCH.negatives), dim=1))
    rows = (
        twin.users.weight[BATCH.users],
        twin.items.weight[BATCH.positives],
        twin.items.weight[BATCH.negatives],
    )
    plain = F.softplus(scores[:, 1] - scores[:, 0]).sum() + 0.3 * sum(r.square().sum() for r in rows)
    plain = plain + 0.2 * sum(p.square().sum() for p in twin.convs.parameters())
    plain = plain + (0.7 + 0.2) * twin.output.weight.square().sum()
    loss = model.loss(BATCH, 0)
    torch.testing.assert_close(loss, plain, rtol=1e-11, atol=0)
    loss.backward()
    plain.backward()
    for name, module in model.named_modules():
        if isinstance(module, sparsecore.SparseModule):
            key = name if isinstance(module, sparsecore.SparseBias) else f"{name}.weight"
            right = twin.get_parameter(key).grad.reshape(-1)[module.pattern.positions()]
            torch.testing.assert_close(module.values.grad, right, rtol=1e-9, atol=1e-11)
    for name, parameter in twin.named_parameters():
        if name in dict(model.named_parameters()):
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-9, atol=1e-11)


def test_no_penalty_in_the_first_epoch():
    plain, guarded = small(unregularized_epochs=0), small()
    torch.testing.assert_close(guarded.loss(BATCH, 0), plain.loss(BATCH, 0))  # no epoch has begun
    data = SimpleNamespace(train=csr_array(np.eye(*SHAPE, dtype=np.float32)))
    steps = guarded.steps_per_epoch(data, 4)
    assert steps == 2
    for model in (plain, guarded):
        model.batches(data, 4, generator())
    ranking = guarded.loss(BATCH, steps - 1)
    assert bool(ranking < guarded.loss(BATCH, steps))
    torch.testing.assert_close(guarded.loss(BATCH, steps), plain.loss(BATCH, 0))
    free = small(embedding_regularization=0.0, conv_regularization=0.0, output_regularization=0.0)
    torch.testing.assert_close(ranking, free.loss(BATCH, 0))


@settings(deadline=None, max_examples=25)
@given(
    kernels=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    channels=st.integers(1, 5),
    each=st.integers(1, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_scores_for_any_kernels(kernels, channels, each, batch, seed):
    model = small(1.0, seed, dim=int(np.prod(kernels)), channels=[channels] * len(kernels), kernels=kernels)
    users = torch.randint(6, (batch,), generator=generator(seed))
    items = torch.randint(9, (batch, each), generator=generator(seed + 1))
    scores = model.interact(model.users(users), model.items(items))
    torch.testing.assert_close(scores, plain_scores(model, users, items), rtol=1e-10, atol=1e-12)


def test_first_layer_gradcheck():
    model = small()
    users, items = torch.randn(2, 8).double(), torch.randn(2, 3, 8).double()
    weight, bias = (p.detach().clone().requires_grad_() for p in model.convs[0].parameters())

    def run(users, items, weight, bias):
        return torch.func.functional_call(
            First(model), {"model.convs.0.weight": weight, "model.convs.0.bias": bias}, (users, items)
        )

    assert torch.autograd.gradcheck(run, (users.requires_grad_(), items.requires_grad_(), weight, bias))


class First(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, users, items):
        return self.model._first(users, items)


@pytest.mark.parametrize("pairs", [1, 4, 64])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_catalogue_and_candidates_score_alike(density, pairs, monkeypatch):
    monkeypatch.setattr(convncf, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(convncf, "_FEWEST_PAIRS", pairs)
    model = small(density).eval()
    users, inputs = np.array([4, 0, 4]), csr_array((3, 9))
    scores = model.score(users, inputs)
    assert not scores.requires_grad
    everything = torch.arange(9).expand(3, -1)
    plain = plain_scores(dense_twin(model), torch.from_numpy(users), everything)
    torch.testing.assert_close(scores, plain.detach(), rtol=1e-10, atol=1e-12)
    items = torch.tensor([[3, 3, 0], [8, 1, 2], [0, 5, 7]])
    torch.testing.assert_close(model.score_items(users, inputs, items), scores.gather(1, items))
    with pytest.raises(DataError, match=r"6 users .* multvae, sasrec, ease"):
        model.score(np.array([0, -1]), inputs[:2])


# ---- training data, noise, initial values


def test_batches_hold_every_interaction_once_with_an_item_not_chosen(tiny):
    model = ConvNCF(tiny.train.shape, 4, [2, 2], [2, 2])
    batches = list(model.batches(tiny, 100, generator(3)))
    assert len(batches) == model.steps_per_epoch(tiny, 100)
    assert [b.size for b in batches[:-1]] == [100] * (len(batches) - 1)
    users, positives, negatives = (
        torch.cat([getattr(b, name).view(-1) for b in batches])
        for name in ("users", "positives", "negatives")
    )
    assert (csr_array((np.ones(len(users)), (users, positives)), tiny.train.shape) != tiny.train).nnz == 0
    assert not tiny.train.toarray()[users, negatives].any()
    assert not torch.equal(users, users.sort().values)
    again, other = (list(model.batches(tiny, 100, generator(seed))) for seed in (3, 4))
    assert all(torch.equal(a.negatives, b.negatives) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(other[0].users, batches[0].users)


def test_users_who_have_chosen_everything_are_left_out():
    train = csr_array(np.array([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]], np.float32))
    assert NegativeSampler(train).interactions == 3
    (batch,) = negative_batches(NegativeSampler(train), 1, 10, generator())
    found = sorted(
        zip(batch.users.tolist(), batch.positives.tolist(), batch.negatives.view(-1).tolist(), strict=True)
    )
    assert [t[:2] for t in found] == [(1, 1), (3, 0), (3, 2)]
    assert found[0][2] in (0, 2)
    assert [t[2] for t in found[1:]] == [1, 1]


def test_negatives_are_uniform():
    train = csr_array(np.array([[0, 1, 0, 1, 0]], np.float32))
    sampler = NegativeSampler(train)
    drawn = [next(negative_batches(sampler, 1, 2, generator(seed))).negatives.view(-1) for seed in range(600)]
    counts = torch.bincount(torch.cat(drawn), minlength=5)
    assert counts[[1, 3]].tolist() == [0, 0]
    assert counts[[0, 2, 4]].tolist() == pytest.approx([400] * 3, rel=0.15)


def test_dropout_is_the_same_for_every_density_and_keeps_the_mean():
    states = [small(d, dropout=0.5).noise.get_state() for d in (1.0, 0.5)]
    assert torch.equal(*states)
    model = small(channels=[5, 4, 40], dropout=0.4)
    with torch.no_grad():
        model.output.weight.fill_(1.0)
        users, items = torch.rand(1, 8).double(), torch.rand(1, 1, 8).double()
        exact = model.eval().interact(users, items)
        noisy = model.train().interact(users.expand(500, -1), items.expand(500, -1, -1))
    assert float(noisy.std()) > 0
    assert float(noisy.mean()) == pytest.approx(float(exact), rel=0.05)
    assert torch.equal(model.eval().interact(users, items), exact)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_initial_values(density):
    model = ConvNCF((400, 300), density=density, generator=generator())
    # A normal distribution cut at two standard deviations has 0.88 of the standard deviation.
    for layer, std in ((model.users, 0.01), (model.items, 0.01), (model.convs[1], 0.1)):
        values = sparsecore.weight_parameter(layer).detach()
        assert float(values.std()) == pytest.approx(0.88 * std, rel=0.05)
        assert float(values.abs().max()) <= 2 * std
    assert all(bool((conv.bias == 0.1).all()) for conv in model.convs)
    stored = sum(sparsecore.weight_parameter(conv).numel() for conv in model.convs)
    assert stored == density * (32 * 4 + 5 * 32 * 32 * 4)
    again, other = (ConvNCF((400, 300), density=density, generator=generator(s)) for s in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(model.parameters()), next(other.parameters()))


def test_all_biases_can_be_sparse():
    model = small(Density(0.6, ("*", "*bias")))
    assert [conv.bias.nnz for conv in model.convs] == [3, 2, 2]
    assert all(bool((conv.bias.values.float() == 0.1).all()) for conv in model.convs)


def test_weights_of_the_paper_are_the_tables():
    model = small(Density(0.5, ConvNCF.paper))
    assert {n for n, m in model.named_modules() if isinstance(m, sparsecore.SparseModule)} == {
        "users",
        "items",
    }


def test_settings():
    config = load_config(overrides=["model.name=convncf"])
    model = build_model(config.model.model_dump(), csr_array((5, 7), dtype=np.float32))
    assert [tuple(conv.weight.shape) for conv in model.convs] == [(32, 1, 2, 2)] + [(32, 32, 2, 2)] * 5
    recbole = ["model.channels=[32, 32, 32, 32]", "model.kernels=[4, 4, 2, 2]", "model.dropout=0.2"]
    config = load_config(overrides=["model.name=convncf", *recbole])
    model = build_model(config.model.model_dump(), csr_array((5, 7), dtype=np.float32))
    assert [conv.kernel_size[0] for conv in model.convs] == [4, 4, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": [2, 2]}, "one number for each layer"),
        ({"channels": [], "kernels": []}, "at least one"),
        ({"dim": 16}, r"reduce a map of 8 x 8 to one number, but dim is 16"),
    ],
)
def test_shapes_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        small(**options)


# ---- tables from BPR-MF


def stored(table):
    weight = table.weight.detach()
    return weight.to_dense() if weight.layout != torch.strided else weight


@pytest.mark.parametrize(("before", "after"), [(1.0, 1.0), (1.0, 0.5), (0.5, 0.5), (0.5, 1.0)])
def test_tables_of_bprmf_are_taken(before, after):
    mf = BPRMF(SHAPE, 8, density=before, generator=generator(1))
    model = small(after).float()
    patterns = {n: m.pattern for n, m in model.named_modules() if isinstance(m, sparsecore.SparseModule)}
    convs = [p.clone() for p in model.convs.parameters()]
    model.initialize_from({"bprmf": mf})
    for name in ("users", "items"):
        ours, theirs = getattr(model, name), getattr(mf, name)
        if before == 1 and after < 1:
            mask = ours.pattern.to_mask()
            assert torch.equal(mask, patterns[name].to_mask())
            assert torch.equal(stored(ours), stored(theirs) * mask)
        else:
            assert torch.equal(stored(ours), stored(theirs))
        if after < 1:
            ours.check_invariants()
        with torch.no_grad():
            sparsecore.weight_parameter(ours).fill_(7)
        assert not (stored(theirs) == 7).any()
    assert all(torch.equal(a, b) for a, b in zip(convs, model.convs.parameters(), strict=True))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"mf": BPRMF(SHAPE, 8)}, "ConvNCF takes bprmf, not 'mf'"),
        ({"bprmf": LightGCN(csr_array(np.ones((6, 9), np.float32)), 8)}, "run of BPRMF, got LightGCN"),
        ({"bprmf": BPRMF(SHAPE, 4)}, r"'users' has shape \(6, 4\), this model needs \(6, 8\)"),
        ({"bprmf": BPRMF((6, 8), 8)}, r"'items' has shape \(8, 8\), this model needs \(9, 8\)"),
        ({"bprmf": BPRMF(SHAPE, 8, density=0.25)}, "'users' stores 12 values, this model 24"),
    ],
)
def test_parts_that_do_not_fit(parts, message):
    with pytest.raises(ConfigError, match=message):
        small(0.5).initialize_from(parts)


# ---- layers


def test_conv2d_of_layers():
    assert type(Layers().conv2d("c", 2, 3, 2, 2)) is nn.Conv2d
    assert type(Layers(Density(0.5, ("other",))).conv2d("c", 2, 3, 2)) is nn.Conv2d
    layer = Layers(Density(0.5, ("c", "c.bias")), generator()).conv2d("c", 2, 4, 3, 2)
    assert isinstance(layer, sparsecore.SparseConv2d)
    assert isinstance(layer.bias, sparsecore.SparseBias)
    assert (layer.kernel_size, layer.stride, layer.nnz, layer.bias.nnz) == ((3, 3), (2, 2), 36, 2)
    assert isinstance(Layers(0.5).conv2d("c", 2, 4, 3).bias, nn.Parameter)


def test_weights_of_convolutions_are_copied():
    dense, sparse = Layers().conv2d("c", 2, 4, 3), Layers(0.5, generator()).conv2d("c", 2, 4, 3)
    copy_layer("c", sparse, dense)
    mask = sparse.pattern.to_mask().view(4, 2, 3, 3)
    assert torch.equal(sparse.to_dense().weight, dense.weight * mask)
    back = Layers().conv2d("c", 2, 4, 3)
    copy_layer("c", back, sparse)
    assert torch.equal(back.weight, dense.weight * mask)
