"""Splits that follow the order, against plain loops; the published leave-one-out split with its negatives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse import csr_array

from recsys.data import Dataset, SplitOptions, load
from recsys.data.interactions import merge_pairs
from recsys.data.order_split import loo_split, temporal_split
from recsys.data.split import split_dataset
from recsys.errors import ConfigError, DataError

Rows = list[tuple[int, int, int]]
rows_strategy = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=40
)


def pairs(matrix: csr_array) -> set[tuple[int, int]]:
    coo = matrix.tocoo()
    return set(zip(coo.row.tolist(), coo.col.tolist(), strict=True))


def histories(rows: Rows) -> dict[int, list[tuple[int, int]]]:
    """Of each user, (time, item) of the pairs in order, only the first of a repeated one."""
    found: dict[int, dict[int, int]] = {}
    for user, item, time in sorted(rows, key=lambda row: row[2]):  # stable, as merging is
        found.setdefault(user, {}).setdefault(item, time)
    return {user: [(time, item) for item, time in items.items()] for user, items in found.items()}


def merged(rows: Rows) -> tuple[csr_array, np.ndarray, np.ndarray]:
    users, items, time = (np.array(part) for part in zip(*rows, strict=True))
    matrix, order, moments, _ = merge_pairs(users, items, (7, 8), time.astype(np.float64))
    assert moments is not None
    return matrix, order, moments


@given(rows=rows_strategy)
def test_merging_keeps_the_earliest_and_the_order(rows: Rows) -> None:
    matrix, order, time = merged(rows)
    for user, history in histories(rows).items():
        entries = slice(matrix.indptr[user], matrix.indptr[user + 1])
        found = sorted(zip(order[entries], time[entries], matrix.indices[entries], strict=True))
        assert [(moment, item) for _, moment, item in found] == history
        assert [place for place, _, _ in found] == list(range(len(history)))
        assert (np.diff(matrix.indices[entries]) > 0).all()


@given(rows=rows_strategy, validation=st.booleans(), test=st.booleans())
def test_leave_one_out(rows: Rows, validation: bool, test: bool) -> None:
    matrix, order, _ = merged(rows)
    expected: list[set[tuple[int, int]]] = [set(), set(), set()]
    for user, history in histories(rows).items():
        left = [item for _, item in history]
        for part, asked in ((2, test), (1, validation)):
            if asked and len(left) >= 2:
                expected[part].add((user, left.pop()))
        expected[0] |= {(user, item) for item in left}
    assert [pairs(part) for part in loo_split(matrix, order, validation, test)] == expected


@given(rows=rows_strategy, validation=st.sampled_from([0.0, 0.1, 0.3]), test=st.sampled_from([0.1, 0.4]))
@example(
    rows=[(0, 0, 0), (0, 1, 1), (0, 2, 1), (1, 1, 0)], validation=0.1, test=0.4
)  # no validation pair is left
def test_temporal(rows: Rows, validation: float, test: float) -> None:
    matrix, _, time = merged(rows)
    found = [(user, item, moment) for user, h in histories(rows).items() for moment, item in h]
    ascending = sorted(moment for _, _, moment in found)
    n = len(found)

    def cut(share: float) -> float:
        size = round(n * share)
        return ascending[n - size] if size else np.inf

    parts: list[set[tuple[int, int]]] = [set(), set(), set()]
    for user, item, moment in found:
        parts[2 if moment >= cut(test) else 1 if moment >= cut(test + validation) else 0].add((user, item))
    users, items = ({pair[axis] for pair in parts[0]} for axis in (0, 1))
    known = [{(u, i) for u, i in part if u in users and i in items} for part in parts]
    if not parts[0] or not known[2]:
        with pytest.raises(DataError, match=r"temporal|too many"):
            temporal_split(matrix, time, validation, test)
        return
    *split, kept_users, kept_items, kept, notes = temporal_split(matrix, time, validation, test)
    assert (set(kept_users.tolist()), set(kept_items.tolist())) == (users, items)
    for part, expected in zip(split, known, strict=True):
        assert {(kept_users[u], kept_items[i]) for u, i in pairs(part)} == expected
    dropped = n - sum(map(len, known))
    assert (~kept).sum() == dropped
    assert any(f"{dropped} later pairs" in note for note in notes) == (dropped > 0)
    assert any("no validation pair" in note for note in notes) == (validation > 0 and not known[1])
    assert len(notes) == (dropped > 0) + (validation > 0 and not known[1])


@pytest.mark.parametrize("kind", ["ratio", "heldout", "loo", "temporal"])
def test_the_order_of_train_is_that_of_the_histories(kind: str) -> None:
    rng = np.random.default_rng(3)
    rows = list(zip(rng.integers(0, 7, 90).tolist(), rng.integers(0, 8, 90).tolist(), range(90), strict=True))
    matrix, order, time = merged(rows)
    options = SplitOptions(kind, 0.2, 0.2)  # type: ignore[arg-type]
    dataset = split_dataset(
        "toy", matrix, np.arange(7) + 10, np.arange(8) + 50, options, order=order, time=time
    )
    assert dataset.order is not None
    history = histories(rows)
    for row, user in enumerate(dataset.user_ids):
        entries = slice(dataset.train.indptr[row], dataset.train.indptr[row + 1])
        items = dataset.item_ids[dataset.train.indices[entries]] - 50
        ordered = items[np.argsort(dataset.order[entries])].tolist()
        assert ordered == [item for _, item in history[user - 10] if item in items]
        assert sorted(dataset.order[entries]) == list(range(len(items)))


def test_an_order_that_is_needed_and_absent(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("user,item\n1,9\n1,4\n1,6\n1,5\n2,4\n2,9\n")
    with pytest.raises(
        DataError,
        match=r"'loo' takes the last interaction by time.*no timestamps.*order='file' .--order file",
    ):
        load(str(path), split="loo")
    dataset = load(str(path), split="loo", order="file")
    assert dataset.item_ids[dataset.test.targets.indices].tolist() == [5, 9]
    assert dataset.item_ids[dataset.validation.targets.indices].tolist() == [6]
    assert load(str(path), split="loo", order="file", validation=0).validation.targets.nnz == 0
    with pytest.raises(DataError, match="'temporal' needs a timestamp"):
        load(str(path), split="temporal")
    with pytest.raises(DataError, match="order by time needs"):
        load(str(path), split="loo", order="time")
    with pytest.raises(DataError, match="'temporal' needs a timestamp"):
        load("synthetic", split="temporal")
    sparse.save_npz(tmp_path / "own.npz", csr_array(np.ones((3, 4))))
    with pytest.raises(DataError, match="no timestamps"):
        load(str(tmp_path / "own.npz"), split="loo")
    with pytest.raises(ConfigError, match="order does not apply"):
        load(str(tmp_path / "own.npz"), split="loo", order="file")


# A published leave-one-out split.


def loo_folder(root: Path, with_source: bool = True) -> tuple[Dataset, Path]:
    """set/interactions.csv.gz in the order of the file, and set/loo with train and test of its leave-one-out."""
    rng = np.random.default_rng(0)
    rows = "".join(f"{u},{i}\n" for u, i in rng.integers(1, 15, (120, 2)).tolist())
    (root / "set" / "loo").mkdir(parents=True)
    source = root / "set" / "interactions.csv"
    source.write_text("user,item\n" + rows)
    whole = load(str(source), split="loo", order="file", validation=0)
    folder = root / "set" / "loo"
    sparse.save_npz(folder / "train.npz", whole.train)
    sparse.save_npz(folder / "test.npz", whole.test.targets)
    negatives = rng.integers(0, whole.n_items, (whole.n_users, 5)).astype(np.int16)
    np.savez(folder / "test_negatives.npz", negatives=negatives, item_ids=whole.item_ids)
    if not with_source:
        source.unlink()
    return whole, folder


def test_the_last_train_item_validates_a_published_leave_one_out_split(tmp_path: Path) -> None:
    whole, _ = loo_folder(tmp_path)
    dataset = load("set/loo", tmp_path)
    assert "order of the train pairs and user ids: rows of interactions.csv" in dataset.notes
    np.testing.assert_array_equal(dataset.user_ids, whole.user_ids)
    by_file = load(str(tmp_path / "set" / "interactions.csv"), split="loo", order="file")
    assert pairs(dataset.train) == pairs(by_file.train)
    assert pairs(dataset.validation.targets) == pairs(by_file.validation.targets)
    assert pairs(dataset.test.targets) == pairs(by_file.test.targets)
    np.testing.assert_array_equal(dataset.order, by_file.order)
    assert dataset.test.candidates is not None
    assert dataset.test.candidates.shape == (whole.n_users, 5)
    assert dataset.validation.candidates is None


@pytest.mark.parametrize(("validation", "taken"), [(None, "one"), (1, "one"), (0, "none"), (0.2, "some")])
def test_validation_of_a_published_leave_one_out_split(
    tmp_path: Path, validation: float | None, taken: str
) -> None:
    whole, _ = loo_folder(tmp_path, with_source=False)
    dataset = load("set/loo", tmp_path, validation=validation)
    assert dataset.order is None
    counts = np.diff(dataset.validation.targets.indptr)
    assert pairs(dataset.train) | pairs(dataset.validation.targets) == pairs(whole.train)
    if taken == "one":
        assert (counts == 1).all()
        other = load("set/loo", tmp_path, seed=1, validation=validation)
        assert pairs(other.validation.targets) != pairs(dataset.validation.targets)
        assert any("a random train item" in note for note in dataset.notes)
    else:
        assert counts.sum() == (0 if taken == "none" else pytest.approx(0.2 * whole.train.nnz, rel=0.3))
    for bad in (1.5, -1, True, "x"):
        with pytest.raises(ConfigError):
            load("set/loo", tmp_path, validation=bad)


def test_a_file_of_other_pairs_tells_no_order(tmp_path: Path) -> None:
    _, folder = loo_folder(tmp_path)
    source = tmp_path / "set" / "interactions.csv"
    lines = source.read_text().splitlines()
    source.write_text("\n".join([lines[0], *lines[8:], lines[1]]))
    assert load(str(folder)).order is None


@pytest.mark.real
def test_real_ncf_leave_one_out(real_data: Path) -> None:
    dataset = load("ml-1m/ncf_loo", real_data)
    whole = load("ml-1m", real_data, split="loo", order="file")
    np.testing.assert_array_equal(dataset.user_ids, np.arange(1, 6041))
    assert dataset.order is not None
    assert (np.diff(dataset.validation.targets.indptr) == 1).all()
    # The last train item in the order of the file, as NCF's test item need not be the last of the file.
    column = np.searchsorted(whole.item_ids, dataset.item_ids)
    known = dataset.test.inputs
    assert known.nnz == 994_169
    with_order = load("ml-1m", real_data, split="loo", order="file", validation=0)
    agree = np.mean(column[dataset.test.targets.indices] == with_order.test.targets.indices)
    assert agree == 159 / 6040  # NCF took the last by time; the file is in another order
    candidates = dataset.test.candidates
    assert candidates is not None
    assert candidates.shape == (6040, 99)
    assert int((candidates == dataset.test.targets.indices[:, None]).sum()) == 156
    everything = load("ml-1m/ncf_loo", real_data, validation=0)
    assert everything.train.nnz == 994_169
    assert len(everything.validation.rows_with_targets) == 0


@pytest.mark.real
def test_real_splits_by_time(real_data: Path) -> None:
    for name, users in (("ml-100k", 943), ("foursquare-nyc", 1083)):
        loo = load(name, real_data, split="loo")
        assert (loo.n_users, loo.test.targets.nnz, loo.validation.targets.nnz) == (users, users, users)
        temporal = load(name, real_data, split="temporal")
        assert temporal.train.nnz < loo.train.nnz
        assert len(temporal.test.rows_with_targets) > 20
