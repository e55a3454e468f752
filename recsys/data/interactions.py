"""Reads one file of interactions: a table of pairs (`.csv`, `.csv.gz`) or a scipy sparse matrix (`.npz`).

Table: UTF-8, one header line that names at least the columns user and item (rating and timestamp are checked
and not used: every row is an interaction), fields divided by commas, no quotes. An id column whose first
field is a whole number is numeric, and then every field of it must be one; otherwise its fields are taken as
strings.
"""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csr_array

from recsys.data.dataset import binary_csr
from recsys.errors import DataError

__all__ = ["DAMAGED", "Interactions", "read_interactions", "read_matrix", "read_table"]

# What zipfile, numpy and scipy raise on an archive that is not what it should be. RuntimeError is zipfile's
# for flags that damage can set (encryption, unknown compression).
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    RuntimeError,
)
ID_COLUMNS = ("user", "item")
NUMBER_COLUMNS = ("rating", "timestamp")
# Fields are gathered into a matrix as wide as the longest of them: one overlong field costs rows x width.
LONGEST_FIELD = 256
DIGITS_OF_INT64 = 18


@dataclass(frozen=True, eq=False)
class Interactions:
    """All pairs of one file as a binary matrix, with the raw ids of its rows and columns."""

    matrix: csr_array
    user_ids: NDArray[Any]
    item_ids: NDArray[Any]
    notes: tuple[str, ...] = ()


def read_interactions(path: Path) -> Interactions:
    """Read a `.csv`, `.csv.gz` or `.npz` file. Duplicates are merged and counted in `notes`.

    Raises:
        DataError: the file is missing, empty, truncated or holds something else; the message names the place.
    """
    if path.name.endswith((".csv", ".csv.gz")):
        return read_table(path)
    if path.name.endswith(".npz"):
        matrix, notes = read_matrix(path)
        users, items = (np.arange(size, dtype=np.int64) for size in matrix.shape)
        return Interactions(matrix, users, items, notes)
    raise DataError(f"{path}: expected a .csv, .csv.gz or .npz file")


def _not_empty(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")


def read_matrix(path: Path) -> tuple[csr_array, tuple[str, ...]]:
    """Read a scipy sparse matrix of users x items as ones, and notes on what was merged.

    Stored zeros are no interactions. Raises DataError on a damaged file, ids out of range, or values that are
    negative, NaN or infinite.
    """
    _not_empty(path)
    try:
        # Opened here, as numpy leaves the file open if the archive turns out to be damaged.
        with path.open("rb") as file:
            loaded = sparse.load_npz(file)
        if hasattr(loaded, "check_format"):  # compressed formats trust their indices until asked
            loaded.check_format(full_check=True)
        coo = sparse.coo_array(loaded)
    except DAMAGED as error:
        raise DataError(
            f"{path}: not a whole sparse matrix as written by scipy.sparse.save_npz "
            f"(damaged, truncated, or ids out of range): {error}"
        ) from error
    values = coo.data
    if values.dtype.kind not in "biuf" or not np.isfinite(values).all() or (values < 0).any():
        raise DataError(f"{path}: expected values that are finite and not negative")
    kept = values != 0
    rows, cols = coo.coords
    matrix, repeated = binary_csr(rows[kept], cols[kept], coo.shape)
    return matrix, _repeated(path, repeated)


def _repeated(path: Path, count: int) -> tuple[str, ...]:
    return (f"{path.name}: {count} repeated pairs merged",) if count else ()


def read_table(path: Path) -> Interactions:
    """Read a table of pairs; see the module's docstring for its form and `read_interactions` for errors.

    Ids are numbered in ascending order of the raw ids, so they need be neither contiguous nor numeric.
    """
    text = _text(path)
    header, _, body = text.partition(b"\n")
    names = [name.strip().lower().decode("utf-8", "replace") for name in header.split(b",")]
    for column in ID_COLUMNS:
        if names.count(column) != 1:
            raise DataError(
                f"{path}: the first line must name the columns user and item once each; "
                f"it reads {', '.join(names)[:120]!r}"
            )
    body = body.rstrip(b"\n")
    if not body:
        raise DataError(f"{path}: no interaction after the header line")
    table = _Table(path, body, len(names))
    for column in NUMBER_COLUMNS:
        if column in names:
            table.check_numbers(names.index(column), column)
    users, rows = np.unique(table.ids(names.index("user"), "user"), return_inverse=True)
    items, cols = np.unique(table.ids(names.index("item"), "item"), return_inverse=True)
    matrix, repeated = binary_csr(rows, cols, (len(users), len(items)))
    return Interactions(
        matrix, _decoded(path, users, "user"), _decoded(path, items, "item"), _repeated(path, repeated)
    )


def _text(path: Path) -> bytes:
    _not_empty(path)
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: truncated or not a gzip file: {error}") from error
    data = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    if not data.strip():
        raise DataError(f"{path}: the file is empty")
    if b'"' in data:
        line = data[: data.index(b'"')].count(b"\n") + 1
        raise DataError(f"{path}:{line}: quoted fields are not read; write the file without quotes")
    return data


def _decoded(path: Path, ids: NDArray[Any], column: str) -> NDArray[Any]:
    if ids.dtype.kind != "S":
        return ids
    try:
        return np.char.decode(ids, "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: column {column} is not UTF-8 text: {error}") from error


class _Table:
    """Positions of the fields of a comma-separated text, found once; columns are then cut out as arrays."""

    def __init__(self, path: Path, body: bytes, n_columns: int) -> None:
        self.path = path
        self.bytes = np.frombuffer(body, dtype=np.uint8)
        ends = np.append(np.flatnonzero(self.bytes == ord("\n")), len(body))
        commas = np.flatnonzero(self.bytes == ord(","))
        found = np.diff(np.searchsorted(commas, ends), prepend=0) + 1
        wrong = np.flatnonzero(found != n_columns)
        if len(wrong):
            raise self._error(wrong[0], f"expected {n_columns} fields, got {found[wrong[0]]}")
        starts = np.concatenate([[0], ends[:-1] + 1])
        inner = commas.reshape(len(ends), n_columns - 1)
        self.starts = np.column_stack([starts, inner + 1])
        self.lengths = np.column_stack([inner, ends]) - self.starts

    def _error(self, row: int, message: str) -> DataError:
        return DataError(f"{self.path}:{int(row) + 2}: {message}")  # after the header; lines count from 1

    def _show(self, row: int, column: int) -> str:
        start = self.starts[row, column]
        return repr(
            self.bytes[start : start + min(int(self.lengths[row, column]), 40)]
            .tobytes()
            .decode("utf-8", "replace")
        )

    def _characters(self, column: int, name: str) -> NDArray[np.uint8]:
        """The fields of a column as a (rows, longest) matrix of bytes, filled up with 0."""
        lengths = self.lengths[:, column]
        if (lengths == 0).any():
            raise self._error(int(np.argmin(lengths)), f"column {name}: the field is empty")
        longest = int(lengths.max())
        if longest > LONGEST_FIELD:
            raise self._error(int(np.argmax(lengths)), f"column {name}: more than {LONGEST_FIELD} bytes")
        characters = np.zeros((len(lengths), longest), dtype=np.uint8)
        for place in range(longest):
            rows = np.flatnonzero(lengths > place)
            characters[rows, place] = self.bytes[self.starts[rows, column] + place]
        return characters

    def ids(self, column: int, name: str) -> NDArray[Any]:
        """Fields as int64 if the first of them is a whole number, else as fixed-width bytes."""
        characters = self._characters(column, name)
        lengths = self.lengths[:, column]
        inside = np.arange(characters.shape[1]) < lengths[:, None]
        digits = (characters >= ord("0")) & (characters <= ord("9"))
        minus = characters[0, 0] == ord("-")
        if not digits[0, int(minus) : lengths[0]].all() or lengths[0] == int(minus):
            return characters.view(f"S{characters.shape[1]}").ravel()
        wrong = np.flatnonzero(~(digits | ~inside).all(axis=1) | (lengths > DIGITS_OF_INT64))
        if len(wrong):
            row = int(wrong[0])
            raise self._error(
                row,
                f"column {name}: expected a whole number that is not negative and has at most "
                f"{DIGITS_OF_INT64} digits, got {self._show(row, column)}",
            )
        value = np.zeros(len(lengths), dtype=np.int64)
        for place in range(characters.shape[1]):
            digit = characters[:, place].astype(np.int64) - ord("0")
            value = np.where(inside[:, place], value * 10 + digit, value)
        return value

    def check_numbers(self, column: int, name: str) -> None:
        """Raise DataError, with the line, unless every field is a plain decimal that is not negative."""
        characters = self._characters(column, name)
        digits = ((characters >= ord("0")) & (characters <= ord("9"))).sum(axis=1)
        points = (characters == ord(".")).sum(axis=1)
        lengths = self.lengths[:, column]
        wrong = np.flatnonzero((digits + points != lengths) | (points > 1) | (digits == 0))
        if len(wrong):
            row = int(wrong[0])
            raise self._error(
                row, f"column {name}: expected a number that is not negative, got {self._show(row, column)}"
            )
