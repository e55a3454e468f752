"""`load(name)`: the synthetic set, a folder of the data directory, or a user's own file.

Layouts of a folder, told apart by the files in it, first match first:

    train.npz, {validation,test}_{tr,te}.npz               held-out users: fold-in (tr) and targets (te)
    train.npz, test.npz[, valid.npz]                       published split of each user
    train_subset.npz, test.npz                             the same, part of train missing
    interactions.npz | .csv.gz | .csv                      one file, split here

A folder may hold further ones: `ml-1m/dsl_multvae` is a name of its own. Beside them, `ids.npz` or
`test_negatives.npz` may give the raw ids (`item_ids`; `user_of_uid`).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from recsys.data.dataset import Dataset
from recsys.data.interactions import DAMAGED, read_interactions, read_matrix
from recsys.data.split import (
    SplitOptions,
    carve_validation,
    heldout_dataset,
    split_dataset,
    transductive_dataset,
)
from recsys.data.synthetic import synthetic
from recsys.errors import ConfigError, DataError

__all__ = ["DATA_VARIABLE", "available", "load"]

DATA_VARIABLE = "SPARSECORE_DATA"
FILE_SUFFIXES = (".csv", ".csv.gz", ".npz")
INTERACTION_FILES = ("interactions.npz", "interactions.csv.gz", "interactions.csv")
HELDOUT_FILES = ("validation_tr.npz", "validation_te.npz", "test_tr.npz", "test_te.npz")
SPLIT_OPTIONS = {"split": "kind", "validation": "validation", "test": "test", "fold_in": "fold_in"}
SYNTHETIC_OPTIONS = {
    "users": "n_users",
    "items": "n_items",
    "interactions": "n_interactions",
    "clusters": "n_clusters",
    **{option: option for option in SPLIT_OPTIONS},
}


def load(name: str, data_dir: str | Path | None = None, seed: int = 0, **options: Any) -> Dataset:
    """Load a dataset by name.

    Args:
        name: "synthetic"; a name of `available(data_dir)`; or the path of a .csv, .csv.gz or .npz file.
        data_dir: folder of datasets; None takes the environment variable SPARSECORE_DATA.
        seed: of the synthetic data and of every split made here; published splits are taken as they are.
        options: split ("ratio", "heldout"), validation, test, fold_in (see `SplitOptions`); for "synthetic"
        also
            users, items, interactions, clusters. A published split takes only validation, the fraction of
            train that is carved out where the split has no validation part of its own (default 0.1); asking
            for split="ratio" or "heldout" by name makes a new split, of the folder's interactions file or
            else of all published parts together. An option that is None counts as not given.

    Raises:
        DataError: unknown name (the message names the nearest), or bad data.
        ConfigError: unknown or unusable option.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if name == "synthetic":
        return synthetic(seed=seed, **_renamed(options, SYNTHETIC_OPTIONS, name))
    _renamed(options, SPLIT_OPTIONS, name)
    if name.endswith(FILE_SUFFIXES):
        return _split_file(name, Path(name), seed, options)
    root = _data_dir(data_dir)
    names = _folders(root) if root is not None else []
    if name not in names:
        raise DataError(_unknown(name, ["synthetic", *names], root))
    assert root is not None
    return _load_folder(name, root / name, seed, options)


def available(data_dir: str | Path | None = None) -> list[str]:
    """Names that `load` accepts: "synthetic", then every folder of the data directory with a known layout."""
    root = _data_dir(data_dir)
    return ["synthetic", *(_folders(root) if root is not None else [])]


def _renamed(options: dict[str, Any], known: dict[str, str], name: str) -> dict[str, Any]:
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"dataset {name}: unknown option {option!r}; nearest: {near!r} of {sorted(known)}"
            )
    return {known[option]: value for option, value in options.items()}


def _data_dir(data_dir: str | Path | None) -> Path | None:
    given = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE) or None
    if given is None:
        return None
    root = Path(given)
    if not root.is_dir():
        source = "--data-dir" if data_dir is not None else DATA_VARIABLE
        raise DataError(f"{source}: the data directory {str(root)!r} does not exist or is not a folder")
    return root


def _folders(root: Path) -> list[str]:
    candidates = [path for pattern in ("*/", "*/*/") for path in root.glob(pattern)]
    return sorted(path.relative_to(root).as_posix() for path in candidates if _loader(path) is not None)


def _unknown(name: str, names: list[str], root: Path | None) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    if root is None:
        return (
            f"unknown dataset {name!r}; nearest: {near!r}. No data directory is set: give one "
            f"by --data-dir or the environment variable {DATA_VARIABLE}, "
            "or name a .csv, .csv.gz or .npz file by its path"
        )
    return (
        f"unknown dataset {name!r}; nearest: {near!r}. "
        f"In {root} there are: {', '.join(names[1:]) or 'none'}. "
        f"Another data directory is chosen by --data-dir or the environment variable {DATA_VARIABLE}"
    )


def _has(folder: Path, names: Iterable[str]) -> bool:
    return all((folder / name).is_file() for name in names)


def _interaction_file(folder: Path) -> Path | None:
    return next((folder / name for name in INTERACTION_FILES if (folder / name).is_file()), None)


def _train_file(folder: Path) -> Path | None:
    names = ("train.npz", "train_subset.npz")
    return next((folder / name for name in names if _has(folder, (name, "test.npz"))), None)


Loader = Callable[[str, Path, int, dict[str, Any]], Dataset]


def _loader(folder: Path) -> Loader | None:
    if _has(folder, ("train.npz", *HELDOUT_FILES)):
        return _load_heldout
    if _train_file(folder) is not None:
        return _load_published
    if _interaction_file(folder) is not None:
        return lambda name, folder, seed, options: _split_file(name, _interaction_file(folder), seed, options)
    return None


def _load_folder(name: str, folder: Path, seed: int, options: dict[str, Any]) -> Dataset:
    loader = _loader(folder)
    assert loader is not None  # `name` came from `_folders`
    return loader(name, folder, seed, options)


def _split_file(name: str, path: Path | None, seed: int, options: dict[str, Any]) -> Dataset:
    assert path is not None
    data = read_interactions(path)
    split = SplitOptions(**_renamed(options, SPLIT_OPTIONS, name))
    return split_dataset(name, data.matrix, data.user_ids, data.item_ids, split, seed, notes=data.notes)


def _read_all(folder: Path, names: Iterable[str]) -> tuple[list[csr_array], tuple[str, ...]]:
    """Matrices that must agree in their number of items."""
    matrices: list[csr_array] = []
    notes: tuple[str, ...] = ()
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


def _ids(folder: Path, key: str, size: int) -> NDArray[np.int64] | None:
    """Raw ids that a file beside the split gives for at least `size` rows or columns, or None."""
    for path in (folder / "ids.npz", folder / "test_negatives.npz"):
        if not path.is_file():
            continue
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                ids = archive[key].astype(np.int64) if key in archive else None
        except DAMAGED as error:
            raise DataError(f"{path}: damaged or truncated: {error}") from error
        if ids is not None:
            if ids.ndim != 1 or len(ids) < size:
                raise DataError(f"{path}: {key} gives {ids.shape} ids, expected at least {size}")
            return ids
    return None


def _load_published(name: str, folder: Path, seed: int, options: dict[str, Any]) -> Dataset:
    train_file = _train_file(folder)
    assert train_file is not None
    with_validation = (folder / "valid.npz").is_file()
    files = [train_file.name, "test.npz", *(["valid.npz"] if with_validation else [])]
    matrices, notes = _read_all(folder, files)
    train, test = matrices[:2]
    for file, matrix in zip(files, matrices, strict=True):
        if matrix.shape != train.shape:
            raise DataError(f"{folder / file}: {matrix.shape[0]} users, but train has {train.shape[0]}")
    if train_file.name == "train_subset.npz":
        notes += ("train_subset.npz: part of the train pairs is absent; fit for timing, not for accuracy",)
    item_ids = _ids(folder, "item_ids", train.shape[1])
    if item_ids is None:
        item_ids = np.arange(train.shape[1], dtype=np.int64)
    user_ids = np.arange(train.shape[0], dtype=np.int64)
    if "split" in options:
        source = _interaction_file(folder)
        if source is not None:
            return _split_file(name, source, seed, options)
        union = csr_array(sum(matrices[1:], start=matrices[0]))
        union.data[:] = 1.0
        split = SplitOptions(**_renamed(options, SPLIT_OPTIONS, name))
        return split_dataset(name, union, user_ids, item_ids, split, seed, notes=notes)
    usable = set() if with_validation else {"validation"}
    _refuse(name, options, usable, "is a published split")
    if with_validation:
        validation = matrices[2]
    else:
        fraction = SplitOptions(validation=options.get("validation", 0.1), test=0.0).validation
        train, validation = carve_validation(train, fraction, seed)
        notes += (f"validation: {validation.nnz} of {validation.nnz + train.nnz} train pairs, seed {seed}",)
    return transductive_dataset(name, train, validation, test, user_ids, item_ids, notes=notes)


def _refuse(name: str, options: dict[str, Any], usable: set[str], why: str) -> None:
    for option in options:
        if option not in usable:
            raise ConfigError(f"dataset {name} {why}: option {option!r} does not apply to it")


def _load_heldout(name: str, folder: Path, seed: int, options: dict[str, Any]) -> Dataset:
    """Users of train, validation and test are different ones, numbered through in that order by
    `user_of_uid`.

    Rows without data are kept in train, so that the steps per epoch are those of the published loader; in
    validation and test a row without targets is dropped.
    """
    _refuse(name, options, set(), "is a published split of held-out users")
    (train, *parts), notes = _read_all(folder, ("train.npz", *HELDOUT_FILES))
    sizes = [train.shape[0], parts[0].shape[0], parts[2].shape[0]]
    item_ids = _ids(folder, "item_ids", train.shape[1])
    user_ids = _ids(folder, "user_of_uid", sum(sizes))
    if item_ids is None:
        item_ids = np.arange(train.shape[1], dtype=np.int64)
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
    return heldout_dataset(name, train, sets[0], sets[1], user_ids[: sizes[0]], item_ids, notes=notes)
