"""Splits: every pair lands in exactly one part, a seed gives the same parts again, sizes are as stated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from recsys.data import Dataset, EvalSet, SplitOptions
from recsys.data.dataset import binary_csr
from recsys.data.split import carve_validation, heldout_split, ratio_split, split_dataset
from recsys.errors import ConfigError, DataError

Pairs = set[tuple[int, int]]


def pairs(matrix: csr_array) -> Pairs:
    coo = matrix.tocoo()
    return set(zip(coo.row.tolist(), coo.col.tolist(), strict=True))


@st.composite
def matrices(draw: st.DrawFn) -> csr_array:
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 15))
    dense = np.random.default_rng(draw(st.integers(0, 10**6))).random(shape) < draw(st.floats(0.05, 0.95))
    return csr_array(dense.astype(np.float32))


fractions = st.sampled_from([0.0, 0.1, 0.25, 0.45])


@settings(deadline=None)
@given(matrix=matrices(), validation=fractions, test=fractions, seed=st.integers(0, 5))
def test_ratio_split_divides_every_user(matrix: csr_array, validation: float, test: float, seed: int) -> None:
    parts = ratio_split(matrix, validation, test, seed)
    assert sum(part.nnz for part in parts) == matrix.nnz
    assert set.union(*map(pairs, parts)) == pairs(matrix)
    train, held_validation, held_test = (np.diff(part.indptr) for part in parts)
    lengths = np.diff(matrix.indptr)
    assert (train[lengths > 0] >= 1).all()
    for fraction, held in ((validation, held_validation), (test, held_test)):
        assert (held[lengths < 3] == 0).all()
        if fraction == 0.0:
            assert held.sum() == 0
        else:
            assert (held[lengths >= 3] >= 1).all()
            assert (np.abs(held - lengths * fraction) <= 1).all()
    for part, again in zip(parts, ratio_split(matrix, validation, test, seed), strict=True):
        assert pairs(part) == pairs(again)


@settings(deadline=None)
@given(matrix=matrices(), validation=fractions, test=fractions, fold_in=st.sampled_from([0.2, 0.5, 0.8]))
def test_heldout_split_divides_the_users(
    matrix: csr_array, validation: float, test: float, fold_in: float
) -> None:
    train, *parts = heldout_split(matrix, validation, test, fold_in, seed=1)
    rows = np.concatenate([train, *(part[0] for part in parts)])
    assert sorted(rows) == list(range(matrix.shape[0]))
    eligible = int((np.diff(matrix.indptr) >= 2).sum())
    assert [len(part[0]) for part in parts] == [round(eligible * validation), round(eligible * test)]
    for part_rows, inputs, targets in parts:
        assert pairs(inputs).isdisjoint(pairs(targets))
        assert pairs(inputs) | pairs(targets) == pairs(csr_array(matrix[part_rows]))
        assert (np.diff(inputs.indptr) >= 1).all()
        assert (np.diff(targets.indptr) >= 1).all()


def test_parts_are_drawn_at_random_and_by_seed() -> None:
    matrix = csr_array(np.ones((400, 10), dtype=np.float32))
    _, _, test = ratio_split(matrix, 0.1, 0.1, seed=0)
    per_item = np.bincount(test.indices, minlength=10)
    assert per_item.min() > 15  # 40 expected each
    assert pairs(test) != pairs(ratio_split(matrix, 0.1, 0.1, seed=1)[2])


def test_carved_validation_comes_out_of_train() -> None:
    matrix = csr_array(np.ones((30, 20), dtype=np.float32))
    rest, validation = carve_validation(matrix, 0.1, seed=4)
    assert pairs(rest) | pairs(validation) == pairs(matrix)
    assert pairs(rest).isdisjoint(pairs(validation))
    np.testing.assert_array_equal(np.diff(validation.indptr), 2)


def full(kind: str, seed: int = 0) -> Dataset:
    matrix = csr_array((np.random.default_rng(0).random((50, 30)) < 0.4).astype(np.float32))
    users, items = np.arange(50) * 10, np.arange(30) + 7
    return split_dataset("toy", matrix, users, items, SplitOptions(kind), seed)


def test_history_of_a_trained_user_grows_from_validation_to_test() -> None:
    dataset = full("ratio")
    assert pairs(dataset.validation.inputs) == pairs(dataset.train)
    assert pairs(dataset.test.inputs) == pairs(dataset.train) | pairs(dataset.validation.targets)
    np.testing.assert_array_equal(dataset.test.users, np.arange(50))
    np.testing.assert_array_equal(dataset.test.user_ids, dataset.user_ids)


def test_heldout_users_are_not_in_train_and_keep_their_ids() -> None:
    dataset = full("heldout")
    assert dataset.n_users == 40
    assert (dataset.test.users == -1).all()
    ids = [dataset.user_ids, dataset.validation.user_ids, dataset.test.user_ids]
    assert sorted(np.concatenate(ids)) == [10 * user for user in range(50)]
    summary = dataset.summary()
    assert (summary["evaluated_on"], summary["interactions"]) == (
        "held-out users",
        full("ratio").summary()["interactions"],
    )


@pytest.mark.parametrize("kind", ["ratio", "heldout"])
def test_a_seed_fixes_the_split(kind: str) -> None:
    first, again, other = full(kind, 0), full(kind, 0), full(kind, 1)
    assert pairs(first.test.targets) == pairs(again.test.targets)
    assert pairs(first.train) == pairs(again.train)
    assert pairs(first.test.targets) != pairs(other.test.targets)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "time"},
        {"validation": -0.1},
        {"test": 1.0},
        {"validation": 0.5, "test": 0.5},
        {"fold_in": 0.0},
        {"fold_in": 1.0},
    ],
)
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError):
        SplitOptions(**options)


def test_empty_data_is_refused() -> None:
    nothing = csr_array((3, 4), dtype=np.float32)
    with pytest.raises(DataError, match="no interaction"):
        split_dataset("none", nothing, np.arange(3), np.arange(4), SplitOptions())


# The containers.


def test_binary_csr_merges_and_counts_repeats() -> None:
    matrix, repeated = binary_csr(np.array([1, 0, 1, 1]), np.array([2, 0, 2, 1]), (2, 3))
    assert repeated == 1
    np.testing.assert_array_equal(matrix.toarray(), [[1, 0, 0], [0, 1, 1]])
    for rows, cols in (([2], [0]), ([0], [3]), ([-1], [0])):
        with pytest.raises(DataError, match="must lie in"):
            binary_csr(np.array(rows), np.array(cols), (2, 3))


def damaged(**changes: object) -> csr_array:
    parts = {"data": np.ones(3, np.float32), "indices": np.array([0, 2, 1]), "indptr": np.array([0, 2, 3])}
    parts |= changes
    matrix = csr_array((2, 3), dtype=np.float32)
    matrix.data, matrix.indices, matrix.indptr = parts["data"], parts["indices"], parts["indptr"]
    return matrix


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (damaged(indices=np.array([2, 0, 1])), "sorted and unique"),
        (damaged(indices=np.array([1, 1, 1])), "sorted and unique"),
        (damaged(indices=np.array([0, 3, 1])), "not a valid CSR"),
        (damaged(data=np.array([1, 2, 1], np.float32)), "must be 1"),
        (damaged(data=np.array([1, np.nan, 1], np.float32)), "must be 1"),
        (damaged(data=np.ones(3)), "float32"),
        (damaged().tocsc(), "csr_array"),
    ],
)
def test_a_matrix_that_is_not_canonical_is_refused(matrix: csr_array, message: str) -> None:
    empty = csr_array((2, 3), dtype=np.float32)
    EvalSet(damaged(), empty, np.arange(2))  # sound as it stands
    with pytest.raises(DataError, match=message):
        EvalSet(matrix, empty, np.arange(2))


def test_eval_set_parts_must_agree() -> None:
    matrix, empty = damaged(), csr_array((2, 3), dtype=np.float32)
    with pytest.raises(DataError, match="1 pairs are both"):
        EvalSet(matrix, binary_csr(np.array([0]), np.array([2]), (2, 3))[0], np.arange(2))
    with pytest.raises(DataError, match="one shape"):
        EvalSet(matrix, csr_array((2, 4), dtype=np.float32), np.arange(2))
    for users in (np.arange(3), np.arange(2, dtype=np.int32), np.array([-2, 0])):
        with pytest.raises(DataError, match=r"EvalSet\.users"):
            EvalSet(matrix, empty, users)
    with pytest.raises(DataError, match="user_ids: expected 2 ids"):
        EvalSet(matrix, empty, np.arange(2), np.arange(3))


def test_dataset_parts_must_agree_and_the_summary_counts() -> None:
    matrix, empty = damaged(), csr_array((2, 3), dtype=np.float32)
    part = EvalSet(matrix, empty, np.arange(2))
    good = Dataset("toy", matrix, part, part, np.arange(2), np.array(["a", "b", "c"]))
    assert (good.n_users, good.n_items, good.n_interactions) == (2, 3, 3)
    summary = good.summary()
    assert (summary["empty_users"], summary["empty_items"], summary["test_users"]) == (0, 0, 0)
    sparse = Dataset("toy", binary_csr(np.array([1]), np.array([2]), (2, 3))[0], part, part, *ids())
    assert (sparse.summary()["empty_users"], sparse.summary()["empty_items"]) == (1, 2)
    with pytest.raises(DataError, match="no interaction left"):
        Dataset("toy", empty, part, part, *ids())
    with pytest.raises(DataError, match="item_ids: expected 3"):
        Dataset("toy", matrix, part, part, np.arange(2), np.arange(4))
    with pytest.raises(DataError, match="user_ids: 1 ids occur more than once"):
        Dataset("toy", matrix, part, part, np.array([4, 4]), np.arange(3))
    with pytest.raises(DataError, match="int64 or unicode"):
        Dataset("toy", matrix, part, part, np.arange(2.0), np.arange(3))
    beyond = EvalSet(matrix, empty, np.array([0, 2]))
    with pytest.raises(DataError, match="training row 2 of 2"):
        Dataset("toy", matrix, part, beyond, *ids())
    wide = csr_array((2, 4), dtype=np.float32)
    with pytest.raises(DataError, match="4 items, train has 3"):
        Dataset("toy", matrix, part, EvalSet(wide, wide, np.arange(2)), *ids())


def ids() -> tuple[np.ndarray, np.ndarray]:
    return np.arange(2), np.arange(3)
