"""Reads one file of interactions, of the kind that its name says.

    .csv .tsv (.gz)   a header that names user and item, perhaps rating and timestamp; quotes are understood
    .parquet          such columns
    .inter (.gz)      RecBole: tabs, fields of the header are name:type
    .dat (.gz)        MovieLens: user::item::rating::timestamp, no header
    .data (.gz)       MovieLens 100K: the same with tabs
    .rating (.gz)     NCF: as .data
    .txt (.gz)        LightGCN: a user and all of his or her items a line, whole numbers
    .npz              a matrix as scipy.sparse.save_npz writes it

Columns, separator and header can be chosen otherwise (`ReadOptions`). Every row is an interaction.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csr_array

from recsys.csr import entry_rows
from recsys.data.dataset import binary_csr
from recsys.data.interactions import Interactions, k_core, merge_pairs
from recsys.data.lists import read_lists
from recsys.data.options import ReadOptions
from recsys.data.parquet import read_parquet
from recsys.data.spelling import spelled
from recsys.data.tables import Table, not_empty
from recsys.data.text import TextStyle, read_text
from recsys.errors import ConfigError, DataError

__all__ = ["DAMAGED", "SUFFIXES", "TEXT_STYLES", "is_supported", "read_interactions", "read_matrix"]

# What zipfile, numpy and scipy raise on an archive that is not what it should be. RuntimeError is zipfile's
# for flags that damage can set (encryption, unknown compression); damaged lengths ask for too much memory.
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
    MemoryError,
    OverflowError,
)
TEXT_STYLES = {
    ".csv": TextStyle(",", header=True, quotes=True),
    ".tsv": TextStyle("\t", header=True, quotes=True),
    ".inter": TextStyle("\t", header=True, quotes=False, ids="any", types=True),
    ".dat": TextStyle("::", header=False, quotes=False),
    ".data": TextStyle("\t", header=False, quotes=False),
    ".rating": TextStyle("\t", header=False, quotes=False),
}
SUFFIXES = (
    *(suffix + packed for suffix in (*TEXT_STYLES, ".txt") for packed in ("", ".gz")),
    ".parquet",
    ".npz",
)


def is_supported(name: str) -> bool:
    """Whether the name of a file says that `read_interactions` reads it."""
    return name.endswith(SUFFIXES)


def read_interactions(path: Path, options: ReadOptions | None = None) -> Interactions:
    """Read a file of any of the kinds in this module's docstring.

    Rows and columns are numbered in ascending order of the raw ids, which need be neither contiguous nor numeric.
    Pairs that occur again are merged into the earliest.

    Raises:
        DataError: the file is missing, empty, truncated or holds something else; the message names the place.
        ConfigError: an option does not apply to this kind of file.
    """
    options = options or ReadOptions()
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    style = TEXT_STYLES.get(f".{suffix}")
    if path.name.endswith(".npz"):
        _only_filters(path, options, {"min_user", "min_item"})
        matrix, notes = read_matrix(path)
        ids = [np.arange(size, dtype=np.int64) for size in matrix.shape]
        data = Interactions(matrix, ids[0], ids[1], notes)
    elif style is not None:
        data = _from_table(path, read_text(path, style, options), options)
    elif path.name.endswith(".parquet"):
        data = _from_table(path, read_parquet(path, options), options)
    elif suffix == "txt":
        _only_filters(path, options, {"min_user", "min_item", "order"})
        if options.order == "time":
            raise DataError(
                f"{path}: lists of items have no timestamps; {spelled('order', 'file')} takes them as they are"
            )
        data = _from_table(path, read_lists(path), options)
    else:
        raise DataError(f"{path}: expected a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    if data.matrix.nnz == 0:
        raise DataError(f"{path}: no interaction in the data")
    if options.min_user > 1 or options.min_item > 1:
        try:
            data = k_core(data, options.min_user, options.min_item)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
    return data


def _only_filters(path: Path, options: ReadOptions, usable: set[str]) -> None:
    for field in fields(ReadOptions):
        if field.name not in usable and getattr(options, field.name) != field.default:
            raise ConfigError(f"{path}: {field.name} does not apply to a file without columns")


def _from_table(path: Path, table: Table, options: ReadOptions) -> Interactions:
    if not len(table.users):
        raise DataError(f"{path}: no interaction is left: no rating reaches min_rating {options.min_rating}")
    shape = len(table.user_ids), len(table.item_ids)
    matrix, order, time, repeated = merge_pairs(table.users, table.items, shape, table.time)
    told = time is not None or options.order == "file" or not _sorted_by_item(matrix, order)
    notes = _repeated(path, repeated)
    if table.unrated:
        notes += (f"{path.name}: {table.unrated} rows without a rating; ratings are not read",)
    if table.dropped:
        notes += (f"{path.name}: {table.dropped} rows with a rating below {options.min_rating:g} left out",)
    notes += tuple(
        note
        for field, ids in (("user", table.user_ids), ("item", table.item_ids))
        for note in _about_ids(path, field, ids)
    )
    return Interactions(matrix, table.user_ids, table.item_ids, notes, order if told else None, time)


def _sorted_by_item(matrix: csr_array, order: NDArray[np.int64]) -> bool:
    """Whether the items of every user ascend: then somebody has sorted the file, and its order is no history."""
    return np.array_equal(order, np.arange(matrix.nnz) - matrix.indptr[entry_rows(matrix)])


def _about_ids(path: Path, field: str, ids: NDArray[Any]) -> tuple[str, ...]:
    if ids.dtype.kind == "U":
        return (f"{path.name}: {field} ids are text",)
    if int(ids[-1]) - int(ids[0]) + 1 != len(ids):
        return (f"{path.name}: {len(ids)} {field} ids with gaps in {ids[0]}..{ids[-1]}, numbered anew",)
    return ()


def _repeated(path: Path, count: int) -> tuple[str, ...]:
    return (f"{path.name}: {count} repeated pairs merged",) if count else ()


def read_matrix(path: Path) -> tuple[csr_array, tuple[str, ...]]:
    """Read a scipy sparse matrix of users x items as ones, and notes on what was merged.

    Stored zeros are no interactions. Raises DataError on a damaged file, ids out of range, or values that are
    negative, NaN or infinite: the message names the first of them by row and column.
    """
    not_empty(path)
    try:
        # Opened here, as numpy leaves the file open if the archive turns out to be damaged.
        with path.open("rb") as file:
            loaded = sparse.load_npz(file)
        if loaded.ndim != 2:
            raise ValueError(f"expected two dimensions, users and items, got {loaded.ndim}")
        if hasattr(loaded, "check_format"):  # compressed formats trust their indices until asked
            loaded.check_format(full_check=True)
        coo = sparse.coo_array(loaded)
    except DAMAGED as error:
        raise DataError(
            f"{path}: not a whole sparse matrix as written by scipy.sparse.save_npz "
            f"(damaged, truncated, or ids out of range): {error}"
        ) from error
    values = coo.data
    if values.dtype.kind not in "biuf":
        raise DataError(f"{path}: expected values that are real numbers, got {values.dtype}")
    rows, cols = coo.coords
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(wrong):
        first = wrong[np.lexsort((cols[wrong], rows[wrong]))[0]]
        raise DataError(
            f"{path}: entry ({rows[first]}, {cols[first]}), row and column counted from 0: expected a value that is "
            f"finite and not negative, got {values[first]}; correct it or leave it out ({len(wrong)} such in all)"
        )
    kept = values != 0
    try:
        matrix, repeated = binary_csr(rows[kept], cols[kept], coo.shape)
    except MemoryError:
        raise DataError(
            f"{path}: no memory for the rows of a matrix of {coo.shape[0]} x {coo.shape[1]}"
        ) from None
    return matrix, _repeated(path, repeated)
