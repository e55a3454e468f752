"""The items that NCF's authors rank each test item among, as they publish them: NAME.test.negative(.gz).

    (user,item)<tab>item<tab>item ...     the test pair of a user, then the others, a user a line

It lies beside NAME.train.rating and NAME.test.rating, whose columns are those of MovieLens 100K. Ids are whole numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from recsys.data.text import opened
from recsys.errors import DataError

__all__ = ["Negatives", "negatives_beside", "read_negatives"]

LINE = re.compile(rb"\((\d{1,18}),\s*(\d{1,18})\)((?:\s+\d{1,18})+)\s*")


@dataclass(frozen=True, eq=False)
class Negatives:
    """Raw ids as they are in the file: users (n,), their test items (n,), and negatives (n, C), all int64."""

    path: Path
    users: NDArray[np.int64]
    targets: NDArray[np.int64]
    items: NDArray[np.int64]

    def candidates(
        self, test: csr_array, user_ids: NDArray[Any], item_ids: NDArray[Any]
    ) -> NDArray[np.int64]:
        """(number of users, C) columns, as `EvalSet.candidates`; users without a test item need no line.

        Raises:
            DataError: the lines are not those of the test pairs.
        """
        rows, cols = _places(user_ids, self.users), _places(item_ids, self.targets)
        tested = np.diff(test.indptr) > 0
        stray = np.ones(len(rows), dtype=bool)
        stray[np.unique(rows, return_index=True)[1]] = False
        stray |= (rows < 0) | (cols < 0) | ~tested[rows]
        if stray.any() or len(rows) < tested.sum():
            line = f":{np.argmax(stray) + 1}" if stray.any() else ""
            raise DataError(
                f"{self.path}{line}: expected one line for each of the {int(tested.sum())} users of the "
                f"test file and for no other, got {len(self.users)} lines of {len(np.unique(self.users))} users"
            )
        other = np.flatnonzero(np.asarray(test[rows, cols]).ravel() == 0)
        if len(other):
            raise DataError(
                f"{self.path}:{other[0] + 1}: ({self.users[other[0]]},{self.targets[other[0]]}) is no pair of the test "
                "file; both must be of one split"
            )
        found = np.zeros((len(user_ids), self.items.shape[1]), dtype=np.int64)
        found[rows] = _places(item_ids, self.items.ravel()).reshape(self.items.shape)
        return found


def _places(ids: NDArray[Any], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where ids are among ascending ones, -1 where they are not; numbers are looked for as text among text."""
    asked: NDArray[Any] = wanted.astype(np.str_) if ids.dtype.kind == "U" else wanted
    places = np.minimum(np.searchsorted(ids, asked), len(ids) - 1)
    return np.where(ids[places] == asked, places, -1)


def negatives_beside(test: Path) -> Path | None:
    """The file of negatives beside a test file, such as set.test.negative beside set.test.rating."""
    stem = test.name.removesuffix(".gz").rpartition(".")[0]
    found = (test.with_name(f"{stem}.negative{packed}") for packed in ("", ".gz"))
    return next((path for path in found if path.is_file()), None)


def read_negatives(path: Path) -> Negatives:
    """Read such a file.

    Raises:
        DataError: with the line that is not of this form, or has another number of items than the first.
    """
    users, targets, rows = [], [], []
    blank = 0  # the first blank line, which only the end may follow
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                blank = blank or number
                continue
            found = LINE.fullmatch(line) if not blank else None
            if found is None:
                shown = line[:40].decode("utf-8", "replace").strip()
                raise DataError(
                    f"{path}:{blank or number}: expected (user,item) and items, separated by tabs, got "
                    f"{'' if blank else shown!r}"
                )
            users.append(int(found[1]))
            targets.append(int(found[2]))
            rows.append(np.array(found[3].split(), dtype=np.int64))
            if len(rows[-1]) != len(rows[0]):
                raise DataError(
                    f"{path}:{number}: expected {len(rows[0])} items after the pair, as in line 1, got {len(rows[-1])}"
                )
    return Negatives(path, np.array(users, np.int64), np.array(targets, np.int64), np.array(rows, np.int64))
