"""The columns of a table of interactions, gathered piece by piece and checked where the row is known.

A piece holds about a million rows as arrays; ids are kept as codes into the distinct raw ids of their piece. So what
grows with the file is 8 bytes a row, 16 with timestamps, and the distinct ids of every piece; in the end, ids that are
text take four bytes a character of the longest of them.

An id must not be empty, longer than 256 bytes, or hold a NUL character. What counts as a number is a whole number
that is not negative, has at most 18 digits and no leading zero: only then does the raw id survive as int64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.data.ids import IdColumn, IdMode
from recsys.data.options import ReadOptions
from recsys.data.spelling import spelled
from recsys.errors import DataError

__all__ = ["Gathered", "Table", "columns_of", "not_empty"]

FIELDS = ("user", "item", "rating", "timestamp")
NAMES = {
    "user": ("user", "user_id", "userid"),
    "item": ("item", "item_id", "itemid"),
    "rating": ("rating",),
    "timestamp": ("timestamp",),
}
MOVIE = ("movie_id", "movieid")  # MovieLens's name of an item, where none of the others is there
NUMBERED = {"user": "uid", "item": "sid"}  # of MultVAE's authors, where both are there and none of the others
EXPECTED = {
    "rating": "a number that is not negative",
    "timestamp": "a number or a date and time such as 2024-05-31T23:59:00Z, one kind throughout",
}
HINTS = {
    "rating": f"; where they are not needed, {spelled('rating_column', 'none')} leaves them unread",
    "timestamp": f"; where they are not needed, {spelled('order', 'file')} leaves them unread",
}


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of a file in their order: row and column number of each, ascending with the raw ids.

    time: (n,) float64 as in the file, seconds for dates and times; None without such a column, or where it is not read.
    dropped: rows left out for their rating.
    unrated: rows whose rating is empty, where ratings are not read.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    user_ids: NDArray[Any]
    item_ids: NDArray[Any]
    time: NDArray[np.float64] | None
    dropped: int
    unrated: int = 0


def not_empty(path: Path) -> None:
    """Raise DataError unless `path` is a file with something in it."""
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


class Gathered:
    """The columns so far. `place(row)` names a row of the file, counted from 0, in messages."""

    def __init__(self, mode: IdMode, options: ReadOptions, timed: bool, place: Callable[[int], str]) -> None:
        self.options, self.place = options, place
        self.ids = {field: IdColumn(field, mode) for field in ("user", "item")}
        self.times: list[NDArray[np.float64]] | None = [] if timed else None
        self.rows = self.dropped = self.unrated = 0
        self._times_as: pa.DataType | None = None  # as the first row has it

    def add(self, columns: dict[str, pa.Array]) -> None:
        """Check and keep the next rows: user, item and what there is of rating and timestamp."""
        columns = {
            field: column.dictionary_encode()
            if field in self.ids and not pa.types.is_dictionary(column.type)
            else column
            for field, column in columns.items()
        }
        for field, ids in self.ids.items():
            self._refuse(ids.problem(columns[field]), field)
        least = self.options.min_rating
        if least is None and "rating" in columns:
            columns["rating"], empty = _filled(columns["rating"])  # nobody will read them
            self.unrated += empty
        numbers = {field: self._numbers(field, columns[field]) for field in FIELDS[2:] if field in columns}
        self.rows += len(columns["user"])
        if least is not None:
            kept = numbers["rating"] >= least
            self.dropped += int((~kept).sum())
            if not kept.all():
                columns = {field: columns[field].filter(pa.array(kept)) for field in self.ids}
                numbers = {field: values[kept] for field, values in numbers.items()}
        for field, ids in self.ids.items():
            ids.add(columns[field])
        if self.times is not None:
            self.times.append(numbers["timestamp"])

    def _refuse(self, problem: tuple[int, str] | None, field: str) -> None:
        if problem is not None:
            row, message = problem
            raise DataError(f"{self.place(self.rows + row)}: column {field}: {message}")

    def _numbers(self, field: str, column: pa.Array) -> NDArray[np.float64]:
        kind: pa.DataType = pa.float64()
        if field == "timestamp" and len(column):
            self._times_as = kind = self._times_as or _kind_of_times(column[:1])
        values = _cast(column, kind)
        bad: int | None
        if values is None:
            low, high = 0, len(column)
            while high - low > 1:
                middle = (low + high) // 2
                fails = _cast(column.slice(low, middle - low), kind) is None
                low, high = (low, middle) if fails else (middle, high)
            bad = low
        else:
            wrong = ~np.isfinite(values)
            if field == "rating":
                wrong |= values < 0
            bad = int(np.argmax(wrong)) if wrong.any() else None
        if bad is not None:
            shown = column[bad].as_py()
            shown = shown.decode("utf-8", "replace") if isinstance(shown, bytes) else shown
            what = "the field is empty" if shown in (None, "") else f"got {str(shown)[:40]!r}"
            self._refuse((bad, f"expected {EXPECTED[field]}, {what}{HINTS[field]}"), field)
        assert values is not None
        return values

    def table(self) -> Table:
        (users, user_ids), (items, item_ids) = (self.ids[field].numbered() for field in ("user", "item"))
        time = None if self.times is None else np.concatenate([np.empty(0), *self.times])
        return Table(users, items, user_ids, item_ids, time, self.dropped, self.unrated)


def _filled(column: pa.Array) -> tuple[pa.Array, int]:
    """A column with 0 where a field is empty, and how many are."""
    kind = column.type
    if pa.types.is_null(kind):
        return pa.array(np.zeros(len(column))), len(column)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return column.fill_null(0), column.null_count
    if _is_text(kind):
        empty = pc.equal(pc.binary_length(column), 0).fill_null(True)
        return pc.if_else(empty, pa.scalar("0").cast(kind), column), pc.sum(empty).as_py() or 0
    return column, 0


def _is_text(kind: pa.DataType) -> bool:
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string)
    return any(check(kind) for check in checks)


def _kind_of_times(first: pa.Array) -> pa.DataType:
    """What a column of times holds by its first row: numbers, or dates and times without or with an offset."""
    kinds = (pa.float64(), pa.timestamp("ns"), pa.timestamp("ns", "UTC"))
    return next((kind for kind in kinds if _cast(first, kind) is not None), kinds[0])


def _cast(column: pa.Array, kind: pa.DataType) -> NDArray[np.float64] | None:
    """A column of numbers, or of dates and times, as float64 (seconds), or None if a field of it is none.

    kind: what fields that are text must be.
    """
    if column.null_count:
        return None
    try:
        if pa.types.is_date(column.type):
            column = column.cast(pa.timestamp("ms"))
        if _is_text(column.type):
            column = column.cast(pa.large_string()).cast(kind)
        if pa.types.is_timestamp(column.type):
            per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
            whole, part = np.divmod(column.cast(pa.int64()).to_numpy(zero_copy_only=False), per_second)
            return whole + part / per_second  # float64 has not as many digits as nanoseconds since 1970
        return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowException:
        return None


def _other_separator(names: list[str]) -> str | None:
    """What seems to separate the fields of a first line that was read as a single one."""
    found = [one for one in (";", "\t", "|", "::", ",", " ") if len(names) == 1 and one in names[0].strip()]
    return found[0] if found else None


def columns_of(path: Path, names: list[str], header: bool, options: ReadOptions) -> dict[str, int]:
    """Which column holds which field; user and item must be there, and what was asked for by name."""
    found: dict[str, int] = {}
    for field in FIELDS:
        asked = options.column(field)
        if field == "rating" and asked == "none":
            continue
        if header:
            wanted = (asked.lower(),) if asked is not None else NAMES[field]
            plain = [name.strip().lower() for name in names]
            if asked is None and field in NUMBERED and not set(plain) & set(wanted):
                if set(NUMBERED.values()) <= set(plain):
                    wanted = (NUMBERED[field],)
                elif field == "item":
                    wanted = MOVIE
            places = [place for place, name in enumerate(plain) if name in wanted]
        elif asked is not None:
            if not asked.isdecimal() or not 1 <= int(asked) <= len(names):
                raise DataError(
                    f"{path}: {field}_column: without a header line expected the place of a column, "
                    f"1..{len(names)}, got {asked!r}"
                )
            places = [int(asked) - 1]
        else:
            taken = {options.column(other) for other in FIELDS}
            place = FIELDS.index(field)
            places = [place] if place < len(names) and str(place + 1) not in taken else []
        if len(places) == 1:
            found[field] = places[0]
        elif field in ("user", "item") or asked is not None or places:
            columns = " and ".join(options.column(f) or f for f in ("user", "item"))
            if asked is not None and field not in ("user", "item"):
                columns = asked
            where = "the first line must name the columns" if header else "there must be columns of"
            other = _other_separator(names) if path.suffix != ".parquet" else None
            if other is not None:
                raise DataError(
                    f"{path}: {where} {columns} once each; it reads {names[0][:120]!r}, which looks separated by "
                    f"{other!r}: say so by separator={other!r} (--separator {other!r}, "
                    f"'data.options.separator={json.dumps(other)}')"
                )
            without = (
                "; a file without a header line is read with header=False (--no-header, data.options.header=false)"
                if header and path.suffix != ".parquet"
                else ""
            )
            raise DataError(
                f"{path}: {where} {columns} once each; it reads {', '.join(names)[:120]!r}. Other names are given by "
                f"{spelled('user_column')} and {spelled('item_column')}{without}"
            )
    if len(set(found.values())) < len(found):
        raise DataError(f"{path}: two fields are to be read from one column: {found}")
    if options.min_rating is not None and "rating" not in found:
        raise DataError(
            f"{path}: min_rating needs a column of ratings and there is none: name it by {spelled('rating_column')}"
        )
    if options.order == "file":
        found.pop("timestamp", None)  # nobody will read them
    if options.order == "time" and "timestamp" not in found:
        raise DataError(
            f"{path}: order by time needs a column of timestamps and there is none: name it by "
            f"{spelled('timestamp_column')}, or take the rows as they are by {spelled('order', 'file')}"
        )
    return found
