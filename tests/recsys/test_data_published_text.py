"""Splits as their authors publish them in text: NCF's ratings and negatives, MultVAE's tables of held-out users."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from recsys.data import available, load
from recsys.data.prepare import prepare
from recsys.errors import ConfigError, DataError

TRAIN = "0\t0\t5\t30\n0\t1\t3\t10\n0\t2\t4\t20\n1\t1\t4\t9\n1\t0\t4\t8\n"
TEST = "0\t3\t5\t40\n1\t2\t1\t10\n"
NEGATIVES = "(0,3)\t4\t5\n(1,2)\t4\t3\n"  # 4 and 5 are in nobody's history


def ncf(folder: Path, negatives: str = NEGATIVES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("train.rating", TRAIN), ("test.rating", TEST), ("test.negative", negatives)):
        (folder / f"tiny.{name}").write_text(text)
    return folder


def test_ncf_files_are_read_as_they_are(tmp_path: Path) -> None:
    folder = ncf(tmp_path / "ncf")
    assert available(tmp_path) == ["synthetic", "ncf"]
    dataset = load("ncf", tmp_path)
    assert dataset.item_ids.tolist() == [0, 1, 2, 3, 4, 5]
    # By time: item 0 is the last of user 0, item 1 that of user 1.
    assert dataset.validation.targets.toarray().nonzero()[1].tolist() == [0, 1]
    assert dataset.test.targets.toarray().nonzero()[1].tolist() == [3, 2]
    assert dataset.test.candidates is not None
    assert dataset.test.candidates.tolist() == [[4, 5], [4, 3]]
    # As it is written by `recsys data prepare`, too, packed, or with ids as text.
    prepare(folder, tmp_path / "prepared")
    again = load("prepared", tmp_path)
    np.testing.assert_array_equal(again.test.candidates, dataset.test.candidates)
    assert (
        (again.train != dataset.train).nnz
        == (again.validation.targets != dataset.validation.targets).nnz
        == 0
    )
    for path in list(folder.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    text = load("ncf", tmp_path, ids="text")
    np.testing.assert_array_equal(text.test.candidates, dataset.test.candidates)
    assert text.item_ids.tolist() == list("012345")
    # Divided anew, there is nothing to rank a published item among.
    assert load("ncf", tmp_path, split="ratio").test.candidates is None


def test_a_note_counts_the_items_that_only_negatives_name(tmp_path: Path) -> None:
    said = "tiny.test.negative: 2 items that no other file has, ranked as items that nobody chose; with them the "
    dataset = load(str(ncf(tmp_path / "more")))
    assert f"{said}catalogue has {dataset.n_items}" in dataset.notes
    prepare(tmp_path / "more", tmp_path / "prepared")
    assert any(note.startswith(said) for note in load("prepared", tmp_path).notes)
    assert any(note.startswith(said) for note in load(str(tmp_path / "more"), ids="text").notes)
    dataset = load(str(ncf(tmp_path / "none", "(0,3)\t1\t2\n(1,2)\t0\t3\n")))
    assert not any("no other file" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("negatives", "message"),
    [
        (
            "(0,3)\t4\t5\n(1,2)\t4\n",
            r"tiny\.test\.negative:2: expected 2 items after the pair, as in line 1, got 1",
        ),
        ("(0,3)\t4\t5\n1,2\t4\t3\n", r"tiny\.test\.negative:2: expected \(user,item\) and items.*got '1,2"),
        ("(0,3)\t4\t5\n\n(1,2)\t4\t3\n", r"tiny\.test\.negative:2: expected \(user,item\)"),
        ("(0,3)\t4\t5\n\n", "one line for each of the 2 users"),  # blank lines at the end are none
        (
            "(0,3)\t4\t5\n",
            "one line for each of the 2 users of the test file and for no other, got 1 lines of 1",
        ),
        ("(0,3)\t4\t5\n(0,3)\t4\t5\n", "got 2 lines of 1 users"),
        ("(0,3)\t4\t5\n(7,2)\t4\t5\n", "one line for each of the 2 users"),
        ("(0,3)\t4\t5\n(1,0)\t4\t3\n", r"tiny\.test\.negative:2: \(1,0\) is no pair of the test file"),
        ("", "empty"),
    ],
)
def test_negatives_of_another_split(tmp_path: Path, negatives: str, message: str) -> None:
    ncf(tmp_path / "ncf", negatives)
    with pytest.raises(DataError, match=message):
        load("ncf", tmp_path)


def heldout(folder: Path, **others: str) -> Path:
    folder.mkdir(exist_ok=True)
    texts = {
        "train": "0,0\n0,2\n1,1\n1,0\n",
        "validation_tr": "2,0\n3,1\n",
        "validation_te": "2,1\n",  # user 3 has nothing to find
        "test_tr": "4,2\n5,0\n",
        "test_te": "4,0\n5,1\n5,2\n",
    }
    for name, text in {**texts, **others}.items():
        (folder / f"{name}.csv").write_text("uid,sid\n" + text)
    return folder


def test_tables_of_held_out_users(tmp_path: Path) -> None:
    heldout(tmp_path / "vae")
    dataset = load("vae", tmp_path)
    assert dataset.train.toarray().tolist() == [[1, 0, 1], [1, 1, 0]]
    assert dataset.user_ids.tolist() == [0, 1]
    assert dataset.validation.user_ids is not None
    assert dataset.validation.user_ids.tolist() == [2]
    assert dataset.validation.users.tolist() == [-1]
    assert dataset.test.user_ids is not None
    assert dataset.test.user_ids.tolist() == [4, 5]
    assert dataset.test.inputs.toarray().tolist() == [[0, 0, 1], [1, 0, 0]]
    assert dataset.test.targets.toarray().tolist() == [[1, 0, 0], [0, 1, 1]]
    prepare(tmp_path / "vae", tmp_path / "prepared")
    assert (load("prepared", tmp_path).test.targets != dataset.test.targets).nnz == 0
    for option in ({"split": "ratio"}, {"validation": 0}, {"min_user": 2}):
        with pytest.raises(ConfigError, match="published split of held-out users"):
            load("vae", tmp_path, **option)
    heldout(tmp_path / "vae", test_tr="4,2\n1,0\n")
    with pytest.raises(
        DataError, match=r"test_tr\.csv: expected users that are held out, but 1 of them are in train"
    ):
        load("vae", tmp_path)


def test_uid_and_sid_are_columns_only_together(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("sid,uid,user,item\n7,8,1,2\n7,8,2,2\n")
    assert load(str(tmp_path / "own.csv"), validation=0, test=0).item_ids.tolist() == [2]
    (tmp_path / "own.csv").write_text("uid,item\n1,2\n")
    with pytest.raises(DataError, match="the first line must name the columns user and item"):
        load(str(tmp_path / "own.csv"))
