"""Negatives: never what the user has chosen, each of the rest as often as its weight says, the same for one seed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.stats import chi2

from recsys.errors import DataError
from recsys.models import negatives
from recsys.models.build import build_model
from recsys.models.negatives import NegativeSampler, negative_batches


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_matrix(users, items, density, seed=0):
    return csr_array((np.random.default_rng(seed).random((users, items)) < density).astype(np.float32))


def expected_shares(dense, exponent):
    """(n_users, n_items) probabilities by the formula; rows of zeros where there is nothing to draw."""
    weights = (1 - dense) * (dense.sum(0) ** exponent if exponent else np.ones(dense.shape[1]))
    total = weights.sum(1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights, dtype=np.float64), where=total > 0)


@settings(max_examples=60, deadline=None)
@given(
    users=st.integers(1, 9),
    items=st.integers(1, 12),
    density=st.sampled_from([0.0, 0.2, 0.6, 0.95, 1.0]),
    exponent=st.sampled_from([0.0, 0.5, 1.0, 3.0, 40.0]),
    seed=st.integers(0, 1000),
)
def test_only_items_that_are_not_chosen_are_drawn(users, items, density, exponent, seed):
    train = random_matrix(users, items, density, seed)
    sampler = NegativeSampler(train, exponent)
    shares = expected_shares(train.toarray(), exponent)
    assert sampler.drawable.tolist() == (shares.sum(1) > 0).tolist()
    who = sampler.drawable.nonzero().squeeze(1).repeat(3)
    drawn = sampler.draw(who, 20, generator(seed))
    assert drawn.shape == (len(who), 20)
    assert (shares[who.numpy()[:, None], drawn.numpy()] > 0).all()


@pytest.mark.parametrize("exponent", [0.0, 0.75, 2.0])
def test_shares_are_those_of_the_formula(exponent):
    train = random_matrix(6, 30, 0.3, seed=2)
    sampler = NegativeSampler(train, exponent)
    n = 40_000
    drawn = sampler.draw(torch.arange(6), n, generator(1)).numpy()
    shares = expected_shares(train.toarray(), exponent)
    for user in range(6):
        counts = np.bincount(drawn[user], minlength=30)
        drawable = shares[user] > 0
        assert not counts[~drawable].any()
        statistic = ((counts - n * shares[user])[drawable] ** 2 / (n * shares[user][drawable])).sum()
        assert statistic < chi2.ppf(1 - 1e-4, drawable.sum() - 1)


def test_integer_weights_are_close_to_the_powers():
    degrees = torch.tensor([0, 1, 7, 50_000])
    weights = negatives._integer_weights(degrees, 0.75, 1_000_000).double()
    exact = degrees.double() ** 0.75
    torch.testing.assert_close(weights / weights.sum(), exact / exact.sum(), rtol=1e-6, atol=0)


def test_many_users_fit_into_the_points():
    """The points of all users are one sorted array of int64, however many users there are."""
    n = 2_000_000
    train = csr_array((np.ones(n, np.float32), np.zeros(n, np.int64), np.arange(n + 1)), shape=(n, 3))
    sampler = NegativeSampler(train, 1.0)
    assert not sampler.drawable.any()
    assert int(sampler._points[-1]) > 0
    assert bool((sampler._points.diff() > 0).all())
    assert set(NegativeSampler(train).draw(torch.tensor([n - 1]), 50, generator())[0].tolist()) == {1, 2}


@pytest.mark.parametrize("name", ["bprmf", "convncf", "lightgcn", "neumf"])
def test_models_draw_negatives_by_popularity(name, tiny):
    """With an exponent, items that nobody has chosen are no negatives; and the popular ones are drawn more often."""
    train = tiny.train.tolil()
    train[:, 7] = 0
    data = SimpleNamespace(train=csr_array(train))
    degree = torch.from_numpy(np.bincount(data.train.indices, minlength=tiny.n_items))
    found = {}
    for exponent in (0.0, 1.0):
        settings = {**SMALL[name][0], "name": name, "popularity": exponent}
        model = build_model(settings, data.train, 1.0, generator=torch.Generator().manual_seed(0))
        batches = model.batches(data, 64, torch.Generator().manual_seed(1))
        drawn = torch.cat([batch.negatives.reshape(-1) for batch in batches])
        found[exponent] = float(degree[drawn].double().mean())
        assert bool((drawn == 7).any()) == (exponent == 0)
    assert found[1.0] > 1.05 * found[0.0]


def test_same_seed_same_draws():
    sampler = NegativeSampler(random_matrix(5, 9, 0.4), 0.5)
    users = torch.tensor([0, 3, 3, 1])
    draws = [sampler.draw(users, 7, generator(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_user_with_everything_is_named():
    train = csr_array(np.array([[1, 0], [1, 1]], np.float32))
    with pytest.raises(DataError, match=r"user 1 .* has chosen every item"):
        NegativeSampler(train).draw(torch.tensor([0, 1]), 3, generator())
    # Nobody has chosen item 1, so popularity never draws it.
    with pytest.raises(DataError, match="user 0"):
        NegativeSampler(csr_array(np.array([[1, 0]], np.float32)), 1.0).draw(
            torch.tensor([0]), 3, generator()
        )


@pytest.mark.parametrize("exponent", [-1.0, float("nan"), float("inf")])
def test_bad_exponent(exponent):
    with pytest.raises(DataError, match="exponent"):
        NegativeSampler(random_matrix(2, 2, 0.5), exponent)


@pytest.mark.parametrize("at_once", [1, 60, 1 << 18])
def test_batches_hold_every_interaction_once_but_those_of_full_users(at_once, monkeypatch):
    monkeypatch.setattr(negatives, "_DRAWS", at_once)
    dense = (np.random.default_rng(0).random((20, 15)) < 0.4).astype(np.float32)
    dense[3], dense[4] = 1, 0
    sampler = NegativeSampler(csr_array(dense))
    batches = list(negative_batches(sampler, 4, 7, generator(1)))
    expected = dense.copy()
    expected[3] = 0
    count = int(expected.sum())
    assert [batch.size for batch in batches] == [7] * (count // 7) + [count % 7] * (count % 7 > 0)
    seen = np.zeros_like(dense)
    for batch in batches:
        np.add.at(seen, (batch.users.numpy(), batch.positives.numpy()), 1)
        assert batch.negatives.shape == (batch.size, 4)
        assert not dense[batch.users.numpy()[:, None], batch.negatives.numpy()].any()
    assert (seen == expected).all()
    other = list(negative_batches(sampler, 4, 7, generator(2)))
    assert not torch.equal(batches[0].users, other[0].users)
