"""Reads tables of interactions written as delimited text, block by block, by pyarrow."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from recsys.data.ids import IdMode
from recsys.data.options import ReadOptions
from recsys.data.tables import Gathered, Table, columns_of, not_empty
from recsys.errors import DataError

__all__ = ["TextStyle", "opened", "read_text"]

BLOCK = 1 << 24  # bytes of text read at once, and so the longest line
LONGEST_HEADER = 1 << 16
SEPARATOR = b"\x1f"  # stands for a separator of several characters: pyarrow takes one
MALFORMED = re.compile(r"Row #(\d+): Expected \d+ columns, got (\d+)")


@dataclass(frozen=True)
class TextStyle:
    """What a kind of text file usually has; `types`: header fields are name:type, as RecBole writes them."""

    separator: str
    header: bool
    quotes: bool
    ids: IdMode = "auto"
    types: bool = False


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
        self.breaks = 0  # line breaks so far

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, up to the end of the file: a short piece may lie within a line, and pyarrow refuses a line
        that reaches beyond two of its blocks.
        """
        filled, whole = 0, memoryview(buffer)
        while filled < len(whole):
            count = self._read_some(whole[filled:])
            if not count:
                break
            filled += count
        return filled

    def _read_some(self, buffer: Any) -> int:
        while not self._ready:
            more = self._start or self._file.read(BLOCK)
            self._start = b""
            data = self._held + more
            if not data:
                return 0
            self._held = b""
            self.breaks += more.count(b"\n")
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
        if first.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(
                f"{path}: expected UTF-8 text, got UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"
            )
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
        columns = columns_of(path, names, header, options)
        start = (below if header else first) + file.read(BLOCK)
        if not start.strip():
            raise DataError(f"{path}: no interaction after the header line")
        lines = _Lines(path, separator, style.quotes, header)
        gathered = Gathered(options.ids or style.ids, options, "timestamp" in columns, lines.place)
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

    def unclosed(self) -> int | None:
        """The line with a quote that nothing closes up to the end of the file, where there is one."""
        begins, reader = 1, None
        try:
            with opened(self.path) as file, io.TextIOWrapper(file, "utf-8", "replace", newline="") as text:
                reader = csv.reader(text, delimiter=self.separator[:1], strict=True)
                for _ in reader:
                    begins = reader.line_num + 1
        except csv.Error as error:
            # Other errors are of quotes that pyarrow and this reader see differently.
            return begins if "unexpected end of data" in str(error) or "field larger" in str(error) else None
        return None

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
    gathered: Gathered,
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
        # Some fields go over several lines: on purpose, or because a quote swallows what follows.
        begin = lines.unclosed() if quotes and body.breaks > seen else None
        if begin is not None:
            raise DataError(f"{lines.path}:{begin}: a quote is not closed in this row")
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
