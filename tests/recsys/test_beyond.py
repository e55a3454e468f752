"""Coverage, novelty, exposure and recall by popularity, against values counted by hand and by plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
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
