"""Reads the needed columns of a parquet file of interactions, a million rows at a time, by pyarrow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from recsys.data.options import ReadOptions
from recsys.data.tables import Gathered, Table, columns_of, not_empty
from recsys.errors import ConfigError, DataError

__all__ = ["read_parquet"]

PARQUET_ROWS = 1 << 20


def read_parquet(path: Path, options: ReadOptions) -> Table:
    """Read the needed columns of a parquet file; ids may be integers or text. Errors as for text, by row."""
    not_empty(path)
    if options.header is False or options.separator is not None:
        raise ConfigError(f"{path}: a parquet file has neither a header line nor a separator to choose")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = columns_of(path, names, True, options)
            gathered = Gathered(
                options.ids or "any", options, "timestamp" in columns, lambda row: f"{path}: row {row + 1}"
            )
            wanted = [names[place] for place in columns.values()]
            for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
                found = {field: batch.column(names[place]) for field, place in columns.items()}
                gathered.add(
                    {field: _plain(path, field, column, options, gathered) for field, column in found.items()}
                )
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise DataError(f"{path}: damaged, truncated or not a parquet file: {error}") from error
    if not gathered.rows:
        raise DataError(f"{path}: no interaction in the file")
    return gathered.table()


def _plain(path: Path, field: str, column: pa.Array, options: ReadOptions, gathered: Gathered) -> pa.Array:
    """A column of the rows after those gathered, as int64 or bytes (ids), or as it is (numbers)."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if field not in ("user", "item"):
        return column
    if pa.types.is_integer(column.type):
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid:
            large = pa.compute.greater(column, pa.scalar(2**63 - 1, column.type)).fill_null(False)
            row = int(np.argmax(large.to_numpy(zero_copy_only=False)))
            raise DataError(
                f"{gathered.place(gathered.rows + row)}: column {field}: expected integers below 2^63, got "
                f"{column[row]}; write ids as large as that as text"
            ) from None
        return column.cast(pa.string()).cast(pa.binary()) if options.ids == "text" else column
    kind = column.type
    if pa.types.is_binary(kind):
        return column
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return column.cast(pa.binary())
    raise DataError(f"{path}: column {field}: expected integers or text, got {column.type}")
