"""Every layout, written by the tests themselves, and everything that can be wrong with a file."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse import csr_array

from recsys.config import load_config
from recsys.data import available, load
from recsys.data.formats import read_interactions, read_matrix
from recsys.errors import ConfigError, DataError

USERS, ITEMS = 12, 20


def random_parts(fractions: tuple[float, ...], users: int = USERS, seed: int = 0) -> list[csr_array]:
    """Disjoint matrices, the k-th holding about fractions[k] of all pairs."""
    place = np.random.default_rng(seed).random((users, ITEMS))
    bounds = np.concatenate([[0.0], np.cumsum(fractions)])
    return [csr_array(((low <= place) & (place < high)).astype(np.float32)) for low, high in pairwise(bounds)]


def save(folder: Path, **matrices: csr_array) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, matrix in matrices.items():
        sparse.save_npz(folder / f"{name}.npz", matrix)
    return folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def same(a: csr_array, b: csr_array) -> bool:
    return a.shape == b.shape and (a != b).nnz == 0


def table(rows: int = 60) -> str:
    rng = np.random.default_rng(5)
    return "user,item,rating\n" + "".join(
        f"{u},{i},{r}\n"
        for u, i, r in zip(
            rng.integers(10, 20, rows), rng.integers(100, 140, rows), rng.integers(1, 6, rows), strict=True
        )
    )


# Tables.


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 10**18 - 1), st.integers(0, 300)), min_size=1, max_size=30),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_a_table_of_numbers_is_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]], end: str, last: bool
) -> None:
    text = end.join(["item,rating,user", *(f"{item},4.5,{user}" for user, item in rows)]) + (
        end if last else ""
    )
    path = write(tmp_path_factory.mktemp("t") / "own.csv", text)
    data = read_interactions(path)
    assert data.user_ids.dtype == data.item_ids.dtype == np.int64
    assert data.user_ids.tolist() == sorted({user for user, _ in rows})
    assert data.item_ids.tolist() == sorted({item for _, item in rows})
    coo = data.matrix.tocoo()
    found = list(zip(data.user_ids[coo.row].tolist(), data.item_ids[coo.col].tolist(), strict=True))
    assert sorted(found) == sorted(set(rows))
    repeated = len(rows) - len(set(rows))
    merged = [note for note in data.notes if "merged" in note]
    assert merged == ([f"own.csv: {repeated} repeated pairs merged"] if repeated else [])
    for field, ids in (("user", data.user_ids), ("item", data.item_ids)):
        gaps = any(f"{len(ids)} {field} ids with gaps in {ids[0]}..{ids[-1]}" in note for note in data.notes)
        assert gaps == (ids[-1] - ids[0] + 1 != len(ids))


def test_string_ids_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv.gz", "\ufeffuser, Item\nzoë,a-1\nbob,7\nzoë,7\n")
    data = read_interactions(path)
    assert data.user_ids.tolist() == ["bob", "zoë"]
    assert data.item_ids.tolist() == ["7", "a-1"]
    np.testing.assert_array_equal(data.matrix.toarray(), [[1, 0], [1, 1]])


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("\n\n", "empty"),
        ("user,item\n", "no interaction after the header"),
        ("user,rating\n1,2\n", "must name the columns user and item.*user, rating"),
        ("user,user,item\n1,2,3\n", "once each"),
        ("1,2\n3,4\n", "must name the columns"),
        ("user,item\n1,2\n3\n", r"bad\.csv(\.gz)?:3: expected 2 fields, got 1"),
        ("user,item\n1,2\n\n3,4\n", r":3: expected 2 fields, got a blank line"),
        ("user,item\n1,2\n3,4,5\n", r":3: expected 2 fields, got 3"),
        ("user,item\n1,2\n-3,4\n", r":3: column user: expected a whole number .* got '-3'"),
        ("user,item\n-1,2\n", r":2: column user: .* got '-1'"),
        ("user,item\n1,2\n3,x\n", r":3: column item: .* got 'x'"),
        ("user,item\n1,2\n3,4.5\n", r":3: column item: .* got '4.5'"),
        ("user,item\n1,2\n,4\n", r":3: column user: the field is empty"),
        ("user,item\n1,2\n9999999999999999999,4\n", r":3: column user: .*at most 18 digits"),
        ("user,item\n1,2\n1," + "x" * 300 + "\n", r":3: column item: more than 256 bytes"),
        ("user,item,rating\n1,2,3\n1,3,-1\n", r":3: column rating: .* got '-1'"),
        ("user,item,rating\n1,2,3\n1,3,nan\n", r":3: column rating: .* got 'nan'"),
        ("user,item,rating\n1,2,3\n1,3,.\n", r":3: column rating"),
        ("user,item,timestamp\n1,2,3\n1,3,1.2.3\n", r":3: column timestamp"),
        ('user,item\n1,2\n"3,4\n5,6\n', r":3: "),
        ('user,item,text\n1,2,"two\nlines"\n3,x,a\n', r":4: column item: .* got 'x'"),
        ("user,item\n1,2\n03,4\n", r":3: column user: .*no leading zero.* got '03'.*ids='text'"),
        ("user,item\na,2\nb\0,4\n", r":3: column user: a NUL"),
        ("user,item\n1,2\nNaN,4\n", r":3: column user: .* got 'NaN'"),
        ("user,item,rating\n1,2,3\n1,3,inf\n", r":3: column rating: .* got 'inf'"),
        (
            "user,item,timestamp\n1,2,3\n1,3,2014-01-01\n",
            r":3: column timestamp: expected a number or a date .* got .2014",
        ),
    ],
)
def test_bad_tables_are_refused_with_the_place(tmp_path: Path, suffix: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(str(write(tmp_path / f"bad{suffix}", text)))


def test_ratings_may_be_left_unread(tmp_path: Path) -> None:
    path = write(tmp_path / "liked.csv", "user,item,rating\n1,2,like\n1,3,-1\n2,2,dislike\n")
    with pytest.raises(
        DataError, match=r":2: column rating: .* got 'like'; .*--rating-column none.*leaves them unread"
    ):
        load(str(path))
    assert load(str(path), rating_column="none").train.nnz == 3
    with pytest.raises(DataError, match="min_rating needs a column of ratings and there is none"):
        load(str(path), rating_column="none", min_rating=1)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(b"user,item\nx\xff,1\n")
    with pytest.raises(DataError, match=r"bad\.csv:2: column user: expected UTF-8"):
        read_interactions(path)


def test_a_gzip_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.csv.gz", table()).read_bytes()
    assert read_interactions(tmp_path / "x.csv.gz").matrix.nnz > 30
    for length in range(0, len(whole), 7):
        (tmp_path / "x.csv.gz").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"x\.csv\.gz"):
            read_interactions(tmp_path / "x.csv.gz")
    (tmp_path / "x.csv.gz").write_bytes(b"user,item\n1,2\n")
    with pytest.raises(DataError, match="not a gzip file"):
        read_interactions(tmp_path / "x.csv.gz")


# Matrices.


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_a_matrix_is_read_as_ones_whatever_its_form(tmp_path: Path, form: str) -> None:
    dense = np.array([[0, 3, 0], [0.5, 0, 0], [0, 0, 0]])
    sparse.save_npz(tmp_path / "m.npz", sparse.csr_matrix(dense).asformat(form))
    matrix, notes = read_matrix(tmp_path / "m.npz")
    np.testing.assert_array_equal(matrix.toarray(), dense > 0)
    assert notes == ()


def test_repeated_pairs_and_stored_zeros_of_a_matrix(tmp_path: Path) -> None:
    coo = sparse.coo_array((np.array([1, 1, 0]), (np.array([0, 0, 1]), np.array([2, 2, 1]))), shape=(2, 3))
    sparse.save_npz(tmp_path / "m.npz", coo)
    data = read_interactions(tmp_path / "m.npz")
    np.testing.assert_array_equal(data.matrix.toarray(), [[0, 0, 1], [0, 0, 0]])
    assert data.notes == ("m.npz: 1 repeated pairs merged",)


def test_a_damaged_matrix_file_is_refused(tmp_path: Path) -> None:
    (matrix,) = random_parts((0.4,))
    path = save(tmp_path, m=matrix) / "m.npz"
    whole = path.read_bytes()
    for length in range(0, len(whole), 61):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"m\.npz"):
            read_matrix(path)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):  # bytes changed anywhere: read right, or refused; nothing else may come out
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            assert same(read_matrix(path)[0], matrix)
        except DataError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_a_matrix_with_impossible_values_is_refused(tmp_path: Path, value: float) -> None:
    sparse.save_npz(tmp_path / "m.npz", csr_array(np.array([[1.0, value]])))
    with pytest.raises(DataError, match="finite and not negative"):
        read_matrix(tmp_path / "m.npz")


@pytest.mark.parametrize("column", [-1, 3])
def test_a_matrix_with_ids_out_of_range_is_refused(tmp_path: Path, column: int) -> None:
    parts = {"indices": [0, column], "indptr": [0, 1, 2], "data": [1.0, 1.0], "shape": [2, 3]}
    np.savez(tmp_path / "m.npz", format=b"csr", **{key: np.array(part) for key, part in parts.items()})
    with pytest.raises(DataError, match="out of range"):
        read_matrix(tmp_path / "m.npz")


def test_a_matrix_whose_row_pointers_go_down_is_refused(tmp_path: Path) -> None:
    # scipy does not look at this when it loads, and would write beyond its buffer when it converts.
    parts = {"indices": [0, 1, 2], "indptr": [0, 3, 2, 3], "data": [1.0, 1.0, 1.0], "shape": [3, 3]}
    np.savez(tmp_path / "m.npz", format=b"csr", **{key: np.array(part) for key, part in parts.items()})
    with pytest.raises(DataError, match="not a whole sparse matrix"):
        read_matrix(tmp_path / "m.npz")


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", data=np.array([{"a": 1}], dtype=object), format=b"csr")
    with pytest.raises(DataError, match="not a whole sparse matrix"):
        read_matrix(tmp_path / "m.npz")


def test_no_interaction_left(tmp_path: Path) -> None:
    save(tmp_path, m=csr_array((3, 4), dtype=np.float32))
    with pytest.raises(DataError, match="no interaction"):
        load(str(tmp_path / "m.npz"))


# Folders.


def test_one_file_is_split_by_seed_and_options(tmp_path: Path) -> None:
    (matrix,) = random_parts((0.5,))
    save(tmp_path / "a", interactions=matrix)
    write(tmp_path / "b" / "interactions.csv.gz", table())
    write(tmp_path / "c" / "interactions.csv", table())
    assert available(tmp_path) == ["synthetic", "a", "b", "c"]
    first, again, other = (load("a", tmp_path, seed=seed) for seed in (0, 0, 1))
    assert same(first.test.inputs + first.test.targets, matrix)
    assert same(first.test.targets, again.test.targets)
    assert not same(first.test.targets, other.test.targets)
    heldout = load("a", tmp_path, split="heldout", test=0.25, validation=0.25, fold_in=0.5)
    assert (heldout.n_users, len(heldout.test)) == (6, 3)
    b, c = load("b", tmp_path), load("c", tmp_path, validation=None)
    assert same(b.train, c.train)
    assert b.user_ids.min() >= 10
    assert b.item_ids.min() >= 100
    assert "repeated pairs merged" in b.summary()["notes"][0]


def test_published_split_with_validation(tmp_path: Path) -> None:
    train, valid, test = random_parts((0.3, 0.1, 0.1))
    save(tmp_path / "set" / "deep", train=train, valid=valid, test=test)
    dataset = load("set/deep", tmp_path)
    assert available(tmp_path) == ["synthetic", "set/deep"]
    for part, expected in (
        (dataset.train, train),
        (dataset.validation.inputs, train),
        (dataset.validation.targets, valid),
        (dataset.test.inputs, csr_array(train + valid)),
        (dataset.test.targets, test),
    ):
        assert same(part, expected)
    with pytest.raises(ConfigError, match="'validation' does not apply"):
        load("set/deep", tmp_path, validation=0.2)


@pytest.mark.parametrize("file", ["train", "train_subset"])
def test_validation_is_carved_from_train_and_test_stays(tmp_path: Path, file: str) -> None:
    train, test = random_parts((0.6, 0.1))
    save(tmp_path / "set", **{file: train, "test": test})
    dataset = load("set", tmp_path, validation=0.2)
    assert same(dataset.test.targets, test)
    assert same(dataset.test.inputs, train)
    assert same(dataset.train + dataset.validation.targets, train)
    assert dataset.validation.targets.nnz == pytest.approx(0.2 * train.nnz, rel=0.2)
    assert not same(dataset.train, load("set", tmp_path, seed=1, validation=0.2).train)
    assert any("absent" in note for note in dataset.notes) == (file == "train_subset")
    with pytest.raises(ConfigError, match="published split: option 'fold_in'"):
        load("set", tmp_path, fold_in=0.2)


def test_published_split_is_preferred_and_a_new_one_is_made_on_request(tmp_path: Path) -> None:
    train, test = random_parts((0.6, 0.1))
    folder = save(tmp_path / "set", train=train, test=test)
    anew = load("set", tmp_path, split="heldout", test=0.25)
    assert (len(anew.test), anew.n_users) == (3, 8)
    shown = [anew.train, *(m for part in (anew.validation, anew.test) for m in (part.inputs, part.targets))]
    assert sum(m.nnz for m in shown) == train.nnz + test.nnz
    write(folder / "interactions.csv.gz", table())
    assert load("set", tmp_path).n_items == ITEMS
    assert load("set", tmp_path, split="ratio").item_ids.min() >= 100


def heldout_folder(folder: Path) -> list[csr_array]:
    (train,) = random_parts((0.4,), seed=1)
    parts = [m for seed in (2, 3) for m in random_parts((0.3, 0.2), users=4, seed=seed)]
    for matrix in (train, *parts):  # an empty user each
        matrix.data[matrix.indptr[1] : matrix.indptr[2]] = 0
        matrix.eliminate_zeros()
    names = ("train", "validation_tr", "validation_te", "test_tr", "test_te")
    save(folder, **dict(zip(names, (train, *parts), strict=True)))
    return [train, *parts]


def test_published_heldout_users(tmp_path: Path) -> None:
    train, validation_tr, _, test_tr, test_te = heldout_folder(tmp_path / "set")
    # One id more than rows: the last validation user has no data and no row.
    uids = np.arange(USERS + 4 + 1 + 4) + 500
    np.savez(tmp_path / "set" / "ids.npz", item_ids=np.arange(ITEMS) + 70, user_of_uid=uids)
    dataset = load("set", tmp_path)
    assert same(dataset.train, train)  # its empty row included
    assert dataset.summary()["empty_users"] == 1
    kept = np.array([0, 2, 3])
    assert same(dataset.validation.inputs, csr_array(validation_tr[kept]))
    assert same(dataset.test.inputs, csr_array(test_tr[kept]))
    assert same(dataset.test.targets, csr_array(test_te[kept]))
    assert dataset.test.users.tolist() == [-1, -1, -1]
    assert dataset.validation.user_ids.tolist() == (512 + kept).tolist()
    assert dataset.test.user_ids.tolist() == (517 + kept).tolist()
    assert dataset.user_ids.tolist() == list(range(500, 512))
    assert dataset.item_ids[0] == 70
    with pytest.raises(ConfigError, match="held-out users"):
        load("set", tmp_path, split="ratio")
    (tmp_path / "set" / "ids.npz").unlink()
    assert load("set", tmp_path).item_ids[0] == 0


def test_damaged_or_short_ids_are_refused(tmp_path: Path) -> None:
    heldout_folder(tmp_path / "set")
    path = tmp_path / "set" / "ids.npz"
    np.savez(path, item_ids=np.arange(3))
    with pytest.raises(DataError, match=r"ids\.npz: item_ids gives"):
        load("set", tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"ids\.npz: damaged or truncated"):
        load("set", tmp_path)


def test_parts_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    train, test = random_parts((0.6, 0.1))
    save(tmp_path / "a", train=train, test=csr_array(test[:, :5]))
    with pytest.raises(DataError, match=r"test\.npz: 5 items, but train has 20"):
        load("a", tmp_path)
    save(tmp_path / "b", train=train, test=csr_array(test[:5]))
    with pytest.raises(DataError, match=r"test\.npz: 5 users, but train has 12"):
        load("b", tmp_path)
    save(tmp_path / "c", train=train, test=train)
    with pytest.raises(DataError, match="pairs are both inputs and targets"):
        load("c", tmp_path)
    heldout_folder(tmp_path / "d")
    save(tmp_path / "d", test_te=csr_array(test[:3]))
    with pytest.raises(DataError, match="test_tr has 4 users, test_te 3"):
        load("d", tmp_path)


# Names.


def test_unknown_name_names_the_nearest_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "ml-100k" / "interactions.csv", table())
    (tmp_path / "notes").mkdir()  # no known layout: no dataset
    with pytest.raises(DataError, match=r"'ml-10k'; nearest: 'ml-100k'.*--data-dir.*SPARSECORE_DATA"):
        load("ml-10k", tmp_path)
    with pytest.raises(DataError, match=r"unknown dataset .gowalla.*gowalla is the split of LightGCN"):
        load("gowalla", tmp_path)
    with pytest.raises(DataError, match=rf"recsys data prepare ml-1m -o {tmp_path}/ml-1m`"):
        load("ml-1m", tmp_path)
    with pytest.raises(DataError, match="unknown dataset 'notes'"):
        load("notes", tmp_path)
    monkeypatch.delenv("SPARSECORE_DATA", raising=False)
    assert available() == ["synthetic"]
    with pytest.raises(DataError, match=r"`recsys data prepare ml-1m -o DIR/ml-1m`, then --data-dir DIR"):
        load("ml-1m")
    with pytest.raises(DataError, match=r"`recsys data prepare ml-100k -o DIR/ml-100k --split loo`"):
        load("ml-100k", split="loo")
    with pytest.raises(DataError, match=r"gowalla is the split of LightGCN.*DIR/gowalla"):
        load("gowalla")
    with pytest.raises(
        DataError, match=r"did you mean 'synthetic'\? No data directory is set: .*SPARSECORE_DATA"
    ):
        load("syntetic")
    monkeypatch.setenv("SPARSECORE_DATA", str(tmp_path))
    assert load("ml-100k").name == "ml-100k"
    assert available() == ["synthetic", "ml-100k"]


def test_a_folder_here_is_a_dataset_unless_the_data_directory_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, root = tmp_path / "here", tmp_path / "data"
    write(here / "mine" / "interactions.csv", "user,item\na,1\na,2\na,3\n")
    write(here / "deep" / "er" / "interactions.csv", "user,item\nb,1\nb,2\nb,3\n")
    (here / "empty").mkdir()
    root.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("SPARSECORE_DATA", raising=False)
    assert load("mine").user_ids.tolist() == ["a"]
    assert load("deep/er").user_ids.tolist() == ["b"]
    with pytest.raises(DataError, match="empty: expected a folder with train and test files"):
        load("empty")
    config = load_config(overrides=["data.name=deep/er"]).anchored()
    assert config.data.name == str(here / "deep" / "er")  # a run is evaluated from elsewhere
    write(root / "mine" / "interactions.csv", "user,item\nc,1\nc,2\nc,3\n")
    assert load("mine", root).user_ids.tolist() == ["c"]
    config = load_config(options={"data.name": "mine", "data.dir": str(root)}).anchored()
    assert config.data.name == "mine"


def test_missing_folder_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"--data-dir: .*gone.* does not exist"):
        load("ml-100k", tmp_path / "gone")
    monkeypatch.setenv("SPARSECORE_DATA", str(tmp_path / "away"))
    with pytest.raises(DataError, match=r"SPARSECORE_DATA: .*away"):
        load("ml-100k")
    with pytest.raises(DataError, match=r"own\.csv: no such file"):
        load(str(tmp_path / "own.csv"))
    with pytest.raises(DataError, match=r"expected a \.csv"):
        read_interactions(tmp_path / "own.xlsx")


def test_unknown_option_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv", table())
    with pytest.raises(ConfigError, match="'fold-in'; nearest: 'fold_in'"):
        load(str(path), **{"fold-in": 0.5})


# The real datasets, against the counts that their description gives.


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "users", "items", "pairs"),
    [
        ("ml-100k", 943, 1682, 100_000),
        ("ml-1m", 6040, 3706, 1_000_209),
        ("lastfm", 1892, 4489, 52_668),
        ("gowalla", 29_858, 40_981, 1_027_370),
        ("foursquare", 7642, 28_483, 277_405),
        ("citeulike-a", 5551, 16_980, 204_986),
        ("citeulike-t/derrd_loo", 5219, 25_181, 125_580),
        ("ml-1m/ncf_loo", 6040, 3706, 1_000_209),
        ("yelp2018", 31_668, 38_048, 1_561_406),
        ("citeulike-t", 7947, 25_975, 134_860),
        ("foursquare-nyc", 1083, 5135, 36_140),
        ("amazon-book", 52_643, 91_599, 1_314_129),
        ("amazon-book-kgat", 70_679, 24_915, 846_434),
        # The csv beside a published split.
        ("lastfm ratio", 1892, 17_632, 92_834),
        ("foursquare ratio", 7642, 28_483, 277_405),
    ],
)
def test_real_counts(real_data: Path, name: str, users: int, items: int, pairs: int) -> None:
    name, _, split = name.partition(" ")
    dataset = load(name, real_data, split=split or None)
    assert dataset.train.shape == (users, items)
    assert dataset.test.inputs.nnz + dataset.test.targets.nnz == pairs
    assert dataset.test.inputs.nnz == dataset.train.nnz + dataset.validation.targets.nnz


@pytest.mark.real
def test_real_published_test_parts_are_untouched(real_data: Path) -> None:
    counts = {  # known, test, share carved out: at least one pair a user, so above 0.1 where histories are short
        "lastfm": (42_135, 10_533, 0.1),
        "gowalla": (810_128, 217_242, 0.1),
        "yelp2018": (1_237_259, 324_147, 0.1),
        "amazon-book-kgat": (652_514, 193_920, 0.142),
        "amazon-book": (710_751, 603_378, 0.116),
        "ml-1m/ncf_loo": (994_169, 6040, 6040 / 994_169),
        "citeulike-t/derrd_loo": (115_142 + 5219, 5219, 5219 / 120_361),
        "foursquare": (190_547 + 27_134, 59_724, 27_134 / 217_681),
    }
    for name, (known, test, validation) in counts.items():
        dataset = load(name, real_data)
        assert same(dataset.test.targets, csr_array(sparse.load_npz(real_data / name / "test.npz")))
        assert (dataset.test.inputs.nnz, dataset.test.targets.nnz) == (known, test)
        assert dataset.validation.targets.nnz == pytest.approx(validation * known, rel=0.15)


@pytest.mark.real
def test_real_heldout_users_and_their_raw_ids(real_data: Path) -> None:
    dataset = load("ml-1m/dsl_multvae", real_data)
    assert dataset.n_interactions == 592_306
    assert dataset.n_users - dataset.summary()["empty_users"] == 3503
    assert (len(dataset.validation), len(dataset.test), dataset.n_items) == (419, 418, 3654)
    assert (dataset.validation.targets.nnz, dataset.test.targets.nnz) == (14_467, 13_039)
    # A user's raw id leads to the same user of the whole set, from which all of these pairs come.
    whole = read_interactions(real_data / "ml-1m" / "interactions.csv.gz")
    columns = np.searchsorted(whole.item_ids, dataset.item_ids)
    for part in (dataset.validation, dataset.test):
        rows = csr_array(whole.matrix[np.searchsorted(whole.user_ids, part.user_ids)])
        history = csr_array(part.inputs + part.targets)
        found = csr_array(rows[:, columns]).multiply(history).nnz
        assert found == history.nnz


@pytest.mark.real
def test_every_real_dataset_loads(real_data: Path) -> None:
    names = available(real_data)
    folders = {path.name for path in real_data.iterdir() if path.is_dir()}
    assert folders <= set(names)
    for name in names:
        dataset = load(name, real_data)
        assert len(dataset.test.rows_with_targets) > 0, name
        assert len(dataset.validation.rows_with_targets) > 0, name


def test_a_file_that_happens_to_lie_beside_a_split_does_no_harm(tmp_path: Path) -> None:
    train, test = random_parts((0.4, 0.2))
    save(tmp_path / "project" / "mine", train=train, test=test)
    write(tmp_path / "project" / "interactions.csv", "a;b\n1;2\n")
    data = load("project/mine", tmp_path, validation=0)
    assert same(data.train, train)
    assert data.order is None


def test_several_files_beside_a_split_do_no_harm(tmp_path: Path) -> None:
    train, test = random_parts((0.4, 0.2))
    save(tmp_path / "mine", train=train, test=test)
    for name in ("interactions.csv", "ratings.dat"):
        (tmp_path / name).write_text("user,item\n1,2\n")
    assert same(load("mine", tmp_path, validation=0).train, train)


def test_a_folder_that_may_not_be_read_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = random_parts((0.4, 0.2))
    save(tmp_path / "mine", train=train, test=test)
    closed = tmp_path / "lost+found"
    closed.mkdir()
    whole = Path.is_file

    def is_file(path: Path) -> bool:
        if path.parent == closed:
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert available(tmp_path) == ["synthetic", "mine"]
    assert same(load("mine", tmp_path, validation=0).train, train)
    with pytest.raises(DataError, match=r"x\.csv: cannot be read: Permission denied"):
        load(str(closed / "x.csv"))


def test_what_is_wrong_with_a_split_is_said_with_its_folder(tmp_path: Path) -> None:
    train, _ = random_parts((0.4, 0.2))
    save(tmp_path / "mine", train=train, test=train)
    with pytest.raises(DataError, match=r"mine: .*pairs are both inputs and targets"):
        load("mine", tmp_path, validation=0)
    with pytest.raises(ConfigError, match="seed that is not negative, got -1"):
        load("mine", tmp_path, seed=-1)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2)])
def test_an_array_that_is_no_matrix_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "x.npz"
    sparse.save_npz(path, sparse.coo_array(np.ones(shape)))
    with pytest.raises(
        DataError, match=rf"x\.npz: .*expected two dimensions, users and items, got {len(shape)}"
    ):
        read_interactions(path)


def test_a_matrix_with_too_many_rows_for_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    size = 2**40
    sparse.save_npz(path, sparse.coo_array((np.ones(1), ([size - 1], [size - 1])), shape=(size, size)))
    with pytest.raises(DataError, match=r"x\.npz: no memory for the rows"):
        read_interactions(path)


def test_ids_beyond_63_bits_are_refused(tmp_path: Path) -> None:
    train, test = random_parts((0.4, 0.2))
    save(tmp_path / "mine", train=train, test=test)
    np.savez(tmp_path / "mine" / "ids.npz", item_ids=np.arange(train.shape[1], dtype=np.uint64) + 2**63)
    with pytest.raises(DataError, match=r"ids\.npz: item_ids: expected integers below 2\^63, got 92233"):
        load("mine", tmp_path)


@pytest.mark.parametrize("text", ['user,item\n1,"2\n1,3\n', 'user,item,title\n1,2,a\n1,3,"b\n2,3,c\n'])
def test_a_quote_that_nothing_closes_swallows_no_rows(tmp_path, text):
    path = tmp_path / "x.csv"
    path.write_text(text)
    line = 2 if "title" not in text else 3
    with pytest.raises(DataError, match=rf"x\.csv:{line}: a quote is not closed"):
        read_interactions(path)


def test_fields_may_go_over_several_lines(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('user,item,title\n1,2,"a\nb"\n1,3,c\n')
    assert read_interactions(path).matrix.nnz == 2


@pytest.mark.parametrize(
    "names", [["a.train.csv", "b.test.csv"], ["train.csv", "train.csv.gz", "test.csv"]], ids=str
)
def test_parts_of_several_names_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("user,item\n1,2\n")
    with pytest.raises(DataError, match="one file for each of train, test"):
        load(str(tmp_path))


def test_two_files_of_interactions_are_refused(tmp_path):
    for name in ("interactions.csv", "ratings.dat"):
        (tmp_path / name).write_text("user,item\n1,2\n")
    with pytest.raises(DataError, match=r"one file of interactions, got interactions\.csv, ratings\.dat"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["valid", "validation", "val"])
def test_published_validation_goes_by_any_of_its_names(tmp_path, name):
    matrix = np.zeros((4, 6), np.float32)
    parts = {"train": (0, 1, 2), name: (3,), "test": (4,)}
    for part, items in parts.items():
        matrix[:] = 0
        matrix[:, items] = 1
        sparse.save_npz(tmp_path / f"{part}.npz", sparse.csr_matrix(matrix))
    data = load(str(tmp_path))
    assert data.train.nnz == 12
    assert (data.validation.targets.indices == 3).all()
