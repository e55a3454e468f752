"""A column of raw ids, gathered piece by piece: checked on its distinct values, numbered at the end."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.data.spelling import spelled

__all__ = ["IdColumn", "IdMode"]

IdMode = Literal["auto", "any", "text"]

LONGEST_FIELD = 256  # bytes; numpy keeps text as wide as the longest of it
DIGITS_OF_INT64 = 18
NUMBER = rf"^(0|[1-9][0-9]{{0,{DIGITS_OF_INT64 - 1}}})$"
NUMBER_MEANT = r"^-?(0|[1-9][0-9]*)$"


class IdColumn:
    """Ids of one column; `mode` as in `ReadOptions.ids`. Pieces are arrays of codes into distinct raw ids."""

    def __init__(self, field: str, mode: IdMode) -> None:
        self.field, self.mode = field, mode
        self._numeric: bool | None = False if mode == "text" else None
        self._pieces: list[pa.DictionaryArray] = []

    def problem(self, piece: pa.DictionaryArray) -> tuple[int, str] | None:
        """The first row of a piece whose id cannot be one, and why; None if all can."""
        if piece.indices.null_count:
            absent = piece.indices.is_null().to_numpy(zero_copy_only=False)
            return int(np.argmax(absent)), "the field is empty"
        codes = piece.indices.to_numpy()
        if not len(codes):
            return None
        values = piece.dictionary
        integers = pa.types.is_integer(values.type)
        wrong = values.to_numpy() < 0 if integers else self._wrong_text(values, int(codes[0]))
        if not wrong.any():
            return None
        row = int(np.argmax(wrong[codes]))
        if not wrong[codes[row]]:
            return None  # a distinct value that no row has
        return row, self._reason(values[int(codes[row])].as_py())

    def _wrong_text(self, values: pa.Array, first: int) -> NDArray[np.bool_]:
        length = pc.binary_length(values).to_numpy(zero_copy_only=False)
        wrong = (length == 0) | (length > LONGEST_FIELD)
        try:
            text = values.cast(pa.string())
        except pa.ArrowInvalid:
            decodable = np.array([_decodes(value) for value in values.to_pylist()])
            return wrong | ~decodable
        wrong |= pc.match_substring(text, "\0").to_numpy(zero_copy_only=False)
        if self._numeric is None and self.mode == "auto":
            self._numeric = bool(pc.match_substring_regex(text.slice(first, 1), NUMBER_MEANT)[0].as_py())
        if self._numeric:
            wrong |= ~pc.match_substring_regex(text, NUMBER).to_numpy(zero_copy_only=False)
        return wrong

    def _reason(self, value: Any) -> str:
        if value == b"":
            return "the field is empty"
        if isinstance(value, bytes):
            if len(value) > LONGEST_FIELD:
                return f"more than {LONGEST_FIELD} bytes"
            if not _decodes(value):
                return f"expected UTF-8 text, got {value[:40]!r}"
            if b"\0" in value:
                return f"a NUL character in {value[:40]!r}"
            value = value.decode()[:40]
        return (
            f"expected a whole number that is not negative, has at most {DIGITS_OF_INT64} digits and no leading "
            f"zero, as in the first row, got {str(value)!r}; {spelled('ids', 'text')} takes ids as text"
        )

    def add(self, piece: pa.DictionaryArray) -> None:
        """Keep a piece in which there was no problem."""
        self._pieces.append(piece)

    def numbered(self) -> tuple[NDArray[np.int32], NDArray[Any]]:
        """(n,) number of each row's id, and the raw ids by number: ascending, int64 or unicode, all of them used."""
        if not sum(len(piece) for piece in self._pieces):
            return np.empty(0, np.int32), np.empty(0, np.int64)
        whole = pa.chunked_array(self._pieces).unify_dictionaries()
        self._pieces = []
        codes = np.concatenate([piece.indices.to_numpy() for piece in whole.chunks])
        values = whole.chunk(0).dictionary
        del whole
        used = np.flatnonzero(np.bincount(codes, minlength=len(values)))
        ids = self._raw(values.take(pa.array(used)))
        ascending = np.argsort(ids, kind="stable")
        number = np.zeros(len(values), dtype=np.int32)
        number[used[ascending]] = np.arange(len(used), dtype=np.int32)
        return number[codes], ids[ascending]

    def _raw(self, values: pa.Array) -> NDArray[Any]:
        if pa.types.is_integer(values.type):
            return values.to_numpy()
        text = values.cast(pa.string())
        numeric = self._numeric
        if numeric is None:
            numeric = bool(pc.all(pc.match_substring_regex(text, NUMBER)).as_py())
        return text.cast(pa.int64()).to_numpy() if numeric else np.array(text.to_pylist(), dtype=np.str_)


def _decodes(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
