"""Every loader, given anything: a sound result, or a DataError that names the file; nothing else comes out."""

from __future__ import annotations

import gzip
import io
import re
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from recsys.csr import rank_in_rows
from recsys.data.dataset import check_binary_csr
from recsys.data.formats import SUFFIXES, read_interactions
from recsys.data.options import ReadOptions
from recsys.errors import DataError

ROWS = [(3, 10, 4.5, 100), (3, 11, 2.0, 90), (7, 10, 5.0, 95), (3, 10, 1.0, 80), (12, 400, 3.5, 120)]
MESSAGE_WITH_PLACE = re.compile(
    r"(fields, got|column (user|item|rating|timestamp):|blank line|whole numbers sep)"
)


def lines(separator: str, header: str = "") -> str:
    return header + "".join(separator.join(map(str, row)) + "\n" for row in ROWS)


@cache
def valid(suffix: str) -> bytes:
    """The rows of ROWS as a file of each kind."""
    header = "user,item,rating,timestamp\n"
    texts = {
        ".csv": lines(",", header),
        ".tsv": lines("\t", header.replace(",", "\t")),
        ".inter": lines("\t", "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"),
        ".dat": lines("::"),
        ".data": lines("\t"),
        ".rating": lines("\t"),
        ".txt": "3 10 11 10\n7 10\n12 400\n13\n",
    }
    plain = suffix.removesuffix(".gz")
    if plain in texts:
        data = texts[plain].encode()
        return gzip.compress(data) if suffix.endswith(".gz") else data
    buffer = io.BytesIO()
    if suffix == ".parquet":
        columns = dict(zip(("user", "item", "rating", "timestamp"), zip(*ROWS, strict=True), strict=True))
        pyarrow.parquet.write_table(
            pa.table({name: list(values) for name, values in columns.items()}), buffer
        )
    else:
        users, items = (np.unique(part, return_inverse=True)[1] for part in list(zip(*ROWS, strict=True))[:2])
        sparse.save_npz(buffer, sparse.coo_array((np.ones(len(ROWS)), (users, items))).tocsr())
    return buffer.getvalue()


def judge(path: Path, data: bytes, options: ReadOptions | None = None) -> None:
    path.write_bytes(data)
    try:
        found = read_interactions(path, options)
    except DataError as error:
        message = str(error)
        assert str(path) in message
        if MESSAGE_WITH_PLACE.search(message) and path.suffix != ".parquet":
            assert re.match(re.escape(str(path)) + r":\d+: ", message), message
        return
    check_binary_csr(found.matrix, "fuzz")
    users, items = found.matrix.shape
    assert found.matrix.nnz > 0
    assert (len(np.unique(found.user_ids)), len(np.unique(found.item_ids))) == (users, items)
    assert {found.user_ids.dtype.kind, found.item_ids.dtype.kind} <= {"i", "U"}
    if found.order is not None:
        np.testing.assert_array_equal(rank_in_rows(found.matrix, found.order), found.order)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_valid_files_give_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"own{suffix}"
    path.write_bytes(valid(suffix))
    found = read_interactions(path)
    assert found.matrix.toarray().tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 1]]
    if suffix != ".npz":
        assert (found.user_ids.tolist(), found.item_ids.tolist()) == ([3, 7, 12], [10, 11, 400])
        assert any("1 repeated pairs merged" in note for note in found.notes)
    if suffix not in (".npz", ".txt", ".txt.gz"):
        # The merged pair is the earlier of the two: (3, 10) at time 80, before (3, 11).
        assert found.order is not None
        assert found.time is not None
        assert (found.order.tolist(), found.time.tolist()) == ([0, 1, 0, 0], [80, 90, 95, 120])


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=25)
@given(data=st.data())
def test_mutated_files(tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject) -> None:
    content = bytearray(valid(suffix))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        change = data.draw(st.sampled_from(["replace", "insert", "delete", "cut", "repeat"]))
        piece = data.draw(st.binary(min_size=1, max_size=4) | st.sampled_from(PIECES))
        if change == "replace":
            content[place : place + len(piece)] = piece
        elif change == "insert":
            content[place:place] = piece
        elif change == "delete":
            del content[place : place + len(piece)]
        elif change == "cut":
            del content[place:]
        else:
            content[place:place] = content[:place]
    judge(tmp_path_factory.mktemp("f") / f"own{suffix}", bytes(content))


PIECES = [
    b"\n",
    b"\r\n",
    b"\r",
    b",",
    b"\t",
    b"::",
    b":",
    b'"',
    b'""',
    b"\0",
    b"\xff",
    b"-1",
    b"nan",
    b"1e309",
    b"",
    b" ",
]
PIECES += [
    b"99999999999999999999",
    b"x",
    b"0",
    "\u00e9".encode(),
    b"\xef\xbb\xbf",
    b"\x1f",
    b"\x85",
    b"\x0b",
    b"7" * 300,
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=15)
@given(content=st.binary(max_size=200))
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes) -> None:
    judge(tmp_path_factory.mktemp("f") / f"own{suffix}", content)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".inter", ".dat", ".data", ".txt"])
@settings(max_examples=60)
@given(data=st.data())
def test_random_fields(tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject) -> None:
    """Right in form, with anything in the fields; ids as text where that can be asked for."""
    separator = {".csv": ",", ".dat": "::", ".txt": " "}.get(suffix, "\t")
    field = st.sampled_from(
        ["1", "2", "30", "007", "-4", "", "a", "\u00e9", " ", "nan", "1.5", '"q"', "9" * 19, "x" * 257]
    )
    rows = data.draw(st.lists(st.lists(field, min_size=2, max_size=4), min_size=1, max_size=8))
    text = valid(suffix).decode().partition("\n")[0] + "\n" + "\n".join(map(separator.join, rows))
    options = data.draw(
        st.sampled_from([None, ReadOptions(ids="text"), ReadOptions(ids="any", order="file")])
    )
    if suffix == ".txt":
        options = None
    judge(tmp_path_factory.mktemp("f") / f"own{suffix}", text.encode(), options)


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix.endswith(".gz")])
def test_truncated_gzip(tmp_path: Path, suffix: str) -> None:
    whole = valid(suffix)
    for length in range(len(whole)):
        path = tmp_path / f"own{suffix}"
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=re.escape(str(path))):
            read_interactions(path)


def test_a_huge_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.data.text.BLOCK", 1 << 12)
    path = tmp_path / "own.csv"
    path.write_text("user,item,text\n" + "1,2,a\n" * 3000 + "1,3," + "x" * 10_000 + "\n")
    with pytest.raises(DataError, match=r"own\.csv:\d+: here or below, a line is longer"):
        read_interactions(path)
    monkeypatch.setattr("recsys.data.lists.LONGEST_LINE", 1 << 12)
    monkeypatch.setattr("recsys.data.lists.BLOCK", 1 << 12)
    path = tmp_path / "own.txt"
    path.write_text("1 2\n2 " + "3 " * 10_000 + "\n")
    with pytest.raises(DataError, match=r"own\.txt:2: a line is longer"):
        read_interactions(path)


@pytest.mark.parametrize("block", range(40, 64))
def test_a_last_line_over_the_end_of_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Separators shrink to one character, and pieces with them: none may be shorter than a block before the end."""
    monkeypatch.setattr("recsys.data.text.BLOCK", block)
    (tmp_path / "own.dat").write_text("10::10::0::0\n10::11::1::1\n0::10::2::2\n10::12::3::3\n10::0::4::4")
    assert read_interactions(tmp_path / "own.dat").matrix.nnz == 5


@settings(max_examples=25)
@given(data=st.data())
def test_pieces_do_not_change_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Files longer than a block: rows, and separators of two characters, lie across its end."""
    rows = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=60))
    folder = tmp_path_factory.mktemp("f")
    text = "\n".join(f"{user}::{item}::{place % 5}::{place}" for place, (user, item) in enumerate(rows))
    (folder / "own.dat").write_text(text)
    (folder / "own.txt").write_text("\n".join(f"{user} {item}" for user, item in rows))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("text", "lists"):
            patch.setattr(f"recsys.data.{module}.BLOCK", data.draw(st.integers(40, 90)))
        patch.setattr("recsys.data.lists.BLOCK", data.draw(st.integers(1, 30)))
        table = read_interactions(folder / "own.dat")
        lists = read_interactions(folder / "own.txt", ReadOptions(order="file"))
    assert table.user_ids.tolist() == lists.user_ids.tolist() == sorted({user for user, _ in rows})
    assert (table.matrix != lists.matrix).nnz == 0
    assert table.order is not None
    assert lists.order is not None
    assert table.order.tolist() == lists.order.tolist()
    first: dict[tuple[int, int], int] = {}
    for place, row in enumerate(rows):
        first.setdefault(row, place)
    assert table.time is not None
    assert table.time.tolist() == [first[pair] for pair in sorted(first)]
