"""What can be chosen of a table, filters, ids of other kinds, and folders of given parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from recsys.config import parse_value
from recsys.data import available, load
from recsys.data.dataset import binary_csr
from recsys.data.formats import read_interactions
from recsys.data.interactions import Interactions, k_core
from recsys.data.options import ReadOptions
from recsys.errors import ConfigError, DataError
from recsys.training import session


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def pairs(data: Interactions) -> list[tuple[Any, Any]]:
    """Raw pairs, user by user in the order of their histories."""
    coo = data.matrix.tocoo()
    order = np.lexsort((data.order, coo.row)) if data.order is not None else np.arange(len(coo.row))
    users, items = data.user_ids[coo.row[order]], data.item_ids[coo.col[order]]
    return list(zip(users.tolist(), items.tolist(), strict=True))


# Columns, separators, headers.

SWAPPED = {"user_column": "2", "item_column": 1}


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("a.csv", "when,movie,userId\n5,b,u\n4,a,u\n", {"item_column": "Movie", "timestamp_column": "when"}),
        ("a.csv", "u;b;5\nu;a;4\n", {"separator": ";", "header": False, "timestamp_column": 3}),
        ("a.tsv", "b|||u|||1|||5\na|||u|||1|||4\n", {"separator": "|||", "header": False, **SWAPPED}),
        (
            "a.dat",
            "u\titem\ttimestamp\nu\tb\t5\nu\ta\t4\n",
            {"separator": "\t", "header": True, "user_column": "u"},
        ),
        ("a.inter", "item_id:token\tuser_id:token\ttimestamp:float\nb\tu\t5.5\na\tu\t4\n", {}),
        ("a.csv", 'user,item,note,timestamp\r\n"u","b","x, ""y""\nz",5\r\nu,a,,4\r\n', {}),
        ("a.csv", "user,item,timestamp\ru,b,5\ru,a,4\r", {}),
    ],
)
def test_columns_can_be_chosen(tmp_path: Path, name: str, text: str, options: dict[str, Any]) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert pairs(read_interactions(path, ReadOptions(**options))) == [("u", "a"), ("u", "b")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestamp_column": "when"}, "must name the columns when once each; it reads 'user, item, rating'"),
        ({"item_column": "user"}, "two fields"),
        ({"header": False, "user_column": 9}, r"expected the place of a column, 1\.\.3, got '9'"),
        ({"header": False, "user_column": "user"}, "expected the place of a column"),
        ({"order": "time"}, "order by time needs a column of timestamps"),
        ({"separator": ";"}, "must name the columns user and item"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.csv", "user,item,rating\n1,2,3\n")
    with pytest.raises(DataError, match=rf"a\.csv: .*{message}"):
        read_interactions(path, ReadOptions(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"ids": "number"},
        {"order": "random"},
        {"separator": ""},
        {"separator": '"'},
        {"min_user": -1},
        {"min_rating": "x"},
        {"min_rating": True},
        {"min_user": True},
        {"separator": 5},
        {"header": "no"},
        {"header": 0},
        {"user_column": 1.5},
        {"separator": "\0"},
        {"separator": "\udcff"},
        {"item_column": True},
    ],
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ReadOptions(**options)


def test_a_file_without_a_header_is_told_how_to_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "1,10\n2,11\n")
    with pytest.raises(DataError, match=r"it reads '1, 10'.*\(--no-header, data\.options\.header=false\)"):
        read_interactions(path)
    assert read_interactions(path, ReadOptions(header=False)).matrix.nnz == 2


@pytest.mark.parametrize(
    ("name", "separator"),
    [("own.csv", ";"), ("own.csv", "\t"), ("own.tsv", "|"), ("own.dat", "\t"), ("own.data", " ")],
)
def test_another_separator_is_named_and_works(tmp_path: Path, name: str, separator: str) -> None:
    header = "user,item,rating\n" if name.endswith("sv") else ""
    path = write(tmp_path / name, (header + "1,10,4\n1,11,2\n").replace(",", separator))
    with pytest.raises(DataError) as caught:
        read_interactions(path)
    told = f"separator={separator!r} (--separator {separator!r}, 'data.options.separator={json.dumps(separator)}')"
    assert told in str(caught.value)
    assert parse_value(json.dumps(separator)) == separator
    assert read_interactions(path, ReadOptions(separator=separator)).matrix.nnz == 2


def test_a_single_column_is_not_told_of_separators(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Other names are given by"):
        read_interactions(write(tmp_path / "own.csv", "user\n1\n"))


@pytest.mark.parametrize("fields", [3, 4])
@pytest.mark.parametrize("block", [1 << 22, 9])
def test_columns_in_a_text_file_are_not_taken_for_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: int, block: int
) -> None:
    monkeypatch.setattr("recsys.data.lists.BLOCK", block)
    rows = [(0, 10, 4, 90), (0, 11, 1, 91), (2, 10, 5, 92)]
    text = "".join("\t".join(map(str, row[:fields])) + "\n" for row in rows)
    with pytest.raises(DataError, match=rf"own\.txt: .*every line has {fields} fields.*own\.data"):
        read_interactions(write(tmp_path / "own.txt", text))
    found = read_interactions(write(tmp_path / "own.data", text))
    assert found.item_ids.tolist() == [10, 11]
    # Lists: a user a line, or lines of different lengths.
    assert read_interactions(write(tmp_path / "a.txt", text.replace("0\t11", "1\t11"))).matrix.nnz == 3 * (
        fields - 1
    )
    assert read_interactions(write(tmp_path / "b.txt", text + "2 12\n")).matrix.nnz == 3 * (fields - 1) + 1


def test_options_that_do_not_apply(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "0 1 2\n")
    with pytest.raises(ConfigError, match="min_rating does not apply"):
        read_interactions(path, ReadOptions(min_rating=3))
    with pytest.raises(DataError, match="have no timestamps"):
        read_interactions(path, ReadOptions(order="time"))
    pyarrow.parquet.write_table(pa.table({"user": [1], "item": [2]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="neither a header line"):
        read_interactions(tmp_path / "a.parquet", ReadOptions(header=False))


# Ids.


def test_kinds_of_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "user,item\n0439,2\nB00,10\n0439,10\n")  # a leading zero: text
    data = read_interactions(path)
    assert (data.user_ids.tolist(), data.item_ids.tolist()) == (["0439", "B00"], [2, 10])
    assert data.notes == ("a.csv: user ids are text", "a.csv: 2 item ids with gaps in 2..10, numbered anew")
    path = write(tmp_path / "b.csv", "user,item\n1,2\nB,10\n")
    with pytest.raises(DataError, match=r"b\.csv:3: column user: .*as in the first row, got 'B'; ids='text'"):
        read_interactions(path)
    for ids in ("any", "text"):
        data = read_interactions(path, ReadOptions(ids=ids))
        assert data.user_ids.tolist() == ["1", "B"]
        assert data.item_ids.tolist() == ([2, 10] if ids == "any" else ["10", "2"])
    # RecBole's tokens may be anything.
    data = read_interactions(write(tmp_path / "c.inter", "user_id:token\titem_id:token\n1\t5\nB\t6\n"))
    assert (data.user_ids.tolist(), data.item_ids.tolist()) == (["1", "B"], [5, 6])


def test_the_largest_id_survives_and_a_larger_one_is_refused(tmp_path: Path) -> None:
    large = 10**18 - 1
    data = read_interactions(write(tmp_path / "a.csv", f"user,item\n{large},1\n"))
    assert data.user_ids.tolist() == [large]
    with pytest.raises(DataError, match=r"a\.csv:2: column user: .*18 digits"):
        read_interactions(write(tmp_path / "a.csv", f"user,item\n{2**63},1\n"))
    with pytest.raises(DataError, match=r"a\.txt:2: an id of more than 18 digits"):
        read_interactions(write(tmp_path / "a.txt", f"1 2\n1 {2**63}\n"))


KINDS = [
    pa.int32(),
    pa.uint8(),
    pa.string(),
    pa.large_string(),
    pa.binary(),
    pa.dictionary(pa.int8(), pa.string()),
]


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_ids_of_every_kind(tmp_path: Path, kind: pa.DataType) -> None:
    users = pa.array(["7", "3", "7"])
    users = users.dictionary_encode() if pa.types.is_dictionary(kind) else users.cast(kind)
    moments = pa.array([3_500_000, 2_000_000, 1_000_000], pa.timestamp("us"))
    pyarrow.parquet.write_table(
        pa.table({"User": users, "item": [5, 6, 8], "extra": ["x"] * 3, "timestamp": moments}),
        tmp_path / "a.parquet",
    )
    data = read_interactions(tmp_path / "a.parquet")
    assert pairs(data) == [(3, 6), (7, 8), (7, 5)]
    assert data.time is not None
    assert data.time.tolist() == [2.0, 3.5, 1.0]
    assert read_interactions(tmp_path / "a.parquet", ReadOptions(ids="text")).user_ids.tolist() == ["3", "7"]


TIMES = {
    "2020-01-02": 1_577_923_200.0,
    "2020-01-02 03:04:05": 1_577_934_245.0,
    "2020-01-02T03:04:05.5": 1_577_934_245.5,
    "2020-01-02T03:04:05Z": 1_577_934_245.0,
    "2020-01-02T03:04:05.250000000": 1_577_934_245.25,
    "2020-01-02T03:04:05+02:00": 1_577_927_045.0,
}


@pytest.mark.parametrize("text", TIMES)
@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_dates_and_times_as_text_are_seconds(tmp_path: Path, text: str, name: str) -> None:
    times = [text, text.replace("2020", "2019")]
    if name == "a.csv":
        write(tmp_path / name, f"userId,movieId,timestamp\n1,5,{times[0]}\n1,4,{times[1]}\n")
    else:
        table = pa.table({"userId": [1, 1], "movieId": [5, 4], "timestamp": times})
        pyarrow.parquet.write_table(table, tmp_path / name)
    data = read_interactions(tmp_path / name)
    assert data.time is not None
    assert sorted(data.time.tolist()) == [TIMES[text] - 365 * 86_400, TIMES[text]]
    assert pairs(data) == [(1, 4), (1, 5)]


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        ("7", "2020-01-01", "'2020-01-01'"),
        ("2020-01-01", "7", "'7'"),
        ("2020-01-01", "2020-01-01T00:00:00Z", "00Z"),
        ("7", "", "empty"),
        ("x", "7", "'x'"),
    ],
)
def test_bad_times_are_refused_with_the_way_out(tmp_path: Path, first: str, second: str, shown: str) -> None:
    path = write(tmp_path / "a.csv", f"user,item,timestamp\n1,5,{first}\n1,4,{second}\n")
    line = 2 if first == "x" else 3
    with pytest.raises(DataError, match=rf"a\.csv:{line}: column timestamp: .*{shown}.*--order file"):
        read_interactions(path)
    data = read_interactions(path, ReadOptions(order="file"))
    assert (data.time, pairs(data)) == (None, [(1, 5), (1, 4)])


def test_an_item_column_goes_before_that_of_movielens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "userId,movieId,itemId\n1,5,6\n")
    assert pairs(read_interactions(path)) == [(1, 6)]


@pytest.mark.parametrize("code", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path: Path, code: str) -> None:
    (tmp_path / "a.csv").write_bytes("\ufeffuser,item\n1,2\n".encode(code))
    with pytest.raises(DataError, match="expected UTF-8 text, got UTF-16"):
        read_interactions(tmp_path / "a.csv")


@pytest.mark.parametrize("kind", [pa.date32(), pa.date64()])
def test_parquet_dates_are_seconds(tmp_path: Path, kind: pa.DataType) -> None:
    days = pa.array([2, 0, 1], pa.int32()).cast(pa.date32()).cast(kind)
    table = pa.table({"user": [1, 1, 2], "item": [5, 6, 5], "timestamp": days})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    data = read_interactions(tmp_path / "a.parquet")
    assert data.time is not None
    assert data.time.tolist() == [172_800.0, 0.0, 86_400.0]


@pytest.mark.parametrize("kind", [pa.float64(), pa.int64(), pa.string(), pa.large_string(), pa.binary()])
def test_empty_ratings_matter_only_where_ratings_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    ratings = pa.array(["4", None, "2"]).cast(kind)
    table = pa.table({"user": [1, 1, 2], "item": [5, 6, 5], "rating": ratings})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    write(tmp_path / "a.csv", "user,item,rating\n1,5,4\n1,6,\n2,5,2\n")
    for name, place in (("a.parquet", "row 2"), ("a.csv", "a.csv:3")):
        data = read_interactions(tmp_path / name)
        assert data.matrix.nnz == 3
        assert f"{name}: 1 rows without a rating; ratings are not read" in data.notes
        with pytest.raises(DataError, match=f"{place}: column rating: .* the field is empty"):
            read_interactions(tmp_path / name, ReadOptions(min_rating=1))


def test_a_parquet_column_of_nothing_is_no_rating(tmp_path: Path) -> None:
    table = pa.table(
        {"user": pa.array(["a", "b"], pa.large_binary()), "item": [5, 6], "rating": [None, None]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    data = read_interactions(tmp_path / "a.parquet")
    assert (data.matrix.nnz, data.user_ids.tolist()) == (2, ["a", "b"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": [1, None], "item": [1, 2]}, "row 2: column user: the field is empty"),
        ({"user": [1, -2], "item": [1, 2]}, "row 2: column user: expected a whole number .* got '-2'"),
        ({"user": [1.0, 2.5], "item": [1, 2]}, "column user: expected integers or text, got double"),
        ({"user": ["a", ""], "item": [1, 2]}, "row 2: column user: the field is empty"),
        ({"user": [1, 2], "item": [1, 2], "rating": [float("nan"), 1]}, "row 1: column rating: .* got 'nan'"),
        ({"user": [1, 2], "other": [1, 2]}, "must name the columns user and item"),
        ({"user": pa.array([], pa.int64()), "item": pa.array([], pa.int64())}, "no interaction"),
        (
            {"user": pa.array([2**63 + 1], pa.uint64()), "item": [1]},
            r"column user: expected integers below 2\^63, got 9223372036854775809; write ids",
        ),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: .*{message}"):
        read_interactions(tmp_path / "a.parquet")


def test_raw_ids_reach_the_saved_recommender(tmp_path: Path, make_config) -> None:
    rng = np.random.default_rng(0)
    rows = "".join(f"{u}-é,{i},{t}\n" for t, (u, i) in enumerate(rng.integers(0, 25, (400, 2)).tolist()))
    path = write(tmp_path / "own.csv", "user,item,timestamp\n" + rows)
    dataset = load(str(path), split="loo")
    trainer = session.Trainer(make_config("dense", "train.epochs=1"), dataset)
    session.fit(trainer, quiet=True)
    saved = session.saved_recommender(trainer)
    saved.save(tmp_path / "saved")
    found = session.SavedRecommender.load(tmp_path / "saved").recommend("7-é", k=3)
    assert {item for item, _ in found} <= set(range(25))


# Filters.


def test_min_rating_drops_rows_and_what_only_they_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "user,item,rating\n1,2,3\n1,3,2.5\n4,3,1\n1,9,5\n")
    data = read_interactions(path, ReadOptions(min_rating=3))
    assert (data.user_ids.tolist(), data.item_ids.tolist()) == ([1], [2, 9])
    assert "a.csv: 2 rows with a rating below 3 left out" in data.notes
    with pytest.raises(DataError, match="no rating reaches min_rating 6"):
        read_interactions(path, ReadOptions(min_rating=6))
    with pytest.raises(DataError, match="min_rating needs a column"):
        read_interactions(write(path, "user,item\n1,2\n"), ReadOptions(min_rating=6))


@given(seed=st.integers(0, 10**6), min_user=st.integers(0, 4), min_item=st.integers(0, 4))
def test_k_core_is_the_largest_stable_set(seed: int, min_user: int, min_item: int) -> None:
    dense = np.random.default_rng(seed).random((9, 8)) < 0.35
    matrix = csr_array(dense.astype(np.float32))
    data = Interactions(matrix, np.arange(9) + 100, np.arange(8) + 50, order=None)
    expected = dense.copy()
    for _ in range(20):  # leaving out one at a time gives the same set in any order
        expected[expected.sum(1) < min_user] = False
        expected[:, expected.sum(0) < min_item] = False
    if not expected.any():
        with pytest.raises(DataError, match="no interaction is left"):
            k_core(data, min_user, min_item)
        return
    found = k_core(data, min_user, min_item)
    coo = found.matrix.tocoo()
    kept = {(u - 100, i - 50) for u, i in zip(found.user_ids[coo.row], found.item_ids[coo.col], strict=True)}
    assert kept == set(zip(*np.nonzero(expected), strict=True))
    if expected.sum() < dense.sum():
        assert (np.diff(found.matrix.indptr) >= max(1, min_user)).all()


def test_k_core_keeps_the_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "user,item,timestamp\n1,5,9\n1,6,8\n1,7,7\n2,5,1\n2,7,2\n3,6,1\n")
    data = read_interactions(path, ReadOptions(min_user=2, min_item=2))
    assert pairs(data) == [(1, 7), (1, 5), (2, 5), (2, 7)]
    assert data.notes[-1] == "2 pairs left out: at least 2 a user and 2 an item"
    assert load(str(path), min_user=2, split="loo").test.targets.nnz == 2


# Order.


def test_order_of_the_file_unless_it_was_sorted(tmp_path: Path) -> None:
    sorted_file = write(tmp_path / "a.csv", "user,item\n1,5\n2,7\n1,6\n")
    assert read_interactions(sorted_file).order is None
    assert pairs(read_interactions(sorted_file, ReadOptions(order="file"))) == [(1, 5), (1, 6), (2, 7)]
    data = read_interactions(write(tmp_path / "b.csv", "user,item\n1,6\n1,5\n1,6\n"))
    assert pairs(data) == [(1, 6), (1, 5)]
    timed = write(tmp_path / "c.csv", "user,item,timestamp\n1,6,-9\n1,5,3\n1,4,-9\n")
    assert pairs(read_interactions(timed)) == [(1, 6), (1, 4), (1, 5)]  # equal times: as in the file
    by_file = read_interactions(timed, ReadOptions(order="file"))
    assert pairs(by_file) == [(1, 6), (1, 5), (1, 4)]
    assert by_file.time is None


# Folders of given parts.


def test_lightgcn_folder(tmp_path: Path) -> None:
    write(tmp_path / "g" / "train.txt", "0 3 1 2\n1 0 4\n2 \n3 1\n")
    write(tmp_path / "g" / "test.txt", "0 5\n1 1\n2 0\n")
    write(tmp_path / "g" / "item_list.txt", "org_id remap_id\n")  # beside it, not read
    dataset = load("g", tmp_path, validation=0)
    assert available(tmp_path) == ["synthetic", "g"]
    assert dataset.train.toarray().tolist() == [
        [0, 1, 1, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [0] * 6,
        [0, 1, 0, 0, 0, 0],
    ]
    assert dataset.test.targets.toarray().nonzero()[1].tolist() == [5, 1, 0]
    assert dataset.order is not None
    assert dataset.order.tolist() == [1, 2, 0, 0, 1, 0]
    # No user has two test items: the last of train is for validation.
    validated = load("g", tmp_path)
    assert validated.validation.targets.toarray().nonzero()[1].tolist() == [2, 4]
    assert load("g", tmp_path, split="ratio", test=0.3).n_items == 6
    with pytest.raises(ConfigError, match="'test' does not apply"):
        load("g", tmp_path, test=0.3)
    with pytest.raises(ConfigError, match="min_user"):
        load("g", tmp_path, min_user=2)


def test_recbole_benchmark_folder_with_mixed_kinds_of_ids(tmp_path: Path) -> None:
    header = "user_id:token\titem_id:token\n"
    for part, rows in {
        "train": "2\tb\n10\ta\n10\tb\n2\tc\n",
        "valid": "2\ta\n",
        "test": "10\td\nx\ta\n",
    }.items():
        write(tmp_path / "r" / f"r.{part}.inter", header + rows)
    dataset = load("r", tmp_path)
    assert dataset.user_ids.tolist() == ["10", "2", "x"]  # text everywhere, because of x
    assert dataset.item_ids.tolist() == ["a", "b", "c", "d"]
    assert dataset.train.toarray().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert dataset.validation.targets.toarray().nonzero() == (np.array([1]), np.array([0]))
    assert dataset.test.targets.toarray().tolist() == [[0, 0, 0, 1], [0] * 4, [1, 0, 0, 0]]
    with pytest.raises(ConfigError, match="'validation' does not apply"):
        load("r", tmp_path, validation=0.1)
    whole = load("r", tmp_path, validation=0)  # train on the validation part, too
    assert whole.train.toarray().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert not whole.validation.targets.nnz
    assert whole.test.targets.toarray().tolist() == dataset.test.targets.toarray().tolist()


def test_given_parts_with_timestamps_tell_the_order_of_all_of_them(tmp_path: Path) -> None:
    header = "user,item,timestamp\n"
    for part, rows in {"train": "1,5,30\n1,6,10\n", "valid": "1,4,20\n", "test": "1,7,40\n"}.items():
        write(tmp_path / "t" / f"{part}.csv", header + rows)
    whole = load("t", tmp_path, validation=0)
    assert whole.train.indices.tolist() == [0, 1, 2]  # items 4, 5, 6
    assert whole.order is not None
    assert whole.order.tolist() == [1, 2, 0]
    write(tmp_path / "t" / "valid.csv", header + "1,5,20\n")
    with pytest.raises(DataError, match="1 pairs are in both train and validation"):
        load("t", tmp_path, validation=0)


def test_given_parts_divided_anew_keep_their_timestamps(tmp_path: Path) -> None:
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    for part, rows in {
        "train": "2\tb\t5\n10\ta\t1\n10\tb\t9\n2\tc\t2\n",
        "test": "10\tc\t4\n2\tb\t7\n2\ta\t3\n",
    }.items():
        write(tmp_path / "r" / f"r.{part}.inter", header + rows)
    last = load("r", tmp_path, split="loo", validation=0)
    assert last.item_ids.tolist() == ["a", "b", "c"]
    assert last.test.targets.toarray().tolist() == [[0, 1, 0], [0, 1, 0]]  # user 2: b at 5, its first time
    assert last.order is not None
    assert last.order.tolist() == [1, 0, 0, 1]
    assert any("1 pairs are in more than one" in note for note in last.notes)
    later = load("r", tmp_path, split="temporal", validation=0, test=0.5)
    assert later.item_ids.tolist() == ["a", "c"]  # b is chosen later only
    assert later.test.targets.toarray().tolist() == [[0, 0], [0, 1]]
    assert load("r", tmp_path, split="ratio").summary()["interactions"] == 6

    for part in ("train", "test"):  # the order in one of two files is not the order of both
        path = tmp_path / "r" / f"r.{part}.inter"
        path.write_text("\n".join(line.rpartition("\t")[0] for line in path.read_text().splitlines()) + "\n")
    with pytest.raises(DataError, match="timestamps"):
        load("r", tmp_path, split="loo")


@pytest.mark.parametrize(
    "name", ["interactions.tsv", "ratings.dat", "u.data", "set.inter", "interactions.parquet"]
)
def test_folders_of_one_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "set" / name
    if name.endswith(".parquet"):
        path.parent.mkdir()
        pyarrow.parquet.write_table(pa.table({"user": [1, 1, 1], "item": [4, 5, 6]}), path)
    else:
        separator = "::" if name.endswith(".dat") else "\t"
        head = {"tsv": "user\titem\n", "inter": "user_id:token\titem_id:token\n"}.get(
            name.rpartition(".")[2], ""
        )
        write(path, head + "".join(f"1{separator}{item}\n" for item in (4, 5, 6)))
    dataset = load("set", tmp_path)
    assert (dataset.n_users, dataset.item_ids.tolist()) == (1, [4, 5, 6])
    assert load(str(tmp_path / "set")).n_items == 3
    with pytest.raises(DataError, match="several datasets is given as --data-dir"):
        load(str(tmp_path), tmp_path)


def test_damaged_companions_of_a_published_split(tmp_path: Path) -> None:
    from scipy import sparse

    train, _ = binary_csr(np.array([0, 0, 1]), np.array([0, 1, 2]), (2, 3))
    test, _ = binary_csr(np.array([0, 1]), np.array([2, 0]), (2, 3))
    for name, matrix in (("train", train), ("test", test)):
        sparse.save_npz(tmp_path / f"{name}.npz", matrix)
    assert load(str(tmp_path)).order is None
    for order, message in (
        (np.array([0, 1]), "expected 3"),
        (np.array([0, 2, 0]), "without gaps"),
        (np.zeros(3), "whole"),
    ):
        np.savez(tmp_path / "order.npz", order=order)
        with pytest.raises(DataError, match=rf"order\.npz: .*{message}"):
            load(str(tmp_path))
    np.savez(tmp_path / "order.npz", order=np.array([1, 0, 0]))
    dataset = load(str(tmp_path))
    assert dataset.validation.targets.toarray().tolist() == [
        [1, 0, 0],
        [0, 0, 0],
    ]  # the last of user 0; 1 has one only
    for negatives, message in (
        (np.zeros((3, 2), int), r"\(2, C\)"),
        (np.array([[0], [3]]), r"0\.\.2"),
        (np.zeros((2, 1)), "whole"),
    ):
        np.savez(tmp_path / "test_negatives.npz", negatives=negatives)
        with pytest.raises(DataError, match=rf"test_negatives\.npz: negatives: expected .*{message}"):
            load(str(tmp_path))
    np.savez(tmp_path / "test_negatives.npz", negatives=np.array([[1, 1], [2, 0]], dtype=np.int16))
    candidates = load(str(tmp_path)).test.candidates
    assert candidates is not None
    assert (candidates.dtype, candidates.tolist()) == (np.int64, [[1, 1], [2, 0]])
    np.savez(tmp_path / "ids.npz", user_ids=np.array(["a", "b"]))
    assert load(str(tmp_path)).user_ids.tolist() == ["a", "b"]
    np.savez(tmp_path / "ids.npz", user_ids=np.array([0.5, 1.5]))
    with pytest.raises(DataError, match="expected integers or text"):
        load(str(tmp_path))
    (tmp_path / "ids.npz").unlink()
    for about in ("{", json.dumps({"notes": 3}), "[]"):
        write(tmp_path / "prepared.json", about)
        with pytest.raises(DataError, match=r"prepared\.json: damaged"):
            load(str(tmp_path))
