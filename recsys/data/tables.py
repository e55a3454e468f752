"""Reads tables of interactions piece by piece: delimited text and parquet, by pyarrow.

A piece holds about a million rows as arrays; ids are kept as codes into the distinct raw ids, so memory is about
24 bytes a row and one entry for each distinct id, whatever the length of the file.

An id must not be empty, longer than 256 bytes, or hold a NUL character. What counts as a number is a whole number
that is not negative, has at most 18 digits and no leading zero: only then does the raw id survive as int64.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from recsys.data.ids import IdColumn, IdMode
from recsys.errors import ConfigError, DataError

__all__ = ["ReadOptions", "Table", "TextStyle", "not_empty", "opened", "read_parquet", "read_text"]

BLOCK = 1 << 24  # bytes of text read at once, and so the longest line
PARQUET_ROWS = 1 << 20
LONGEST_HEADER = 1 << 16
FIELDS = ("user", "item", "rating", "timestamp")
SEPARATOR = b"\x1f"  # stands for a separator of several characters: pyarrow takes one
MALFORMED = re.compile(r"Row #(\d+): Expected \d+ columns, got (\d+)")
NAMES = {
    "user": ("user", "user_id", "userid"),
    "item": ("item", "item_id", "itemid"),
    "rating": ("rating",),
    "timestamp": ("timestamp",),
}


@dataclass(frozen=True)
class ReadOptions:
    """What a table's columns mean and which rows are kept; None takes what the kind of file usually has.

    Attributes:
        user_column, item_column, rating_column, timestamp_column: name in the header, in any case; without a header
            the place, counted from 1. Without a header they default to 1, 2, 3 and 4, as far as there are columns.
        separator: between two fields; one or more characters.
        header: whether the first line names the columns.
        ids: "auto": the first field says whether a column holds numbers, and then all of it must; "any": numbers if
            every field is one, else text; "text": text.
        order: what a user's history is ordered by: "time" (rows of one time by their place in the file) or "file".
            None: time if there is a timestamp, else file, unless the items of every user ascend: then the file was
            sorted and tells no order.
        min_rating: rows with a lower rating are left out.
        min_user, min_item: k-core: users and items with fewer interactions are left out, again and again until none
            is left to take.

    Raises:
        ConfigError: a value is out of its range.
    """

    user_column: str | int | None = None
    item_column: str | int | None = None
    rating_column: str | int | None = None
    timestamp_column: str | int | None = None
    separator: str | None = None
    header: bool | None = None
    ids: IdMode | None = None
    order: Literal["time", "file"] | None = None
    min_rating: float | None = None
    min_user: int = 0
    min_item: int = 0

    def __post_init__(self) -> None:
        if self.ids not in (None, "auto", "any", "text"):
            raise ConfigError(f"ids: expected 'auto', 'any' or 'text', got {self.ids!r}")
        if self.order not in (None, "time", "file"):
            raise ConfigError(f"order: expected 'time' or 'file', got {self.order!r}")
        if self.separator is not None and (not self.separator or set(self.separator) & set('"\r\n')):
            raise ConfigError(
                f"separator: expected characters other than quote and line end, got {self.separator!r}"
            )
        for what in ("min_user", "min_item"):
            least = getattr(self, what)
            if not isinstance(least, int) or least < 0:
                raise ConfigError(f"{what}: expected a whole number that is not negative, got {least!r}")
        if self.min_rating is not None and not isinstance(self.min_rating, int | float):
            raise ConfigError(f"min_rating: expected a number, got {self.min_rating!r}")

    def column(self, field: str) -> str | None:
        """What was asked for as the column of a field, as text."""
        given = getattr(self, f"{field}_column")
        return None if given is None else str(given).strip()


@dataclass(frozen=True)
class TextStyle:
    """What a kind of text file usually has; `types`: header fields are name:type, as RecBole writes them."""

    separator: str
    header: bool
    quotes: bool
    ids: IdMode = "auto"
    types: bool = False


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of a file in their order: row and column number of each, ascending with the raw ids.

    time: (n,) float64 as in the file, seconds for parquet's timestamps; None without such a column.
    dropped: rows left out for their rating.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    user_ids: NDArray[Any]
    item_ids: NDArray[Any]
    time: NDArray[np.float64] | None
    dropped: int


def not_empty(path: Path) -> None:
    """Raise DataError unless `path` is a file with something in it."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if it is named .gz; damage that shows in between is a DataError, too."""
    not_empty(path)
    try:
        if path.name.endswith(".gz"):
            with gzip.open(path) as file:
                yield cast(BinaryIO, file)
        else:
            with path.open("rb") as plain:
                yield plain
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or not a gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


class _Body(io.RawIOBase):
    """What follows the header, with a separator of several characters replaced by one."""

    def __init__(self, start: bytes, file: BinaryIO, separator: bytes) -> None:
        self._start, self._file, self._separator = start, file, separator
        self._held, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            more = self._start or self._file.read(BLOCK)
            self._start = b""
            data = self._held + more
            if not data:
                return 0
            self._held = b""
            if len(self._separator) > 1:
                data = data.replace(self._separator, SEPARATOR)
                # A separator may lie across two reads: its beginning waits for the next one.
                begun = range(len(self._separator) - 1, 0, -1) if more else range(0)
                held = next((n for n in begun if data.endswith(self._separator[:n])), 0)
                data, self._held = data[: len(data) - held], data[len(data) - held :]
            self._ready = memoryview(data)
        count = min(len(self._ready), len(buffer))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class _Gathered:
    """The columns so far. `place(row)` names a row of the file, counted from 0, in messages."""

    def __init__(self, mode: IdMode, options: ReadOptions, timed: bool, place: Callable[[int], str]) -> None:
        self.options, self.place = options, place
        self.ids = {field: IdColumn(field, mode) for field in ("user", "item")}
        self.times: list[NDArray[np.float64]] | None = [] if timed else None
        self.rows = self.dropped = 0

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
        numbers = {field: self._numbers(field, columns[field]) for field in FIELDS[2:] if field in columns}
        self.rows += len(columns["user"])
        least = self.options.min_rating
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
        values = _cast(column)
        bad: int | None
        if values is None:
            low, high = 0, len(column)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (
                    (low, middle) if _cast(column.slice(low, middle - low)) is None else (middle, high)
                )
            bad = low
        else:
            wrong = ~np.isfinite(values)
            if field == "rating":
                wrong |= values < 0
            bad = int(np.argmax(wrong)) if wrong.any() else None
        if bad is not None:
            shown = column[bad].as_py()
            shown = shown.decode("utf-8", "replace") if isinstance(shown, bytes) else shown
            expected = "a number that is not negative" if field == "rating" else "a number"
            what = "the field is empty" if shown in (None, "") else f"got {str(shown)[:40]!r}"
            self._refuse((bad, f"expected {expected}, {what}"), field)
        assert values is not None
        return values

    def table(self) -> Table:
        (users, user_ids), (items, item_ids) = (self.ids[field].numbered() for field in ("user", "item"))
        time = None if self.times is None else np.concatenate([np.empty(0), *self.times])
        return Table(users, items, user_ids, item_ids, time, self.dropped)


def _cast(column: pa.Array) -> NDArray[np.float64] | None:
    """A column of numbers as float64, or None if a field of it is none."""
    if column.null_count:
        return None
    try:
        if pa.types.is_timestamp(column.type):
            per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
            return column.cast(pa.int64()).to_numpy(zero_copy_only=False) / per_second
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            column = column.cast(pa.large_string())
        return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowException:
        return None


def _columns(
    path: Path, names: list[str], header: bool, options: ReadOptions, defaults: bool = True
) -> dict[str, int]:
    """Which column holds which field; user and item must be there, and what was asked for by name."""
    found: dict[str, int] = {}
    for field in FIELDS:
        asked = options.column(field)
        if header:
            wanted = (asked.lower(),) if asked is not None else NAMES[field]
            places = [place for place, name in enumerate(names) if name.strip().lower() in wanted]
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
            raise DataError(f"{path}: {where} {columns} once each; it reads {', '.join(names)[:120]!r}")
    if len(set(found.values())) < len(found):
        raise DataError(f"{path}: two fields are to be read from one column: {found}")
    if options.min_rating is not None and "rating" not in found:
        raise DataError(f"{path}: min_rating needs a column of ratings; there is none")
    if options.order == "time" and "timestamp" not in found:
        raise DataError(
            f"{path}: order by time needs a column of timestamps and there is none; order 'file' takes the rows as "
            "they are"
        )
    return found


def _names(path: Path, line: str, separator: str, quotes: bool) -> list[str]:
    """Fields of the first line."""
    if not quotes or len(separator) > 1:
        return line.split(separator)
    try:
        return next(csv.reader([line], delimiter=separator), [""])
    except csv.Error as error:
        raise DataError(f"{path}:1: {error}") from error


def read_text(path: Path, style: TextStyle, options: ReadOptions) -> Table:
    """Read a delimited text file.

    Raises:
        DataError: with the line where a row is malformed, or an id or a number is not what it should be.
    """
    separator = options.separator if options.separator is not None else style.separator
    header = options.header if options.header is not None else style.header
    mark = separator.encode()
    with opened(path) as file:
        first = file.readline(LONGEST_HEADER).removeprefix(b"\xef\xbb\xbf")
        if len(first) == LONGEST_HEADER:
            raise DataError(f"{path}:1: the first line is longer than {LONGEST_HEADER} bytes")
        if not first.strip() and not file.read(LONGEST_HEADER).strip():
            raise DataError(f"{path}: the file is empty")
        # A line may end with a mere \r, and the next ones then came with it.
        line, end, below = first.partition(b"\r" if b"\r" in first else b"\n")
        below = below.removeprefix(b"\n") if end == b"\r" else below
        names = _names(path, line.decode("utf-8", "replace"), separator, style.quotes)
        if style.types:
            names = [name.partition(":")[0] for name in names]
        columns = _columns(path, names, header, options)
        start = (below if header else first) + file.read(BLOCK)
        if not start.strip():
            raise DataError(f"{path}: no interaction after the header line")
        lines = _Lines(path, separator, style.quotes, header)
        gathered = _Gathered(options.ids or style.ids, options, "timestamp" in columns, lines.place)
        body = _Body(start, file, mark)
        for batch in _batches(path, body, mark, len(names), columns, style.quotes, lines, gathered):
            gathered.add(batch)
    if not gathered.rows:
        raise DataError(f"{path}: no interaction after the header line")
    return gathered.table()


@dataclass(frozen=True)
class _Lines:
    """Names lines of a text file; rows and lines differ where a quoted field goes over several lines."""

    path: Path
    separator: str
    quotes: bool
    header: bool

    def place(self, row: int) -> str:
        record = row + 1 + int(self.header)
        return f"{self.path}:{self._line(record) if self.quotes else record}"

    def _line(self, record: int) -> int:
        """Read once more, only to name the line in an error."""
        begins, reader = 1, None
        try:
            with opened(self.path) as file, io.TextIOWrapper(file, "utf-8", "replace", newline="") as text:
                reader = csv.reader(text, delimiter=self.separator[:1])
                for count, _ in enumerate(reader, 1):
                    if count == record:
                        return begins
                    begins = reader.line_num + 1
        except (csv.Error, DataError):
            pass
        return record


def _batches(
    path: Path,
    body: _Body,
    mark: bytes,
    width: int,
    columns: dict[str, int],
    quotes: bool,
    lines: _Lines,
    gathered: _Gathered,
) -> Iterator[dict[str, pa.Array]]:
    names = [str(place) for place in range(width)]
    of_field = {str(place): field for field, place in columns.items()}
    coded = pa.dictionary(pa.int32(), pa.binary())
    types = {name: coded if field in ("user", "item") else pa.binary() for name, field in of_field.items()}
    blank: int | None = None  # row of the first of the blank lines that came last
    seen = 0
    try:
        reader = pyarrow.csv.open_csv(
            body,
            read_options=pyarrow.csv.ReadOptions(column_names=names, block_size=BLOCK, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=(mark if len(mark) == 1 else SEPARATOR).decode(),
                quote_char='"' if quotes else False,
                newlines_in_values=quotes,
                ignore_empty_lines=False,
            ),
            # Everything as bytes: what is wrong with a field is found out here, where its row is known.
            convert_options=pyarrow.csv.ConvertOptions(
                check_utf8=False,
                include_columns=list(of_field),
                column_types=types,
                null_values=[],
                strings_can_be_null=False,
            ),
        )
        for batch in reader:
            found = {of_field[name]: batch.column(name) for name in batch.schema.names}
            filled = np.any([_filled(column) for column in found.values()], axis=0)
            count = batch.num_rows - int(np.argmax(filled[::-1])) if filled.any() else 0
            if blank is None and not filled.all():
                blank = seen + int(np.argmin(filled))
            if blank is not None and blank < seen + count:
                raise DataError(f"{lines.place(blank)}: expected {width} fields, got a blank line")
            if count:
                yield {field: column.slice(0, count) for field, column in found.items()}
            seen += batch.num_rows
    except pa.ArrowException as error:
        # pyarrow's handler of invalid rows cannot be told of one that is not UTF-8; the message always comes.
        malformed = MALFORMED.search(str(error))
        if malformed:
            number, got = map(int, malformed.groups())
            raise DataError(f"{lines.place(number - 1)}: expected {width} fields, got {got}") from error
        raise DataError(
            f"{lines.place(seen)}: here or below, a line is longer than {BLOCK >> 20} MiB or a quote is not "
            f"closed: {error}"
        ) from error


def _filled(column: pa.Array) -> NDArray[np.bool_]:
    """Of each row, whether the field has anything in it."""
    coded = pa.types.is_dictionary(column.type)
    filled = pc.greater(pc.binary_length(column.dictionary if coded else column), 0)
    filled = filled.to_numpy(zero_copy_only=False)
    return filled[column.indices.to_numpy()] if coded else filled


def read_parquet(path: Path, options: ReadOptions) -> Table:
    """Read the needed columns of a parquet file; ids may be integers or text. Errors as for text, by row."""
    not_empty(path)
    if options.header is False or options.separator is not None:
        raise ConfigError(f"{path}: a parquet file has neither a header line nor a separator to choose")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = _columns(path, names, True, options)
            gathered = _Gathered(
                options.ids or "any", options, "timestamp" in columns, lambda row: f"{path}: row {row + 1}"
            )
            wanted = [names[place] for place in columns.values()]
            for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
                found = {field: batch.column(names[place]) for field, place in columns.items()}
                gathered.add({field: _plain(path, field, column, options) for field, column in found.items()})
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise DataError(f"{path}: damaged, truncated or not a parquet file: {error}") from error
    if not gathered.rows:
        raise DataError(f"{path}: no interaction in the file")
    return gathered.table()


def _plain(path: Path, field: str, column: pa.Array, options: ReadOptions) -> pa.Array:
    """A column as int64 or bytes (ids), or as it is (numbers)."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if field not in ("user", "item"):
        return column
    if pa.types.is_integer(column.type):
        column = column.cast(pa.int64())
        return column.cast(pa.string()).cast(pa.binary()) if options.ids == "text" else column
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.binary())
    if pa.types.is_binary(column.type):
        return column
    raise DataError(f"{path}: column {field}: expected integers or text, got {column.type}")
