"""Reads the text files that LightGCN and many after it are given: `user item item item ...`, a user a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recsys.data.spelling import spelled
from recsys.data.tables import Table
from recsys.data.text import opened
from recsys.errors import DataError

__all__ = ["read_lists"]

BLOCK = 1 << 22  # bytes read at once
LONGEST_LINE = 1 << 28
DIGITS_OF_INT64 = 18


def read_lists(path: Path) -> Table:
    """Read whole numbers separated by blanks: first the user of a line, then the items, oldest first.

    A line of a user alone is a user without items and is left out, as is a blank line. Memory is about 16 bytes an
    interaction.

    Raises:
        DataError: with the line where something else is written; no interaction in the file; or lines that look like
            columns of user, item and rating.
    """
    users: list[NDArray[np.int64]] = []
    items: list[NDArray[np.int64]] = []
    fields: set[int] = set()
    lines = 0
    line, rest, start = 1, b"", True
    with opened(path) as file:
        while True:
            more = file.read(BLOCK)
            data = rest + more
            if start:
                data, start = data.removeprefix(b"\xef\xbb\xbf"), False
            cut = data.rfind(b"\n") + 1 if more else len(data)
            # Whole lines only; what is begun waits for the next piece.
            whole, rest = data[:cut], data[cut:]
            if len(rest) > LONGEST_LINE:
                raise DataError(f"{path}:{line}: a line is longer than {LONGEST_LINE >> 20} MiB")
            if whole:
                user, item, counts = _pairs(path, whole, line)
                fields.update(np.unique(counts).tolist())
                lines += len(counts)
                users.append(user)
                items.append(item)
                line += whole.count(b"\n")
            if not more:
                break
    if not sum(map(len, users)):
        raise DataError(f"{path}: the file is empty: expected lines of a user and his or her items")
    user_ids, rows = np.unique(np.concatenate(users), return_inverse=True)
    # Ratings would be taken for items, in silence: `user item rating [timestamp]` is as good a list of two or three.
    if fields in ({3}, {4}) and len(user_ids) < lines:
        raise DataError(
            f"{path}: expected lists, all items of a user on one line; every line has {fields.pop()} fields and some "
            "users begin several, so it looks like columns of user, item, rating and perhaps timestamp. Columns are "
            f"read from a file named {path.name.removesuffix('.gz').removesuffix('.txt')}.data, separated by tabs or "
            f"by what {spelled('separator')} says; if they are lists, put those of a user on one line"
        )
    item_ids, cols = np.unique(np.concatenate(items), return_inverse=True)
    return Table(rows.astype(np.int32), cols.astype(np.int32), user_ids, item_ids, None, 0)


def _pairs(
    path: Path, text: bytes, first_line: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(user, item) of whole lines, the first of which is line `first_line`, and the fields of each but blank ones."""
    characters = np.frombuffer(text, dtype=np.uint8)
    digit = (characters >= ord("0")) & (characters <= ord("9"))
    blank = (characters == ord(" ")) | (characters == ord("\t")) | (characters == ord("\r"))
    newline = characters == ord("\n")

    def refuse(position: int, message: str) -> DataError:
        return DataError(f"{path}:{first_line + int(newline[:position].sum())}: {message}")

    other = ~(digit | blank | newline)
    if other.any():
        position = int(np.argmax(other))
        shown = text[position : position + 20].partition(b"\n")[0].decode("utf-8", "replace")
        raise refuse(position, f"expected whole numbers separated by blanks, got {shown!r}")
    edges = np.diff(digit.astype(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    lengths = ends - starts
    if not len(starts):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    if lengths.max() > DIGITS_OF_INT64:
        raise refuse(
            int(starts[np.argmax(lengths > DIGITS_OF_INT64)]), f"an id of more than {DIGITS_OF_INT64} digits"
        )
    value = np.zeros(len(starts), dtype=np.int64)
    for place in range(int(lengths.max())):
        inside = np.flatnonzero(lengths > place)
        value[inside] = value[inside] * 10 + (characters[starts[inside] + place] - ord("0"))
    line_of = np.searchsorted(np.flatnonzero(newline), starts)
    first = np.concatenate([[True], line_of[1:] != line_of[:-1]])
    owner = value[first][np.cumsum(first) - 1]
    return owner[~first], value[~first], np.diff(np.flatnonzero(first), append=len(first))
