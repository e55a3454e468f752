"""Metrics against an independent implementation that ranks one user at a time in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from recsys.data import EvalSet, synthetic
from recsys.errors import RecsysError
from recsys.evaluation import METRICS, evaluate, evaluate_oracle, rank_full


def eval_set_of(inputs: list[set[int]], targets: list[set[int]], n_items: int) -> EvalSet:
    def matrix(rows: list[set[int]]) -> csr_array:
        dense = np.zeros((len(rows), n_items), dtype=np.float32)
        for row, items in enumerate(rows):
            dense[row, list(items)] = 1.0
        return csr_array(dense)

    return EvalSet(matrix(inputs), matrix(targets), np.arange(len(inputs), dtype=np.int64))


def naive(scores: list[list[float]], inputs: list[set[int]], targets: list[set[int]], k: int) -> dict:
    rows = {metric: [] for metric in METRICS}
    for score, known, wanted in zip(scores, inputs, targets, strict=True):
        if not wanted:
            continue
        left = [i for i in range(len(score)) if i not in known]
        ranking = sorted(left, key=lambda i: (-score[i], i in wanted))[:k]
        gain = hits = first = precision = 0.0
        for rank, item in enumerate(ranking, start=1):
            if item in wanted:
                hits += 1
                gain += 1 / math.log2(rank + 1)
                precision += hits / rank
                first = first or 1 / rank
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(wanted)) + 1))
        rows["recall"].append(hits / len(wanted))
        rows["truncated_recall"].append(hits / min(k, len(wanted)))
        rows["hr"].append(1.0 if hits else 0.0)
        rows["ndcg"].append(gain / ideal)
        rows["mrr"].append(first)
        rows["map"].append(precision / min(k, len(wanted)))
    return {f"{metric}@{k}": values for metric, values in rows.items()}


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[set[int]], list[set[int]], int]:
    n_items = draw(st.integers(1, 12))
    items = st.sets(st.integers(0, n_items - 1))
    pairs = draw(st.lists(st.tuples(items, items), min_size=1, max_size=7))
    inputs = [known - wanted for known, wanted in pairs]
    targets = [wanted for _, wanted in pairs]
    targets[0] = targets[0] or {0}
    inputs[0] = inputs[0] - targets[0]
    one = st.integers(0, draw(st.integers(0, 12))).map(float)  # many equal scores, or few
    scores = [draw(st.lists(one, min_size=n_items, max_size=n_items)) for _ in pairs]
    return scores, inputs, targets, n_items


@settings(deadline=None, max_examples=150)
@given(problem=problems(), ks=st.lists(st.integers(1, 15), min_size=1, max_size=3), batch=st.integers(1, 9))
def test_agrees_with_ranking_one_user_at_a_time(problem: tuple, ks: list[int], batch: int) -> None:
    scores, inputs, targets, n_items = problem
    eval_set = eval_set_of(inputs, targets, n_items)
    table = torch.tensor(scores)

    means, values = evaluate(lambda users, _: table[users], eval_set, ks, batch_size=batch, per_user=True)

    for k in ks:
        for key, expected in naive(scores, inputs, targets, k).items():
            np.testing.assert_allclose(values[key], expected, rtol=1e-12, err_msg=key)
            assert means[key] == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    assert set(means) == {f"{metric}@{k}" for metric in METRICS for k in ks}
    assert means == evaluate(lambda users, _: table[users], eval_set, ks)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), n_items=st.integers(60, 400), values=st.sampled_from([2, 8, 1000]))
def test_agrees_where_the_best_are_chosen_in_two_passes(seed: int, n_items: int, values: int) -> None:
    draw = np.random.default_rng(seed)
    scores = draw.integers(-values, 0, (5, n_items)).astype(np.float32)
    inputs = [
        set(draw.choice(n_items, draw.integers(0, n_items - 3), replace=False).tolist()) for _ in scores
    ]
    targets = [set(draw.choice(n_items, 3, replace=False).tolist()) - known | {0} for known in inputs]
    inputs = [known - {0} for known in inputs]
    table = torch.from_numpy(scores)

    for k in (1, 3, 6):
        _, got = evaluate(
            lambda users, _: table[users],
            eval_set_of(inputs, targets, n_items),
            (k,),
            batch_size=2,
            per_user=True,
        )
        for key, expected in naive(scores.tolist(), inputs, targets, k).items():
            np.testing.assert_allclose(got[key], expected, rtol=1e-12, err_msg=key)


def test_best_items_of_a_wide_catalogue_are_recommended_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(7, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eval_set = eval_set_of(
        [{int(row.argmax())} for row in scores], [{int(row.argmin())} for row in scores], 1000
    )
    calls = []

    def score(users: np.ndarray, _: csr_array) -> torch.Tensor:
        calls.append(len(users))
        return scores[users]

    whole = rank_full(score, eval_set, (4,)).recommended
    monkeypatch.setattr("recsys.evaluation.full._SCORES_AT_ONCE", 2500)
    parts = rank_full(score, eval_set, (4,)).recommended

    assert calls == [7, 2, 2, 2, 1]
    np.testing.assert_array_equal(whole, scores.argsort(dim=1, descending=True)[:, 1:5].numpy())
    np.testing.assert_array_equal(parts, whole)


def test_known_values() -> None:
    eval_set = eval_set_of([{0}], [{1, 3, 4}], n_items=5)
    scores = torch.tensor([[9.0, 2.0, 5.0, 4.0, 1.0]])  # ranking: 2, 3, 1, 4
    got = evaluate(lambda users, _: scores, eval_set, ks=(2, 3))
    assert got["recall@2"] == pytest.approx(1 / 3)
    assert got["truncated_recall@2"] == pytest.approx(1 / 2)
    assert got["hr@2"] == 1.0
    assert got["ndcg@2"] == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert got["recall@3"] == pytest.approx(2 / 3)


def test_ties_count_against_the_model() -> None:
    """A model that scores every item alike finds a target only when all others come before it."""
    eval_set = eval_set_of([{0}], [{1, 3}], n_items=5)
    got = evaluate(lambda users, _: torch.zeros(1, 5), eval_set, ks=(2, 3, 4))
    assert [got[f"hr@{k}"] for k in (2, 3, 4)] == [0.0, 1.0, 1.0]
    assert got["mrr@4"] == pytest.approx(1 / 3)
    assert got["recall@3"] == 0.5
    assert got["map@4"] == pytest.approx((1 / 3 + 2 / 4) / 2)
    sparse = torch.tensor([[0.0, 2.0, 0.0, 0.0, 2.0]])  # ranking: 4, 1 (tied), 2, 3 (tied)
    got = evaluate(lambda users, _: sparse, eval_set, ks=(4,))
    assert got["map@4"] == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_score_gets_users_and_history_of_users_with_targets() -> None:
    eval_set = eval_set_of([{0}, {1}, {2}], [{1}, set(), {0}], n_items=3)
    seen: list[tuple[list[int], np.ndarray]] = []

    def score(users: np.ndarray, inputs: csr_array) -> torch.Tensor:
        seen.append((users.tolist(), inputs.toarray()))
        return torch.zeros(inputs.shape)

    evaluate(score, eval_set, ks=(1,), batch_size=1)
    assert [users for users, _ in seen] == [[0], [2]]
    np.testing.assert_array_equal(seen[1][1], [[0, 0, 1]])


def test_scores_are_left_as_they_are_and_need_no_gradient() -> None:
    table = torch.ones(1, 3, requires_grad=True)
    recorded: list[bool] = []

    def score(users: np.ndarray, inputs: csr_array) -> torch.Tensor:
        result = table * 2
        recorded.append(result.requires_grad)
        return result

    evaluate(score, eval_set_of([{0}], [{1}], 3), ks=(1,))
    assert recorded == [False]
    fixed = torch.tensor([[3.0, 2.0, 1.0]])
    evaluate(lambda users, _: fixed, eval_set_of([{0}], [{1}], 3), ks=(1,))
    assert fixed.tolist() == [[3.0, 2.0, 1.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_are_refused(bad: float) -> None:
    scores = torch.tensor([[1.0, 2.0], [bad, 0.0]])
    with pytest.raises(RecsysError, match=r"NaN or infinite for 1 of 2 users"):
        evaluate(lambda users, _: scores, eval_set_of([set(), set()], [{0}, {1}], 2))


def test_wrong_shape_no_targets_and_bad_cutoffs_are_refused() -> None:
    eval_set = eval_set_of([set()], [{0}], 3)
    with pytest.raises(RecsysError, match=r"expected shape \(1, 3\), got \(1, 2\)"):
        evaluate(lambda users, _: torch.zeros(1, 2), eval_set)
    with pytest.raises(RecsysError, match="no user of this set has a target"):
        evaluate(lambda users, _: torch.zeros(1, 3), eval_set_of([{1}], [set()], 3))
    for ks in ((), (0,)):
        with pytest.raises(RecsysError, match="cut-offs"):
            evaluate(lambda users, _: torch.zeros(1, 3), eval_set, ks=ks)
    with pytest.raises(RecsysError, match="batch_size"):
        evaluate(lambda users, _: torch.zeros(1, 3), eval_set, batch_size=0)


def test_only_synthetic_data_has_an_oracle() -> None:
    dataset = synthetic(n_interactions=1000)
    assert evaluate_oracle(dataset, dataset.test)["recall@20"] > 0
    stripped = type(dataset)(
        "bare", dataset.train, dataset.validation, dataset.test, dataset.user_ids, dataset.item_ids
    )
    with pytest.raises(RecsysError, match="bare: only synthetic"):
        evaluate_oracle(stripped, stripped.test)


def test_cutoffs_beyond_the_catalogue_change_nothing_and_take_no_memory() -> None:
    eval_set = eval_set_of([{0}, {1}], [{1, 2}, {3}], 5)
    scores = torch.tensor([[5.0, 1, 4, 3, 2], [1, 2, 3, 4, 5]])
    few = evaluate(lambda users, _: scores[users], eval_set, ks=(5,))
    ranking = rank_full(lambda users, _: scores[users], eval_set, (10**12,))
    assert ranking.recommended is not None
    assert ranking.recommended.shape == (2, 5)
    for name, value in ranking.means((10**12,)).items():
        assert value == pytest.approx(few[name.replace(str(10**12), "5")])
