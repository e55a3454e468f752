"""`load(name)`: the synthetic set, a folder of the data directory, or a user's own file or folder."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from recsys.data.dataset import Dataset
from recsys.data.download import ORIGINS, SOURCES
from recsys.data.folders import LOAD_OPTIONS, SPLIT_OPTIONS, is_dataset, load_folder, split_file
from recsys.data.formats import SUFFIXES, is_supported
from recsys.data.synthetic import synthetic
from recsys.errors import ConfigError, DataError

__all__ = ["DATA_VARIABLE", "anchored", "available", "load"]

DATA_VARIABLE = "SPARSECORE_DATA"
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
        name: "synthetic"; a name of `available(data_dir)`; the path of a file of a supported kind
            (`recsys.data.formats`) or of a folder that has a known layout (`recsys.data.folders`). A name of
            `available(data_dir)` goes before a folder here of that name.
        data_dir: folder of datasets; None takes the environment variable SPARSECORE_DATA. A file or folder that is no
            longer where its path says is looked for in a `data_dir` that is given, too, by the last part of its name.
        seed: of the synthetic data and of every split made here; published splits are taken as they are.
        options: split ("ratio", "heldout", "loo", "temporal"), validation, test, fold_in (see `SplitOptions`); for a
            file or folder that is split here also those of `ReadOptions` (columns, separator, header, ids, order,
            min_rating, min_user, min_item); for "synthetic" users, items, interactions, clusters. A published split
            takes only validation, where it has no validation part of its own: the fraction of train that is carved
            out (default 0.1), or in a leave-one-out split 1 (default), one item of each user. 0 carves out none, and
            where there is a validation part, trains on it, too.
            Asking for a split by name makes a new one, of the folder's interactions file or else of all published
            parts together; but "loo" alone takes a folder as it is that was prepared by it. An option that is None
            counts as not given.

    Raises:
        DataError: unknown name (the message names the nearest), or bad data.
        ConfigError: unknown or unusable option.
    """
    if seed < 0:
        raise ConfigError(f"dataset {name}: expected a seed that is not negative, got {seed}")
    options = {key: value for key, value in options.items() if value is not None}
    if name == "synthetic":
        check_options(name, options, SYNTHETIC_OPTIONS)
        return synthetic(seed=seed, **{SYNTHETIC_OPTIONS[key]: value for key, value in options.items()})
    check_options(name, options, LOAD_OPTIONS)
    path = Path(name)
    if data_dir is not None and not os.path.exists(path) and (is_supported(name) or path.is_absolute()):
        path = Path(data_dir) / path.name
    if is_supported(name):
        return split_file(name, path, seed, options)
    if path.is_absolute() and is_dataset(path):
        return load_folder(name, path, seed, options)
    root = _data_dir(data_dir)
    names = _folders(root) if root is not None else []
    if root is not None and name in names:
        return load_folder(name, root / name, seed, options)
    if path.is_dir():
        return load_folder(name, path, seed, options)
    raise DataError(_unknown(name, ["synthetic", *names], root, options.get("split")))


def anchored(name: str, data_dir: str | Path | None = None) -> str:
    """The name of a dataset, or the absolute path of a file or folder here that `load` would take for it."""
    if is_supported(name) or Path(name).is_absolute():
        return str(Path(name).resolve())
    if is_dataset(Path(name)) and name not in available(data_dir):
        return str(Path(name).resolve())
    return name


def available(data_dir: str | Path | None = None) -> list[str]:
    """Names that `load` accepts: "synthetic", then every folder of the data directory with a known layout."""
    root = _data_dir(data_dir)
    return ["synthetic", *(_folders(root) if root is not None else [])]


def check_options(name: str, options: dict[str, Any], known: Any) -> None:
    """Raise ConfigError, naming the nearest, for an option that is not among `known`."""
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"dataset {name}: unknown option {option!r}; nearest: {near!r} of {sorted(known)}"
            )


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
    # A name with a dot in front is a folder that is being written.
    names = {path.relative_to(root).as_posix() for path in candidates if is_dataset(path)}
    return sorted(name for name in names if not name.startswith(".") and "/." not in name)


def _unknown(name: str, names: list[str], root: Path | None, split: str | None) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    place = "DIR" if root is None else root
    if name in SOURCES:
        how = f"{name} -o {place}/{name}" + (f" --split {split}" if split else "")
        known = f". It can be downloaded: `recsys data prepare {how}`, then --data-dir {place}"
    else:
        known = f". {name} is {ORIGINS[name]}, to be brought into {place}/{name}" if name in ORIGINS else ""
    if root is None:
        meant = ", did you mean 'synthetic'?" if difflib.get_close_matches(name, ["synthetic"]) else "."
        return (
            f"unknown dataset {name!r}{meant} No data directory is set: give one "
            f"by --data-dir or the environment variable {DATA_VARIABLE}, "
            f"or name a file by its path ({', '.join(SUFFIXES)}); `recsys data list` tells what can be downloaded"
            + known
        )
    return (
        f"unknown dataset {name!r}; nearest: {near!r}. "
        f"In {root} there are: {', '.join(names[1:]) or 'none'}. "
        f"Another data directory is chosen by --data-dir or the environment variable {DATA_VARIABLE}" + known
    )
