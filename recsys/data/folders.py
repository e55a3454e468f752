"""Folders of datasets: what lies in them and how it becomes a Dataset.

Layouts, told apart by the files in the folder, first match first:

    train.npz, {validation,test}_{tr,te}.npz     held-out users: fold-in (tr) and targets (te)
    train.*, {validation,test}_{tr,te}.*         the same in tables, see `recsys.data.heldout_tables`
    train.npz, test.npz[, valid.npz]             published split of each user, see `recsys.data.published`
    train_subset.npz, test.npz                   the same, part of train missing
    train.*, test.*[, valid.*]                   given parts in any other kind of `recsys.data.formats`; also
    NAME.train.*, NAME.test.*[, NAME.valid.*]    as RecBole and NCF name them, perhaps with NAME.test.negative
    interactions.*                               one file, split here; also
    ratings.dat, u.data, NAME.inter              as MovieLens and RecBole name it (NAME: the folder's)

A folder may hold further ones: `ml-1m/dsl_multvae` is a name of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from recsys.csr import entry_rows
from recsys.data.dataset import Dataset
from recsys.data.everything import with_later
from recsys.data.formats import SUFFIXES, is_supported, read_interactions
from recsys.data.heldout_tables import heldout_tables, load_heldout_tables
from recsys.data.interactions import Interactions, all_ids, merge_pairs, renumbered
from recsys.data.ncf import negatives_beside, read_negatives
from recsys.data.options import ReadOptions
from recsys.data.published import (
    HELDOUT_FILES,
    VALIDATION_NAMES,
    holds_leave_one_out,
    left_out,
    load_heldout,
    load_published,
    published_parts,
    published_train,
    published_validation,
)
from recsys.data.spelling import spelled
from recsys.data.split import SplitOptions, order_of_part, split_dataset, transductive_dataset
from recsys.data.validation import validation_of
from recsys.errors import ConfigError, DataError, naming

__all__ = ["LOAD_OPTIONS", "READ_OPTIONS", "SPLIT_OPTIONS", "is_dataset", "load_folder", "split_file"]

SPLIT_OPTIONS = {"split": "kind", "validation": "validation", "test": "test", "fold_in": "fold_in"}
READ_OPTIONS = tuple(field.name for field in fields(ReadOptions))
# A k-core would change the parts of a split that is given.
_READ_OF_PARTS = tuple(name for name in READ_OPTIONS if name not in ("min_user", "min_item"))
LOAD_OPTIONS = (*SPLIT_OPTIONS, *READ_OPTIONS)


def is_dataset(folder: Path) -> bool:
    """Whether the folder has one of the layouts of this module's docstring, or two (to load it says which)."""
    try:
        return folder.is_dir() and _loader(folder) is not None
    except DataError:
        return True
    except OSError:  # another's folder, such as lost+found
        return False


def load_folder(name: str, folder: Path, seed: int, options: dict[str, Any]) -> Dataset:
    """The dataset in a folder; options as in `recsys.data.load`.

    Raises:
        DataError: no known layout, or bad data.
        ConfigError: an option does not apply.
    """
    try:
        loader = _loader(folder) if folder.is_dir() else None
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    if loader is None:
        raise DataError(
            f"{folder}: expected a folder with train and test files or an interactions file, of one of the kinds "
            f"{', '.join(SUFFIXES)}; a folder of several datasets is given as --data-dir"
        )
    with naming(folder):
        return loader(name, folder, seed, options)


Loader = Callable[[str, Path, int, dict[str, Any]], Dataset]


def _loader(folder: Path) -> Loader | None:
    if all((folder / file).is_file() for file in ("train.npz", *HELDOUT_FILES)):
        return _heldout
    if heldout_tables(folder) is not None:
        return _heldout_tables
    if published_train(folder) is not None:
        return _published
    if _part_files(folder) is not None:
        return _given
    if _interaction_file(folder) is not None:
        return lambda name, folder, seed, options: split_file(name, _interaction_file(folder), seed, options)
    return None


def _interaction_file(folder: Path) -> Path | None:
    own = [f"interactions{suffix}" for suffix in (".npz", ".csv.gz", ".csv", *SUFFIXES)]
    names = [*own, "ratings.dat", "u.data", f"{folder.name}.inter"]
    found = [folder / name for name in dict.fromkeys(names) if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(
            f"{folder}: expected one file of interactions, got {', '.join(path.name for path in found)}"
        )
    return found[0] if found else None


def _part_files(folder: Path) -> dict[str, Path] | None:
    """Files of the parts train, test and perhaps validation, or None without the first two."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in sorted(folder.iterdir()):
        if not is_supported(path.name) or not path.is_file():
            continue
        suffix = next(end for end in SUFFIXES if path.name.endswith(end))
        stem = path.name.removesuffix(".gz").removesuffix(suffix.removesuffix(".gz"))
        name, _, part = stem.rpartition(".")
        part = "validation" if part in VALIDATION_NAMES else part
        if part in ("train", "test", "validation"):
            found.setdefault(part, []).append((name, path))
    if not {"train", "test"} <= found.keys():
        return None
    files = [file for several in found.values() for file in several]
    if len(files) > len(found) or len({name for name, _ in files}) > 1:
        listed = ", ".join(path.name for _, path in files)
        raise DataError(
            f"{folder}: expected one file for each of train, test and perhaps validation, all of one name; got {listed}"
        )
    return {part: several[0][1] for part, several in found.items()}


def split_file(name: str, path: Path | None, seed: int, options: dict[str, Any]) -> Dataset:
    """Read one file and divide it here."""
    assert path is not None
    split = _split_options(options)
    data = read_interactions(path, _read_options(options))
    with naming(path):
        return _split_one(name, data, split, seed, options)


def _split_one(
    name: str, data: Interactions, split: SplitOptions, seed: int, options: dict[str, Any]
) -> Dataset:
    if split.kind == "loo" and data.time is None and options.get("order") != "file":
        raise DataError(
            f"{name}: the split 'loo' takes the last interaction by time and there are no timestamps; name their "
            f"column: {spelled('timestamp_column')}; or, if the rows are in the order of time, "
            f"{spelled('order', 'file')}"
        )
    return split_dataset(
        name,
        data.matrix,
        data.user_ids,
        data.item_ids,
        split,
        seed,
        notes=data.notes,
        order=data.order,
        time=data.time,
    )


def _split_options(options: dict[str, Any]) -> SplitOptions:
    return SplitOptions(
        **{SPLIT_OPTIONS[key]: value for key, value in options.items() if key in SPLIT_OPTIONS}
    )


def _read_options(options: dict[str, Any]) -> ReadOptions:
    return ReadOptions(**{key: value for key, value in options.items() if key in READ_OPTIONS})


def _refuse(name: str, options: dict[str, Any], usable: set[str], why: str) -> None:
    for option in options:
        if option not in usable:
            raise ConfigError(f"dataset {name} {why}: option {option!r} does not apply to it")


def _check_validation(name: str, options: dict[str, Any], usable: set[str], has_part: bool) -> None:
    """Refuse what a split that is given does not take: a validation part is left as it is, or trained on whole."""
    _refuse(name, options, {*usable, "validation"}, "is a published split")
    if has_part and options.get("validation", 0) != 0:
        raise ConfigError(
            f"dataset {name} has a validation part: option 'validation' does not apply to it but as 0, which trains "
            f"on that part, too; got {options['validation']!r}"
        )


def _heldout(name: str, folder: Path, seed: int, options: dict[str, Any]) -> Dataset:
    _refuse(name, options, set(), "is a published split of held-out users")
    return load_heldout(name, folder)


def _heldout_tables(name: str, folder: Path, seed: int, options: dict[str, Any]) -> Dataset:
    _refuse(name, options, set(_READ_OF_PARTS), "is a published split of held-out users")
    files = heldout_tables(folder)
    assert files is not None
    return load_heldout_tables(name, files, _read_options(options))


def _published(name: str, folder: Path, seed: int, options: dict[str, Any]) -> Dataset:
    # A preset that asks for this split trains on a folder that `recsys data prepare` divided so, too: its parts
    # together no longer tell the order that would be needed to do it again.
    if options == {"split": "loo"} and holds_leave_one_out(folder):
        options = {}
    if "split" in options:
        source = _interaction_file(folder)
        if source is not None:
            return split_file(name, source, seed, options)
        _refuse(name, options, set(SPLIT_OPTIONS), "is a published split without a file of all interactions")
        matrices, user_ids, item_ids, notes = published_parts(folder)
        union = csr_array(sum(matrices[1:], start=matrices[0]))
        union.data[:] = 1.0
        later = left_out(folder, user_ids, item_ids)
        if later is not None:
            union, user_ids, item_ids = with_later(union, user_ids, item_ids, later)
        return split_dataset(name, union, user_ids, item_ids, _split_options(options), seed, notes=notes)
    _check_validation(name, options, set(), published_validation(folder) is not None)
    # The folder's own file, or that of the folder around it, may tell the order.
    sources = (_source_of_order(folder), _source_of_order(folder.parent))
    return load_published(name, folder, seed, options.get("validation"), sources)


def _source_of_order(folder: Path) -> Path | None:
    try:
        return _interaction_file(folder)
    except (DataError, OSError):  # several, of which none is asked for; or another's folder
        return None


def _given(name: str, folder: Path, seed: int, options: dict[str, Any]) -> Dataset:
    """Parts in files of their own; ids are those of all parts together, so every row and column has a raw id."""
    files = _part_files(folder)
    assert files is not None
    read = _read_options(options)
    if read.min_user or read.min_item:
        raise ConfigError(f"dataset {name} is a given split: min_user and min_item would change its parts")
    parts = {part: read_interactions(path, read) for part, path in files.items()}
    beside = negatives_beside(files["test"])
    negatives = None if beside is None or "split" in options else read_negatives(beside)
    if negatives is not None and read.min_rating is not None:
        raise ConfigError(
            f"dataset {name} has a line of negatives for every test pair ({negatives.path}): min_rating would take "
            "pairs away; leave it out, or drop those lines of both files"
        )
    user_ids = all_ids([part.user_ids for part in parts.values()])
    item_ids = all_ids([part.item_ids for part in parts.values()])
    notes = tuple(note for part in parts.values() for note in part.notes)
    if negatives is not None:
        # Some items may be in nobody's history, and yet be ranked.
        listed = all_ids([item_ids, negatives.items.ravel()])
        more = len(listed) - len(item_ids)
        if more:
            notes += (
                f"{negatives.path.name}: {more} items that no other file has, ranked as items that nobody chose; with "
                f"them the catalogue has {len(listed)}",
            )
        item_ids = listed
    parts = {key: renumbered(part, user_ids, item_ids) for key, part in parts.items()}
    if "split" in options:
        return _split_anew(
            name, list(parts.values()), user_ids, item_ids, _split_options(options), seed, notes
        )
    _check_validation(name, options, set(READ_OPTIONS), "validation" in parts)
    whole, order, test = parts["train"].matrix, parts["train"].order, parts["test"].matrix
    given = options.get("validation")
    if "validation" in parts and given is None:
        train, validation = whole, parts["validation"].matrix
    else:
        if "validation" in parts:
            whole, order, _, repeated = _together([parts["train"], parts["validation"]])
            if repeated:
                raise DataError(f"{repeated} pairs are in both train and validation")
        train, validation, note = validation_of(whole, test, order, given, seed)
        notes += note
    order = order_of_part(whole, order, train)
    return transductive_dataset(
        name,
        train,
        validation,
        test,
        user_ids,
        item_ids,
        notes=notes,
        order=order,
        candidates=None if negatives is None else negatives.candidates(test, user_ids, item_ids),
    )


def _split_anew(
    name: str,
    parts: list[Interactions],
    user_ids: Any,
    item_ids: Any,
    options: SplitOptions,
    seed: int,
    notes: tuple[str, ...],
) -> Dataset:
    """All parts together, divided here."""
    matrix, order, time, repeated = _together(parts)
    if repeated:
        notes += (f"{repeated} pairs are in more than one of the given parts; each was taken once",)
    return split_dataset(
        name,
        matrix,
        user_ids,
        item_ids,
        options,
        seed,
        notes=notes,
        order=order,
        time=time,
    )


def _together(
    parts: list[Interactions],
) -> tuple[csr_array, NDArray[np.int64] | None, NDArray[np.float64] | None, int]:
    """(matrix, order, time, how many pairs are in several parts). Only timestamps tell an order through all parts."""
    times = [part.time for part in parts if part.time is not None]
    matrix, order, time, repeated = merge_pairs(
        np.concatenate([entry_rows(part.matrix) for part in parts]),
        np.concatenate([part.matrix.indices for part in parts]),
        parts[0].matrix.shape,
        np.concatenate(times) if len(times) == len(parts) else None,
    )
    return matrix, None if time is None else order, time, repeated
