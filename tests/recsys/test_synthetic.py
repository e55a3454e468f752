"""The synthetic generator: exact sizes, seeds, the planted structure, and an oracle nothing beats."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data import Dataset, EvalSet, load, synthetic
from recsys.data.synthetic import _activity, _draw, _finish, _order
from recsys.errors import ConfigError, DataError
from recsys.evaluation import evaluate, evaluate_oracle


@pytest.fixture(scope="module", params=["ratio", "heldout"])
def dataset(request: pytest.FixtureRequest) -> Dataset:
    return synthetic(1000, 800, 40_000, n_clusters=10, seed=3, split=request.param)


def all_pairs(dataset: Dataset) -> int:
    shown = 0 if dataset.test.users[0] >= 0 else dataset.test.inputs.nnz + dataset.validation.inputs.nnz
    return dataset.train.nnz + dataset.validation.targets.nnz + dataset.test.targets.nnz + shown


def test_has_the_interactions_asked_for(dataset: Dataset) -> None:
    assert all_pairs(dataset) == 40_000
    assert dataset.n_items == 800
    assert dataset.item_ids[42] == "i0042"
    assert dataset.user_ids[0].startswith("u0")


def test_same_seed_same_data_other_seed_other_data() -> None:
    first, again, other = (synthetic(n_interactions=3000, seed=seed) for seed in (1, 1, 2))
    for part in ("validation", "test"):
        for matrix in ("inputs", "targets"):
            a, b = (getattr(getattr(d, part), matrix) for d in (first, again))
            np.testing.assert_array_equal(a.indices, b.indices)
            np.testing.assert_array_equal(a.indptr, b.indptr)
    assert not np.array_equal(first.test.targets.indices, other.test.targets.indices)


def test_popularity_and_activity_have_long_tails() -> None:
    dataset = synthetic(1000, 800, 40_000, seed=3)
    popularity = np.sort(np.bincount(dataset.train.indices, minlength=800))[::-1]
    activity = np.sort(np.diff(dataset.train.indptr))[::-1]
    assert popularity[:80].sum() > 0.3 * popularity.sum()  # uniform interest would give a tenth
    assert activity[:100].sum() > 0.25 * activity.sum()
    assert activity[-1] >= 3  # of at least 5, one each to validation and test


def test_oracle_beats_popularity_and_random(dataset: Dataset) -> None:
    popularity = np.bincount(dataset.train.indices, minlength=dataset.n_items).astype(np.float32)
    noise = torch.Generator().manual_seed(0)
    for part in (dataset.validation, dataset.test):
        best = evaluate_oracle(dataset, part)["ndcg@20"]
        popular = evaluate(lambda users, _: torch.from_numpy(popularity).expand(len(users), -1), part)
        guess = evaluate(lambda users, i: torch.rand(i.shape, generator=noise), part)
        assert best > 1.5 * popular["ndcg@20"] > 1.5 * guess["ndcg@20"]


def test_no_perturbation_of_the_oracle_is_better(dataset: Dataset) -> None:
    oracle = dataset.oracle
    assert oracle is not None
    test = dataset.test
    rows = np.arange(len(test))
    scores = torch.from_numpy(oracle(test, rows)).log()
    # Whole sets at once, so that per-user values pair up.
    _, best = evaluate(lambda users, _: scores, test, batch_size=len(test), per_user=True)
    generator = torch.Generator().manual_seed(1)
    means = []
    for scale in (0.3, 1.0, 3.0):
        other = scores + scale * torch.randn(scores.shape, generator=generator)
        _, values = evaluate(lambda users, _, s=other: s, test, batch_size=len(test), per_user=True)
        gain = values["ndcg@20"] - best["ndcg@20"]
        assert gain.mean() < 3 * gain.std() / np.sqrt(len(gain))
        means.append(gain.mean())
    assert means[2] < means[1] < 0  # and the more is changed, the worse


def test_oracle_scores_are_probabilities_of_the_rows_asked_for(dataset: Dataset) -> None:
    oracle = dataset.oracle
    assert oracle is not None
    every = oracle(dataset.test, np.arange(len(dataset.test)))
    np.testing.assert_allclose(every.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(oracle(dataset.test, np.array([7, 2])), every[[7, 2]])
    assert (every > 0).all()


def test_oracle_refuses_users_it_does_not_know(dataset: Dataset) -> None:
    oracle = dataset.oracle
    assert oracle is not None
    part = dataset.test
    foreign = EvalSet(part.inputs, part.targets, part.users, np.char.add(part.user_ids, "x"))
    with pytest.raises(DataError, match="not of its dataset"):
        oracle(foreign, np.array([0]))
    with pytest.raises(DataError, match="no user_ids"):
        oracle(EvalSet(part.inputs, part.targets, part.users), np.array([0]))


def test_draw_follows_the_probabilities() -> None:
    """Inclusion frequencies of successive sampling, two of four items, against their exact values."""
    phi = np.array([[0.4, 0.3, 0.2, 0.1]])
    users = 20_000
    keys = _draw(np.ones((users, 1)), phi, np.full(users, 2), np.random.default_rng(0))
    assert len(np.unique(keys)) == 2 * users
    p = phi[0]
    exact = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    np.testing.assert_allclose(np.bincount(keys % 4) / users, exact, atol=4 * 0.5 / np.sqrt(users))


def test_the_exact_finish_follows_the_same_probabilities() -> None:
    phi = np.array([[0.4, 0.3, 0.2, 0.1]])
    users = 20_000
    taken = np.arange(users) * 4  # everyone has item 0 already and lacks one more
    keys = _finish(np.ones((users, 1)), phi, taken, np.ones(users, dtype=np.int64), np.random.default_rng(0))
    share = np.bincount(keys % 4, minlength=4) / users
    np.testing.assert_allclose(share, [0, 3 / 6, 2 / 6, 1 / 6], atol=4 * 0.5 / np.sqrt(users))
    np.testing.assert_array_equal(keys // 4, np.arange(users))


def test_users_who_take_nearly_all_they_may_are_drawn_exactly() -> None:
    dataset = synthetic(50, 40, 50 * 20, n_clusters=4)  # half of the items: the exact finish has work to do
    lengths = np.diff((dataset.test.inputs + dataset.test.targets).indptr)
    np.testing.assert_array_equal(lengths, 20)


@settings(deadline=None, max_examples=60)
@given(users=st.integers(1, 60), most=st.integers(5, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_activity_sums_exactly_within_its_bounds(users: int, most: int, share: float, seed: int) -> None:
    total = 5 * users + int(share * (most - 5) * users)
    counts = _activity(users, most, total, np.random.default_rng(seed))
    assert counts.sum() == total
    assert counts.min() >= 5
    assert counts.max() <= most


def test_order_is_of_every_train_interaction_and_follows_the_seed(dataset: Dataset) -> None:
    assert dataset.order is not None
    again, other = (synthetic(1000, 800, 40_000, n_clusters=10, seed=seed) for seed in (3, 4))
    for user in range(0, dataset.n_users, 50):
        row = slice(*dataset.train.indptr[user : user + 2])
        assert len(set(dataset.order[row].tolist())) == row.stop - row.start
        of_user = again.order[slice(*again.train.indptr[user : user + 2])]
        known = again.test.inputs.indptr, again.test.targets.indptr
        assert of_user.max() < sum(np.diff(pointers)[user] for pointers in known)
    if dataset.test.users[0] >= 0:
        np.testing.assert_array_equal(dataset.order, again.order)
    assert not np.array_equal(again.order[:100], other.order[:100])


@given(seed=st.integers(0, 99), users=st.integers(1, 6), clusters=st.integers(1, 5))
def test_order_is_of_sessions_that_follow_their_clusters_series(seed: int, users: int, clusters: int) -> None:
    rng = np.random.default_rng(seed)
    chosen = rng.random((users, 30)) < 0.6
    chosen[:, 0] = True
    pairs, home = np.flatnonzero(chosen), rng.integers(clusters, size=30)
    place = _order(pairs, 30, home, np.random.default_rng(1))
    assert np.array_equal(place, _order(pairs, 30, home, np.random.default_rng(1)))
    series = np.random.default_rng(1).permutation(30)
    for user in range(users):
        mine = pairs // 30 == user
        assert sorted(place[mine].tolist()) == list(range(mine.sum()))
        history = (pairs[mine] % 30)[np.argsort(place[mine])]
        for cluster in range(clusters):
            of_cluster = series[history[home[history] == cluster]]
            assert (np.diff(of_cluster) > 0).all()
        # As many runs of one cluster as there are sessions, or fewer where two of a cluster meet.
        runs = 1 + int((np.diff(home[history]) != 0).sum())
        assert runs <= sum(-(-n // 5) for n in np.bincount(home[history]).tolist())


def test_smallest_size_and_one_cluster() -> None:
    dataset = load("synthetic", interactions=1000, clusters=1)
    assert all_pairs(dataset) == 1000
    assert evaluate_oracle(dataset, dataset.test, ks=(5,))["recall@5"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interactions": 0}, "interactions: expected at least 1"),
        ({"users": -1}, "users: expected at least 1"),
        ({"users": 0}, "users: expected at least 1"),
        ({"clusters": 0}, "clusters: expected at least 1"),
        ({"items": 10, "users": 10, "interactions": 50, "clusters": 11}, "at most one per item"),
        ({"users": 100, "items": 100, "interactions": 499}, r"500\.\.5000"),
        ({"users": 100, "items": 100, "interactions": 5001}, r"500\.\.5000"),
        ({"test": 1.5}, "fraction"),
        ({"users": "abc"}, "users: expected a whole number, got 'abc'"),
        ({"items": 60.0}, "items: expected a whole number, got 60.0"),
        ({"clusters": True}, "clusters: expected a whole number, got True"),
        ({"user": 10}, "unknown option 'user'; nearest: 'users'"),
    ],
)
def test_impossible_sizes_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("synthetic", **options)


def test_leave_one_out_takes_the_newest():
    whole = load("synthetic", users=30, items=40, interactions=300, split="loo", validation=0)
    data = load("synthetic", users=30, items=40, interactions=300, split="loo")
    assert (np.diff(data.test.targets.indptr) == 1).all()
    assert (data.test.targets != whole.test.targets).nnz == 0
    newest = [
        whole.train.indices[a:b][whole.order[a:b].argmax()] for a, b in itertools.pairwise(whole.train.indptr)
    ]
    assert data.validation.targets.indices.tolist() == newest
