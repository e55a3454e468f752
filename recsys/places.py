"""Rows and columns of raw ids."""

from __future__ import annotations

import difflib
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.errors import DataError

__all__ = ["Places"]

_FEW = 2000  # texts that are looked through for the nearest one in the time of an answer
_WHOLE = re.compile(r"-?[0-9]{1,19}")  # more digits no int64 has; int() takes "1_0" too


class Places:
    """Where raw ids stand in an array, by binary search: a dict of half a million texts takes more memory than a small
    sparse model that it is for. Ascending ids, as those of most data sets, need nothing beside the array.

    Args:
        ids: int64 or unicode, each once.
        what: "user" or "item", for messages.
        hint: what else to try where an id is unknown, for messages.
    """

    def __init__(self, ids: NDArray[Any], what: str, hint: str = "") -> None:
        self.ids, self._what, self._hint = ids, what, hint
        ascending = bool((ids[:-1] < ids[1:]).all())
        self._order = None if ascending else np.argsort(ids, kind="stable")

    def find(self, raw: int | str) -> int | None:
        """The place of a raw id, if there is one. Text is accepted for numeric ids."""
        if not isinstance(raw, str | int | np.integer) or isinstance(raw, bool):
            return None
        key: Any = str(raw)
        if self.ids.dtype.kind == "U":
            if 4 * len(key) > self.ids.dtype.itemsize:
                return None  # longer than any; numpy would widen all to compare them
        elif not _WHOLE.fullmatch(key) or not -(2**63) <= (key := int(key)) < 2**63:
            return None
        key = np.array(key, dtype=self.ids.dtype)
        place = int(np.searchsorted(self.ids, key, sorter=self._order))
        if place == len(self.ids):
            return None
        place = place if self._order is None else int(self._order[place])
        return place if self.ids[place] == key else None

    def of(self, raw: int | str) -> int:
        """The place of a raw id.

        Raises:
            DataError: there is none; it names the nearest id (of a few texts).
        """
        place = self.find(raw)
        if place is not None:
            return place
        ids, what, key = self.ids, self._what, str(raw)
        numeric = ids.dtype.kind != "U"
        known = isinstance(raw, str | int | np.integer) and not isinstance(raw, bool)
        if not known or (numeric and not _WHOLE.fullmatch(key)):
            kind = "whole numbers" if numeric else "text"
            raise DataError(
                f"{what} {key[:40]!r} is unknown: ids of this recommender are {kind}, such as {ids[0]}"
            )
        if numeric:
            near = f"the nearest is {ids[np.abs(ids.astype(np.float64) - float(key)).argmin()]}"
        elif len(ids) <= _FEW:
            near = f"the nearest is {difflib.get_close_matches(key, ids.tolist(), n=1, cutoff=0)[0]}"
        else:
            near = f"they are such as {ids[0]}"
        raise DataError(
            f"{what} {raw!r} is unknown to this recommender of {len(ids)} {what}s; {near}{self._hint}"
        )
