"""CDAE against its formula written out with dense matrices: scores, losses, gradients; corruption and negatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

import sparsecore
from recsys.errors import DataError
from recsys.models.base import Interactions
from recsys.models.cdae import CDAE
from recsys.models.layers import Density
from recsys.models.losses import bernoulli_nll, sampled_bernoulli_nll
from sparsecore.nn.base import SparseModule

pytestmark = pytest.mark.feature("models")

USERS, ITEMS = 9, 20
ALL = ("*", "*bias")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_matrix(users=USERS, items=ITEMS, density=0.2, seed=0, empty=()):
    dense = np.random.default_rng(seed).random((users, items)) < density
    dense[list(empty)] = False
    return csr_array(dense.astype(np.float32))


def targets(matrix):
    return torch.from_numpy(matrix.toarray()).double()


# ---- binary cross-entropy with all items


def plain_bce(logits, x):
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1).mean()


@settings(max_examples=30, deadline=None)
@given(users=st.integers(1, 6), items=st.integers(1, 9), density=st.floats(0, 1), seed=st.integers(0, 999))
def test_bernoulli_nll_and_its_gradient_equal_the_plain_formula(users, items, density, seed):
    matrix = random_matrix(users, items, density, seed)
    # torch's softplus is linear from 20 on, and off by up to e^-20 there.
    logits = (torch.randn(users, items, dtype=torch.float64, generator=generator(seed)) * 5).clamp_(max=19)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a, b = bernoulli_nll(ours, Interactions.from_scipy(matrix)), plain_bce(plain, targets(matrix))
    (3 * a).backward()
    (3 * b).backward()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bernoulli_nll(logits, Interactions.from_scipy(matrix)), b.detach())


def test_bernoulli_nll_gradcheck():
    batch = Interactions.from_scipy(random_matrix(4, 6, 0.4, empty=[1]))
    logits = torch.randn(4, 6, dtype=torch.float64, generator=generator(), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bernoulli_nll(x, batch), (logits,))


def test_bernoulli_nll_is_finite_for_huge_logits():
    batch = Interactions.from_scipy(random_matrix(3, 5, 0.5))
    logits = torch.tensor([[1e4, -1e4, 0, 0, 0]] * 3, requires_grad=True)
    loss = bernoulli_nll(logits, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_losses_refuse_another_number_of_users():
    batch, none = Interactions.from_scipy(random_matrix(3, 5)), torch.empty(0, dtype=torch.int64)
    for loss in (lambda x: bernoulli_nll(x, batch), lambda x: sampled_bernoulli_nll(x, batch, none, none)):
        with pytest.raises(ValueError, match="logits have 2 rows, but the batch has 3"):
            loss(torch.zeros(2, 5))


# ---- the model


def make(density=1.0, **options):
    """A model whose biases are not zero, in float64."""
    model = CDAE((USERS, ITEMS), 7, density=density, generator=generator(), **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(generator=generator(1))
    return model


def layers(model):
    """Of every weight and bias: the module, the parameter."""
    found = {}
    for name in ("input", "users", "output"):
        found[name] = (getattr(model, name), sparsecore.weight_parameter(getattr(model, name)))
    bias, out = model.input_bias, model.output.bias
    for name, module in (("input_bias", bias), ("output.bias", out)):
        found[name] = (module, module.values if isinstance(module, SparseModule) else module)
    return found


def dense_weights(model):
    """Every weight and bias as a plain tensor that takes a gradient."""
    plain = {}
    for name, (module, parameter) in layers(model).items():
        tensor = parameter.detach().clone()
        if isinstance(module, SparseModule):
            tensor = torch.zeros(module.shape, dtype=torch.float64)
            tensor[module.pattern.to_mask()] = parameter.detach()
        plain[name] = tensor.squeeze(0) if "bias" in name and tensor.dim() == 2 else tensor
    return {name: tensor.requires_grad_() for name, tensor in plain.items()}


def assert_gradients(model, plain):
    for name, (module, parameter) in layers(model).items():
        right = plain[name].grad
        if isinstance(module, SparseModule):
            right = right.view(module.shape)[module.pattern.to_mask()]
        torch.testing.assert_close(parameter.grad, right, rtol=1e-9, atol=1e-12)


ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "tanh": torch.tanh,
}


def plain_logits(weights, x, users, activation):
    hidden = ACTIVATIONS[activation](x @ weights["input"] + weights["users"][users] + weights["input_bias"])
    return hidden @ weights["output"].T + weights["output.bias"]


@pytest.mark.parametrize("density", [1.0, 0.3, Density(0.5, ALL)])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("loss", ["bce", "sampled", "squared", "multinomial"])
def test_cdae_equals_the_model_written_out(density, activation, loss):
    matrix, rows = random_matrix(5, empty=[3]), np.array([8, 0, 3, 2, 5])
    x = targets(matrix)
    model = make(density, activation=activation, loss=loss, dropout=0.0, regularization=0.3)
    weights, batch = dense_weights(model), Interactions.from_scipy(matrix, rows)
    logits = plain_logits(weights, x, rows, activation)
    if loss == "bce":
        plain = plain_bce(logits, x)
    elif loss == "multinomial":
        plain = -(F.log_softmax(logits, dim=1) * x).sum(1).mean()
    else:
        state = model.noise.get_state()
        users, items = model.draw_negatives(batch)
        model.noise.set_state(state)
        one, zero = {
            "sampled": (lambda t: -F.logsigmoid(t), lambda t: -F.logsigmoid(-t)),
            "squared": (lambda t: (t - 1) ** 2 / 2, lambda t: t**2 / 2),
        }[loss]
        plain = one(logits[x == 1]).sum()
        for user, item in zip(users.tolist(), items.tolist(), strict=True):
            plain = plain + zero(logits[user, item])
        plain = plain / 5
    plain = plain + 0.15 * sum(weights[name].square().sum() for name in ("input", "users", "output"))
    ours = model.loss(batch, 0)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    ours.backward()
    plain.backward()
    assert_gradients(model, weights)
    scores = model.score(rows, matrix)
    torch.testing.assert_close(scores, logits.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rescale", [True, False])
def test_corruption_leaves_items_out_of_the_input_only(rescale):
    matrix, rows = random_matrix(density=0.5), np.arange(USERS)
    model = make(activation="tanh", dropout=0.4, rescale=rescale)
    batch = Interactions.from_scipy(matrix, rows)
    replay = torch.Generator()
    replay.set_state(model.noise.get_state())
    kept = torch.rand(matrix.nnz, generator=replay) >= 0.4
    shown = matrix.copy()
    shown.data = kept.numpy().astype(np.float32) / (0.6 if rescale else 1)
    weights = dense_weights(model)
    expected = plain_bce(plain_logits(weights, targets(shown), rows, "tanh"), targets(matrix))
    torch.testing.assert_close(model.loss(batch, 0), expected, rtol=1e-6, atol=0)
    model.eval()
    whole = plain_bce(plain_logits(weights, targets(matrix), rows, "tanh"), targets(matrix))
    torch.testing.assert_close(model.loss(batch, 0), whole)


def test_only_keeps_users_and_their_order():
    matrix = random_matrix(density=0.5, empty=[0, 4])
    kept = torch.rand(matrix.nnz, generator=generator()) < 0.5
    shown = Interactions.from_scipy(matrix, np.arange(USERS)).only(kept)
    dense = torch.zeros(USERS, ITEMS)
    dense[shown.rows, shown.items] = 1
    left = matrix.copy()
    left.data = kept.numpy().astype(np.float32)
    assert torch.equal(dense, torch.from_numpy(left.toarray()))
    assert shown.users.tolist() == list(range(USERS))


def test_negatives_are_uniform_among_the_items_not_chosen():
    dense = np.zeros((4, 6), dtype=np.float32)
    dense[0, [0, 3]], dense[1], dense[3, [1, 2, 3, 4, 5]] = 1, 1, 1
    model = CDAE((4, 6), 3, negatives=3000, loss="sampled", generator=generator())
    rows, items = model.draw_negatives(Interactions.from_scipy(csr_array(dense), np.arange(4)))
    counts = np.zeros((4, 6))
    np.add.at(counts, (rows.numpy(), items.numpy()), 1)
    # User 1 has chosen everything, user 2 nothing.
    assert counts.sum(1).tolist() == [6000, 0, 0, 15000]
    assert not counts[dense == 1].any()
    assert counts[0, [1, 2, 4, 5]] == pytest.approx(1500, rel=0.1)


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_initial_values(density):
    model = CDAE((3000, 2000), 100, density=density, generator=generator())
    for layer, rows in ((model.input, 2000), (model.users, 3000), (model.output, 2000)):
        values = sparsecore.weight_parameter(layer)
        assert values.std().item() == pytest.approx((2 / (rows + 100)) ** 0.5, rel=0.02)
    assert not model.input_bias.any()
    assert not model.output.bias.any()


def test_batches_hold_every_user_with_an_interaction_once(tiny):
    train = tiny.train.copy()
    train.data[train.indptr[7] : train.indptr[8]] = 0
    train.eliminate_zeros()

    class Data:
        pass

    data = Data()
    data.train = train
    model = CDAE(train.shape, 4)
    batches = list(model.batches(data, 50, generator(3)))
    assert len(batches) == model.steps_per_epoch(data, 50) == 3
    users = torch.cat([batch.users for batch in batches]).tolist()
    assert sorted(users) == [u for u in range(120) if u != 7]
    assert users != sorted(users)
    for batch in batches:
        for row, user in enumerate(batch.users.tolist()):
            items = batch.items[batch.pointers[row] : batch.pointers[row + 1]]
            assert items.tolist() == train[[user]].indices.tolist()


def test_only_users_of_the_training_data_are_scored():
    with pytest.raises(DataError, match="9 users"):
        make().score(np.array([0, -1]), random_matrix(2))
