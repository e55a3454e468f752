"""Coverage, novelty, exposure and recall by popularity, against values counted by hand and by plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from recsys.data import EvalSet
from recsys.errors import RecsysError
from recsys.evaluation import beyond_accuracy, draw_candidates, rank_full, rank_sampled
from recsys.evaluation.beyond import GROUPS, popularity_groups


def matrix(rows: list[list[int]], n_items: int) -> csr_array:
    dense = np.zeros((len(rows), n_items), dtype=np.float32)
    for row, items in enumerate(rows):
        dense[row, items] = 1
    return csr_array(dense)


def test_known_values() -> None:
    # Popularity 4, 2, 1, 1, 0 of 4 users: head {0}, mid {1}, tail {2, 3, 4}.
    train = matrix([[0, 1], [0, 1], [0, 2], [0, 3]], 5)
    eval_set = EvalSet(train, matrix([[2, 3], [3], [1, 4], []], 5), np.arange(4, dtype=np.int64))
    scores = torch.tensor([[0.0, 0, 3, 2, 1], [0, 0, 3, 2, 1], [0, 3, 0, 2, 1], [0, 0, 0, 0, 0]])
    ranking = rank_full(lambda users, _: scores[users], eval_set, [1, 2])
    got = beyond_accuracy(ranking, train, [1, 2])
    # First places: items 2, 2, 1; first two: 2 3, 2 3, 1 3.
    assert got["coverage@1"] == pytest.approx(2 / 5)
    assert got["coverage@2"] == pytest.approx(3 / 5)
    assert got["novelty@1"] == pytest.approx((2 + 2 + 1) / 3)
    assert got["novelty@2"] == pytest.approx((2 * 5 + 1) / 6)
    # x = 0 0 0 1 2 and 0 0 1 2 3
    assert got["gini@1"] == pytest.approx((2 * 1 + 4 * 2) / (5 * 3))
    assert got["gini@2"] == pytest.approx((2 * 2 + 4 * 3) / (5 * 6))
    assert "recall_head@1" not in got  # nobody has a target there
    assert got["recall_mid@1"] == 1.0
    assert got["recall_tail@1"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert got["recall_tail@2"] == pytest.approx((1 + 1 + 0) / 3)
    with pytest.raises(RecsysError, match="at most 2"):
        beyond_accuracy(ranking, train, [3])


def test_items_that_nobody_chose_are_as_new_as_those_chosen_once() -> None:
    train = matrix([[0], [0], [0], [0]], 3)
    eval_set = EvalSet(matrix([[0]], 3), matrix([[1]], 3), np.zeros(1, np.int64))
    got = beyond_accuracy(rank_full(lambda u, _: torch.eye(3)[[1]], eval_set, [5]), train, [5])
    assert got["novelty@5"] == pytest.approx(math.log2(4))  # two items are left to recommend
    assert got["coverage@5"] == pytest.approx(2 / 3)


def test_groups_have_equal_shares_of_the_interactions() -> None:
    rng = np.random.default_rng(0)
    popularity = rng.zipf(1.7, 500).clip(max=60)
    groups = popularity_groups(popularity)
    shares = np.bincount(groups, popularity) / popularity.sum()
    np.testing.assert_allclose(shares, 1 / 3, atol=60 / popularity.sum())
    assert popularity[groups == 0].min() >= popularity[groups == 1].max()
    assert popularity[groups == 1].min() >= popularity[groups == 2].max()
    assert popularity_groups(np.array([0, 9, 0])).tolist() == [2, 1, 2]


def test_group_recall_is_that_of_plain_loops_and_there_after_sampling(tiny) -> None:
    popularity = np.bincount(tiny.train.indices, minlength=tiny.n_items)
    groups = popularity_groups(popularity)
    scores = torch.rand(tiny.n_users, tiny.n_items, generator=torch.Generator().manual_seed(0))
    full = rank_full(lambda users, _: scores[users], tiny.test, [10])
    got = beyond_accuracy(full, tiny.train, [10])
    for number, name in enumerate(GROUPS):
        values = []
        for place, row in enumerate(full.rows):
            assert full.recommended is not None
            wanted = {i for i in tiny.test.targets[[row]].indices if groups[i] == number}
            if wanted:
                values.append(len(wanted & set(full.recommended[place])) / len(wanted))
        assert got[f"recall_{name}@10"] == pytest.approx(np.mean(values))
    drawn = draw_candidates(tiny.test, 5, 0)
    sampled = rank_sampled(lambda u, _, items: scores[u].gather(1, items), tiny.test, drawn, [10])
    assert {name.partition("@")[0] for name in beyond_accuracy(sampled, tiny.train, [10])} == {
        f"recall_{name}" for name in GROUPS
    }


def by_definition(
    listed: dict[int, list[int]],
    wanted: dict[int, set[int]],
    places: dict[int, dict[int, int]],
    chosen: np.ndarray,
    k: int,
) -> dict[str, float]:
    """The metrics from their definitions: users' lists, targets, the targets' places (from 1), and who chose what."""
    n_users, n_items = chosen.shape
    shown = [item for items in listed.values() for item in items[:k]]
    counts = np.array([shown.count(item) for item in range(n_items)])
    bits = [math.log2(n_users / max(1, sum(user[item] for user in chosen))) for item in shown]
    # Gini: half the mean difference of two items drawn with replacement, relative to the mean.
    spread = np.abs(counts[:, None] - counts[None, :]).mean() / 2
    values = {
        f"coverage@{k}": len(set(shown)) / n_items,
        f"novelty@{k}": sum(bits) / len(bits),
        f"gini@{k}": spread / counts.mean(),
    }
    # Items end to end, as many units long as users chose them; the third of the line that holds an item's middle.
    popularity = [int(sum(user[item] for user in chosen)) for item in range(n_items)]
    total, done, group = sum(popularity), 0, {}
    for item in sorted(range(n_items), key=lambda item: (-popularity[item], item)):
        twice = 2 * done + popularity[item]
        group[item] = "head" if 3 * twice < 2 * total else "mid" if 3 * twice < 4 * total else "tail"
        done += popularity[item]
    for name in GROUPS:
        recalls = []
        for user, targets in wanted.items():
            own = [item for item in targets if group[item] == name]
            if own:
                recalls.append(sum(places[user][item] <= k for item in own) / len(own))
        if recalls:
            values[f"recall_{name}@{k}"] = sum(recalls) / len(recalls)
    return values


@settings(max_examples=40)
@given(
    users=st.integers(1, 12),
    items=st.integers(2, 15),
    share=st.floats(0.05, 0.7),
    ks=st.lists(st.integers(1, 20), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 2**32 - 1),
)
def test_values_are_those_of_the_definitions(
    users: int, items: int, share: float, ks: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    part = rng.random((users, items)) ** rng.uniform(0.3, 3, items)  # some items for many, some for few
    chosen, sought = part < share, (part >= share) & (part < (1 + share) / 2)
    part[0, :2] = chosen[0, :2] = sought[0, :2] = False
    chosen[0, 0] = sought[0, 1] = True
    matrices = [csr_array(one.astype(np.float32)) for one in (chosen, sought)]
    eval_set = EvalSet(*matrices, np.arange(users))
    scores = rng.permuted(np.tile(np.arange(items, dtype=np.float32), (users, 1)), axis=1)  # no ties
    tensor = torch.from_numpy(scores)

    wanted = {u: set(np.flatnonzero(sought[u]).tolist()) for u in range(users) if sought[u].any()}
    listed = {
        u: sorted(np.flatnonzero(~chosen[u]).tolist(), key=lambda i, u=u: -scores[u, i]) for u in wanted
    }
    places = {u: {item: place for place, item in enumerate(listed[u], 1)} for u in wanted}
    got = beyond_accuracy(rank_full(lambda u, _: tensor[u], eval_set, ks), matrices[0], ks)
    expected: dict[str, float] = {}
    for k in ks:
        expected |= by_definition(listed, wanted, places, chosen, k)
    assert got == pytest.approx(expected, abs=1e-9)

    # Sampled: the recalls alone, by the places among candidates.
    drawn = draw_candidates(eval_set, 1, seed)
    for u in wanted:
        among = wanted[u] | set(drawn.items[drawn.pointers[u] : drawn.pointers[u + 1]].tolist())
        listed[u] = sorted(among, key=lambda i, u=u: -scores[u, i])
        places[u] = {item: place for place, item in enumerate(listed[u], 1)}
    sampled = rank_sampled(lambda u, _, among: tensor[u].gather(1, among), eval_set, drawn, ks)
    expected = {}
    for k in ks:
        found = by_definition(listed, wanted, places, chosen, k)
        expected |= {name: value for name, value in found.items() if name.startswith("recall")}
    assert beyond_accuracy(sampled, matrices[0], ks) == pytest.approx(expected, abs=1e-9)
