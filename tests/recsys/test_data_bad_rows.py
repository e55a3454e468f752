"""One bad entry at a known place, in every kind of file: the message names this place and no other."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from scipy import sparse

from recsys.data import load
from recsys.data.formats import SUFFIXES, read_interactions
from recsys.data.options import ReadOptions
from recsys.errors import DataError

ROWS = 40
PLACES = [0, 1, 17, ROWS - 1]
FIELDS = ("user", "item", "rating", "timestamp")
HEADERS = {
    ".csv": "user,item,rating,timestamp\n",
    ".tsv": "user\titem\trating\ttimestamp\n",
    ".inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n",
}
SEPARATORS = {".csv": ",", ".dat": "::"}
TEXTS = sorted({suffix.removesuffix(".gz") for suffix in SUFFIXES} - {".txt", ".parquet", ".npz"})
# Ids of .inter may be text; an empty one never is an id.
BAD = {"user": "", "item": "-5", "rating": "-1", "timestamp": "x"}


def table() -> list[list[str]]:
    return [[str(row // 3), str(row % 7), "3", str(100 + row)] for row in range(ROWS)]


def write(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def place_of(path: Path, options: ReadOptions | None = None) -> str:
    """What follows the file's name in the message."""
    with pytest.raises(DataError) as caught:
        read_interactions(path, options)
    message = str(caught.value)
    assert message.startswith(str(path)), message
    return message.removeprefix(str(path))


def text_of(suffix: str, rows: list[list[str]], end: str = "\n") -> tuple[str, int]:
    """A file's text and how many lines come before its first row."""
    separator, header = SEPARATORS.get(suffix, "\t"), HEADERS.get(suffix, "")
    return header + "".join(separator.join(row) + end for row in rows), int(bool(header))


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("block", [None, 64, 200], ids=str)
@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize("field", FIELDS)
def test_a_bad_field(
    tmp_path: Path, field: str, suffix: str, block: int | None, packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block is not None:
        monkeypatch.setattr("recsys.data.text.BLOCK", block)
    bad = "" if suffix == ".inter" and field == "item" else BAD[field]
    options = ReadOptions(min_rating=1)  # ratings are read
    for place in PLACES:
        if (field, place) == ("item", 0):
            continue  # the first row says what kind of ids there are
        rows = table()
        rows[place][FIELDS.index(field)] = bad
        text, before = text_of(suffix, rows)
        write(tmp_path / f"a{suffix}{packed}", text)
        found = place_of(tmp_path / f"a{suffix}{packed}", options)
        assert found.startswith(f":{before + place + 1}: column {field}: "), found


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("block", [None, 64, 200], ids=str)
@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize("kind", ["one field", "a field too many", "blank"])
def test_a_row_of_another_width(
    tmp_path: Path, kind: str, suffix: str, block: int | None, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block is not None:
        monkeypatch.setattr("recsys.data.text.BLOCK", block)
    for place in PLACES[1:-1]:
        rows = table()
        rows[place] = {"one field": ["7"], "a field too many": [*rows[place], "8"], "blank": [""]}[kind]
        text, before = text_of(suffix, rows, end)
        write(tmp_path / f"a{suffix}", text)
        found = place_of(tmp_path / f"a{suffix}")
        assert re.match(rf":{before + place + 1}: expected 4 fields, got ", found), found


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_bad_field_below_one_of_several_lines(tmp_path: Path, suffix: str) -> None:
    separator = SEPARATORS.get(suffix, "\t")
    rows = [[*row, '"a\nb\nc"' if place == 4 else "d"] for place, row in enumerate(table())]
    rows[9][0] = "-1"
    header = separator.join([*FIELDS, "title"]) + "\n"
    write(tmp_path / f"a{suffix}", header + "".join(separator.join(row) + "\n" for row in rows))
    assert place_of(tmp_path / f"a{suffix}").startswith(":13: column user: ")  # header, 9 rows, 2 breaks


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("block", [1 << 22, 7], ids=str)
@pytest.mark.parametrize("bad", ["x", "-3", "9" * 19])
def test_a_bad_item_of_a_list(
    tmp_path: Path, bad: str, block: int, packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.data.lists.BLOCK", block)
    for place in PLACES:
        lines = [f"{user} 1 2 {user + 3}" for user in range(ROWS)]
        lines[place] += f" {bad}"
        lines[-1] += f" {bad}{'9' * 5}"  # another below, longer: the first counts
        write(tmp_path / f"a.txt{packed}", "\n".join(lines))
        assert place_of(tmp_path / f"a.txt{packed}").startswith(f":{place + 1}: ")


@pytest.mark.parametrize("rows_at_once", [1 << 20, 6], ids=str)
@pytest.mark.parametrize(
    ("field", "bad", "kind"),
    [
        ("user", None, pa.int64()),
        ("item", -1, pa.int32()),
        ("user", 2**63, pa.uint64()),
        ("item", 2**64 - 1, pa.uint64()),
        ("item", b"", pa.binary()),
        ("rating", -0.5, pa.float32()),
        ("timestamp", float("nan"), pa.float64()),
    ],
    ids=str,
)
def test_a_bad_entry_of_a_parquet_column(
    tmp_path: Path,
    field: str,
    bad: Any,
    kind: pa.DataType,
    rows_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recsys.data.parquet.PARQUET_ROWS", rows_at_once)
    path = tmp_path / "a.parquet"
    for place in PLACES:
        columns: dict[str, Any] = {
            name: [int(row[number]) for row in table()] for number, name in enumerate(FIELDS)
        }
        values = [str(value).encode() for value in columns[field]] if kind == pa.binary() else columns[field]
        values[place] = bad
        if kind == pa.uint64() and place < 30:
            values[35] = 2**64 - 1  # another below, larger: the first counts
        columns[field] = pa.array(values, kind)
        pyarrow.parquet.write_table(pa.table(columns), path)
        found = place_of(path, ReadOptions(min_rating=1))
        assert found.startswith(f": row {place + 1}: column {field}: "), found
        if kind == pa.uint64():
            assert f"got {bad};" in found


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -2.0])
def test_a_bad_entry_of_a_matrix(tmp_path: Path, bad: float, form: str) -> None:
    path = tmp_path / "a.npz"
    for row, col in ((0, 0), (4, 2), (8, 6)):
        dense = np.ones((9, 7))
        dense[8, 6] = bad  # the last; an earlier one in its row and one in a later column do not hide it
        dense[row, col] = bad
        dense[row, col + 1 :] = -7
        matrix = sparse.coo_array(dense)
        shuffled = np.random.default_rng(0).permutation(matrix.nnz)
        matrix = sparse.coo_array((matrix.data[shuffled], tuple(c[shuffled] for c in matrix.coords)), (9, 7))
        sparse.save_npz(path, matrix if form == "coo" else matrix.asformat(form))
        found = place_of(path)
        assert found.startswith(f": entry ({row}, {col}), "), found
        assert f"got {bad};" in found


def test_a_matrix_of_other_values(tmp_path: Path) -> None:
    sparse.save_npz(tmp_path / "a.npz", sparse.coo_array(np.eye(3) * 1j))
    assert place_of(tmp_path / "a.npz").startswith(": expected values that are real numbers, got complex128")


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("place", PLACES[1:])
@pytest.mark.parametrize(
    "bad",
    [
        "x",
        "",
        "({0},1)\t2",
        "({0},1)\t2\t-3",
        "(99,1)\t2\t3",
        "({0},98)\t2\t3",
        "({0},2)\t0\t3",
        "(0,1)\t2\t3",
    ],
    ids=["text", "blank", "short", "sign", "no user", "no item", "no pair", "repeated"],
)
def test_a_bad_line_of_negatives(tmp_path: Path, bad: str, place: int, packed: str) -> None:
    if bad == "" and place == ROWS - 1:
        return  # a blank line at the end is none
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.train.rating").write_text("".join(f"{u}\t0\t1\t1\n{u}\t2\t1\t2\n" for u in range(ROWS)))
    (folder / "set.test.rating").write_text("".join(f"{u}\t1\t1\t3\n" for u in range(ROWS)))
    lines = [f"({user},1)\t2\t3" for user in range(ROWS)]
    lines[place] = bad.format(place)
    write(folder / f"set.test.negative{packed}", "\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        load("set", tmp_path)
    expected = f"{folder / f'set.test.negative{packed}'}:{place + 1}: "
    assert str(caught.value).startswith(expected), caught.value
