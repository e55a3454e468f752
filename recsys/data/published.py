"""Published splits: matrices of train, test and perhaps validation that lie in one folder.

Beside them: `ids.npz` (`user_ids`, or `user_of_uid` for the users of all held-out parts one after another;
`item_ids`), `order.npz` (`order`: place of each train pair in its user's history), `test_negatives.npz` (`negatives`:
(users, C) items that the test item is ranked among; `item_ids`), `prepared.json` (`notes`). All are optional. If no
file tells the order, an interactions file of the same users does, in the folder or in the one around it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from recsys.csr import entry_rows, rank_in_rows
from recsys.data.dataset import Dataset
from recsys.data.formats import DAMAGED, read_interactions, read_matrix
from recsys.data.split import heldout_dataset, order_of_part, transductive_dataset
from recsys.data.validation import validation_of, with_validation
from recsys.errors import DataError

__all__ = [
    "ABOUT_FILE",
    "HELDOUT_FILES",
    "VALIDATION_NAMES",
    "holds_leave_one_out",
    "left_out",
    "load_heldout",
    "load_published",
    "published_parts",
    "published_train",
    "published_validation",
]

VALIDATION_NAMES = ("valid", "validation", "val")

HELDOUT_FILES = ("validation_tr.npz", "validation_te.npz", "test_tr.npz", "test_te.npz")
ABOUT_FILE = "prepared.json"


def published_train(folder: Path) -> Path | None:
    """The train file of a folder that has one and a test file."""
    names = ("train.npz", "train_subset.npz")
    has_test = (folder / "test.npz").is_file()
    return next((folder / name for name in names if has_test and (folder / name).is_file()), None)


def _read_all(folder: Path, names: Iterable[str]) -> tuple[list[csr_array], tuple[str, ...]]:
    """Matrices that must agree in their number of items, and notes."""
    matrices: list[csr_array] = []
    notes = _noted(folder)
    for name in names:
        matrix, noted = read_matrix(folder / name)
        if matrices and matrix.shape[1] != matrices[0].shape[1]:
            raise DataError(
                f"{folder / name}: {matrix.shape[1]} items, but train has {matrices[0].shape[1]}; "
                "all parts of a split must have the same columns"
            )
        matrices.append(matrix)
        notes += noted
    return matrices, notes


def _noted(folder: Path) -> tuple[str, ...]:
    return tuple(map(str, _about(folder).get("notes", ())))


def holds_leave_one_out(folder: Path) -> bool:
    """Whether the folder was prepared by split="loo" with all its parts: what that split would make of the source."""
    options = _about(folder).get("options", {})
    return options.get("split") == "loo" and not {"validation", "test"} & options.keys()


def _about(folder: Path) -> dict[str, Any]:
    """The notes of a prepared data set, the name of its split, and all options; empty for others."""
    path = folder / ABOUT_FILE
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        notes = about["notes"]
        if not isinstance(notes, list):
            raise TypeError(f"notes are {type(notes).__name__}")
        options = dict(about.get("options", {}))
        return {"notes": notes, "split": options.get("split"), "options": options}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged: expected JSON with a list 'notes': {error}") from error


def _array(path: Path, key: str) -> NDArray[Any] | None:
    """One array of an .npz file, or None without the file or the key."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return archive.get(key)
    except DAMAGED as error:
        raise DataError(f"{path}: damaged or truncated: {error}") from error


def _ids(folder: Path, key: str, size: int) -> NDArray[Any] | None:
    """Raw ids that a file beside the split gives for at least `size` rows or columns, or None."""
    for path in (folder / "ids.npz", folder / "test_negatives.npz"):
        ids = _array(path, key)
        if ids is None:
            continue
        if ids.ndim != 1 or len(ids) < size:
            raise DataError(f"{path}: {key} gives {ids.shape} ids, expected at least {size}")
        if ids.dtype.kind not in "iuU":
            raise DataError(f"{path}: {key}: expected integers or text, got {ids.dtype}")
        if ids.dtype.kind == "u" and ids.max(initial=0) >= 2**63:
            raise DataError(
                f"{path}: {key}: expected integers below 2^63, got {ids.max()}; give them as text"
            )
        return ids if ids.dtype.kind == "U" else ids.astype(np.int64)
    return None


def _exactly(folder: Path, key: str, size: int) -> NDArray[Any]:
    ids = _ids(folder, key, size)
    return np.arange(size, dtype=np.int64) if ids is None else ids[:size]


def published_validation(folder: Path) -> str | None:
    """Name of the file of validation pairs, if there is one.

    Raises:
        DataError: there are several.
    """
    found = [f"{name}.npz" for name in VALIDATION_NAMES if (folder / f"{name}.npz").is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: expected one file of validation pairs, got {', '.join(found)}")
    return found[0] if found else None


def published_parts(
    folder: Path,
) -> tuple[list[csr_array], NDArray[Any], NDArray[Any], tuple[str, ...]]:
    """([train, test, perhaps validation], user_ids, item_ids, notes) of a published split of each user."""
    train_file = published_train(folder)
    assert train_file is not None
    validation = published_validation(folder)
    files = [train_file.name, "test.npz", *([validation] if validation else [])]
    matrices, notes = _read_all(folder, files)
    train = matrices[0]
    for file, matrix in zip(files, matrices, strict=True):
        if matrix.shape != train.shape:
            raise DataError(f"{folder / file}: {matrix.shape[0]} users, but train has {train.shape[0]}")
    if train_file.name == "train_subset.npz":
        notes += ("train_subset.npz: part of the train pairs is absent; fit for timing, not for accuracy",)
    user_ids = _exactly(folder, "user_ids", train.shape[0])
    item_ids = _exactly(folder, "item_ids", train.shape[1])
    return matrices, user_ids, item_ids, notes


def load_published(
    name: str,
    folder: Path,
    seed: int,
    validation: float | None = None,
    sources: Iterable[Path | None] = (),
) -> Dataset:
    """A published split of each user, with its order and its candidates where they are known.

    validation: what is carved out of train if there is no validation part, see `validation_of`; 0 if there is one
        trains on it, too.
    sources: interactions files, the first of which that has the same users and all pairs tells order and user ids.
    """
    matrices, user_ids, item_ids, notes = published_parts(folder)
    train, test = matrices[:2]
    order = _order(folder, train)
    leave_one_out = _about(folder).get("split") == "loo"
    if len(matrices) == 3 and validation is not None:
        train, order = with_validation(train, matrices[2], order if leave_one_out else None)
        matrices = [train, test]
    if order is None:
        found = _from_source(matrices, user_ids, item_ids, sources)
        if found is not None:
            order, user_ids, note = found
            notes += (note,)
    if len(matrices) == 3:
        rest, held = train, matrices[2]
    else:
        rest, held, said = validation_of(train, test, order, validation, seed)
        notes += said
    return transductive_dataset(
        name,
        rest,
        held,
        test,
        user_ids,
        item_ids,
        notes=notes,
        order=order_of_part(train, order, rest),
        candidates=_candidates(folder, train.shape),
        targets_last=leave_one_out,
        later=left_out(folder, user_ids, item_ids),
    )


def left_out(
    folder: Path, user_ids: NDArray[Any], item_ids: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Pairs that `prepare` left out of all parts, by raw ids."""
    path = folder / "later.npz"
    users, items = _array(path, "users"), _array(path, "items")
    if users is None or items is None:
        return None
    kinds = users.dtype.kind + items.dtype.kind
    if users.ndim != 1 or users.shape != items.shape or kinds != user_ids.dtype.kind + item_ids.dtype.kind:
        raise DataError(
            f"{path}: expected users and items, as many of each, with raw ids like those of ids.npz; got "
            f"{users.dtype} of shape {users.shape} and {items.dtype} of shape {items.shape}"
        )
    return users, items


def _order(folder: Path, train: csr_array) -> NDArray[np.int64] | None:
    order = _array(folder / "order.npz", "order")
    if order is None:
        return None
    if order.shape != (train.nnz,) or order.dtype.kind not in "iu":
        raise DataError(
            f"{folder / 'order.npz'}: expected {train.nnz} whole numbers, one for each pair of train.npz, got "
            f"{order.dtype} of shape {order.shape}"
        )
    order = order.astype(np.int64)
    ranked = rank_in_rows(train, order)
    if not np.array_equal(ranked, order):
        raise DataError(f"{folder / 'order.npz'}: the places of each user must be 0, 1, ... without gaps")
    return order


def _from_source(
    matrices: list[csr_array], user_ids: NDArray[Any], item_ids: NDArray[Any], sources: Iterable[Path | None]
) -> tuple[NDArray[np.int64], NDArray[Any], str] | None:
    """Order of the train pairs, raw user ids, and where they are from.

    A source counts only if it has as many users (row k is the k-th of them in ascending order), and if every pair of
    the split is among its pairs: by chance that does not happen.
    """
    train = matrices[0]
    for path in sources:
        if path is None or path.name.endswith(".npz"):
            continue
        try:
            data = read_interactions(path)
        except DataError:  # a file that happens to lie there: it could only have told the order
            continue
        if (
            data.order is None
            or data.matrix.shape[0] != train.shape[0]
            or data.item_ids.dtype.kind != item_ids.dtype.kind
        ):
            continue
        columns = np.minimum(np.searchsorted(data.item_ids, item_ids), len(data.item_ids) - 1)
        if not np.array_equal(data.item_ids[columns], item_ids):
            continue
        keys = entry_rows(data.matrix) * data.matrix.shape[1] + data.matrix.indices
        places = []
        for part in matrices:
            wanted = entry_rows(part) * data.matrix.shape[1] + columns[part.indices]
            place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            if not np.array_equal(keys[place], wanted):
                break
            places.append(place)
        else:
            return (
                rank_in_rows(train, data.order[places[0]]),
                data.user_ids,
                f"order of the train pairs and user ids: rows of {path.name}",
            )
    return None


def _candidates(folder: Path, shape: tuple[int, int]) -> NDArray[np.int64] | None:
    path = folder / "test_negatives.npz"
    negatives = _array(path, "negatives")
    if negatives is None:
        return None
    if negatives.ndim != 2 or len(negatives) != shape[0] or negatives.dtype.kind not in "iu":
        raise DataError(
            f"{path}: negatives: expected whole numbers of shape ({shape[0]}, C), got {negatives.dtype} of "
            f"shape {negatives.shape}"
        )
    if negatives.size and not 0 <= negatives.min() <= negatives.max() < shape[1]:
        raise DataError(f"{path}: negatives: expected items in 0..{shape[1] - 1}")
    return negatives.astype(np.int64)


def load_heldout(name: str, folder: Path) -> Dataset:
    """Users of train, validation and test are different ones, numbered through in that order by `user_of_uid`.

    Rows without data are kept in train, so that the steps per epoch are those of the published loader; in
    validation and test a row without targets is dropped.
    """
    (train, *parts), notes = _read_all(folder, ("train.npz", *HELDOUT_FILES))
    sizes = [train.shape[0], parts[0].shape[0], parts[2].shape[0]]
    user_ids = _ids(folder, "user_of_uid", sum(sizes))
    if user_ids is None:
        user_ids = np.arange(sum(sizes), dtype=np.int64)
    sets = []
    for index, what in enumerate(("validation", "test")):
        inputs, targets = parts[2 * index : 2 * index + 2]
        if inputs.shape != targets.shape:
            raise DataError(f"{folder}: {what}_tr has {inputs.shape[0]} users, {what}_te {targets.shape[0]}")
        first = sizes[0] if what == "validation" else len(user_ids) - sizes[2]
        ids = user_ids[first : first + sizes[index + 1]]
        rows = np.flatnonzero(np.diff(targets.indptr))
        sets.append((csr_array(inputs[rows]), csr_array(targets[rows]), ids[rows]))
    return heldout_dataset(
        name,
        train,
        sets[0],
        sets[1],
        user_ids[: sizes[0]],
        _exactly(folder, "item_ids", train.shape[1]),
        notes=notes,
        order=_order(folder, train),
    )
