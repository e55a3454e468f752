"""Any file or folder of interactions to the folder of matrices that `load` reads at once (`recsys.data.published`)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from recsys.data.dataset import Dataset
from recsys.data.folders import LOAD_OPTIONS, load_folder, split_file
from recsys.data.loaders import check_options
from recsys.data.published import ABOUT_FILE
from recsys.errors import DataError, OutputExistsError, RecsysError
from recsys.files import check_place, new_folder

__all__ = ["check_free", "prepare", "write_dataset"]


def prepare(
    source: str | Path,
    output: str | Path,
    seed: int = 0,
    overwrite: bool = False,
    origin: str | None = None,
    **options: Any,
) -> Dataset:
    """Read a file or folder of a supported kind, split it unless it is split already, and write the parts.

    Args:
        source: a file (`recsys.data.formats`) or a folder (`recsys.data.folders`).
        output: the new folder; it appears whole or not at all.
        seed: of the split.
        overwrite: replace a prepared dataset that is there.
        origin: what to record as the source, if not its name.
        options: as of `recsys.data.load`.

    Returns:
        The dataset, as `load` would give it.

    Raises:
        OutputExistsError: the folder is there and not to be overwritten, or holds something else.
        DataError, ConfigError: as `recsys.data.load`.
    """
    source, output = Path(source), Path(output)
    check_free(output, overwrite)
    options = {key: value for key, value in options.items() if value is not None}
    check_options(str(source), options, LOAD_OPTIONS)
    if os.path.isdir(source):
        dataset = load_folder(str(source), source, seed, options)
    elif os.path.exists(source):
        dataset = split_file(str(source), source, seed, options)
    else:
        raise DataError(f"{source}: no such file or folder")
    about = {"source": origin or source.name, "options": options, "seed": seed}
    write_dataset(dataset, output, about, overwrite)
    return dataset


def check_free(output: Path, overwrite: bool) -> None:
    """Raise OutputExistsError unless `output` is not there yet, or is a prepared dataset that may be replaced; and
    RecsysError if nothing can be written there.
    """
    check_place(output)
    if not output.exists():
        return
    if not overwrite:
        raise OutputExistsError(
            f"{output} exists already; choose another folder or say that it is to be overwritten (--overwrite)"
        )
    if not (output / ABOUT_FILE).is_file():
        raise OutputExistsError(
            f"{output} is no prepared dataset (no {ABOUT_FILE} in it); it is not overwritten"
        )


def write_dataset(
    dataset: Dataset, output: Path, about: dict[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Write a dataset in the layout of `recsys.data.published`, all at once; `about` is recorded with its notes.

    Users are either all trained on or all held out; a validation or test set of both kinds cannot be written.
    """
    check_free(output, overwrite)
    sets = {"validation": dataset.validation, "test": dataset.test}
    heldout = any((part.users < 0).any() for part in sets.values())
    arrays: dict[str, Any] = {"item_ids": dataset.item_ids}
    matrices = {"train": dataset.train}
    if heldout:
        if any((part.users >= 0).any() or part.user_ids is None for part in sets.values()):
            raise RecsysError(
                f"{dataset.name}: expected only held-out users with raw ids in validation and test"
            )
        ids: list[NDArray[Any]] = [dataset.user_ids]
        for name, part in sets.items():
            matrices |= {f"{name}_tr": part.inputs, f"{name}_te": part.targets}
            ids.append(np.empty(0, dataset.user_ids.dtype) if part.user_ids is None else part.user_ids)
        arrays["user_of_uid"] = np.concatenate(ids)
    else:
        # Written even if empty: without it, `load` would carve one out of train. Where users were to be held out and
        # there were too few for one, a part has no rows at all.
        none = sparse.csr_array(dataset.train.shape, dtype=dataset.train.dtype)
        valid, test = (part.targets if len(part.users) else none for part in sets.values())
        matrices |= {"valid": valid, "test": test}
        arrays["user_ids"] = dataset.user_ids
    content = {**(about or {}), "notes": list(dataset.notes)}
    with new_folder(output) as folder:
        for name, matrix in matrices.items():
            sparse.save_npz(folder / f"{name}.npz", matrix)
        np.savez_compressed(folder / "ids.npz", **arrays)
        if dataset.order is not None:
            np.savez_compressed(folder / "order.npz", order=dataset.order)
        if dataset.later is not None:
            np.savez_compressed(folder / "later.npz", users=dataset.later[0], items=dataset.later[1])
        if dataset.test.candidates is not None:
            np.savez_compressed(folder / "test_negatives.npz", negatives=dataset.test.candidates)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / ABOUT_FILE).write_text(text, encoding="utf-8")
