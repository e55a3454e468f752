"""Training once more on train and validation together, for as long as validation had found best.

Published figures on published splits are of models that were trained on all of train. We choose the epoch on a part
carved out of it, or on a validation part that was published with them, and this puts that part back. With everything,
the test part goes into train, too: nothing is measured then, and the recommender knows all that there is to know.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from recsys.config import Config
from recsys.data import Dataset
from recsys.errors import DataError, RecsysError
from recsys.training import session
from recsys.training.run_folder import RunFolder

__all__ = ["refit", "refit_config"]


def refit_config(run: str | Path, everything: bool = False) -> Config:
    """The settings of a run with nothing for validation (with `everything`, nor for test), stopping at its best epoch.

    Schedules stay those of the run: the drop fraction at an epoch is what it was.

    Raises:
        RecsysError: not a run, or one that has not ended or had no validation users to choose an epoch by.
    """
    folder = RunFolder.open(run)
    metrics = folder.metrics()
    if metrics is None:
        raise RecsysError(
            f"{run} has not ended, so its best epoch is not known; continue it with: "
            f"recsys train --resume --output {run}"
        )
    config = folder.config()
    if config.data.everything or not (metrics["validation"] or everything):
        raise RecsysError(f"{run} had no validation users: it was trained on all there is already")
    stop = {"stop_epoch": metrics["best_epoch"]}
    if everything:
        return config.replace(data={"everything": True}, train=stop)
    return config.replace(data={"options": {**config.data.options, "validation": 0}}, train=stop)


def refit(
    run: str | Path,
    output: str | Path,
    *,
    everything: bool = False,
    data_dir: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    on_epoch: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Train the model of a run on its train and validation interactions together, and evaluate it on test once.

    Args:
        run: folder of a run that has ended.
        everything: train on test, too, and evaluate nothing.
        data_dir: the folder in which the data is now, if it has moved.
        output, overwrite, quiet, on_epoch: as in `recsys.training.session.train`, whose metrics are returned.

    Raises:
        RecsysError: as `refit_config`; or ``data.options.validation = 0`` gives other data than train and validation
            together (held-out users; a split by time, unless it was prepared); or the data has changed.
    """
    if Path(run).resolve() == Path(output).resolve():
        raise RecsysError(f"{run} is the run itself: write its refit to another folder (--output)")
    config = session.placed(refit_config(run, everything), data_dir)
    RunFolder.check_free(output, overwrite)
    folder = RunFolder.open(run)
    before = session.load_dataset(session.placed(folder.config(), data_dir))
    before.expect((folder.metrics() or {}).get("split"), str(run))
    try:
        dataset = session.load_dataset(config)
    except RecsysError as error:
        if everything:
            raise
        raise DataError(f"{_refusal(before)} ({error})") from error
    if not everything and not _put_together(before, dataset):
        raise DataError(_refusal(before))
    return session.train(config, output, overwrite=overwrite, dataset=dataset, quiet=quiet, on_epoch=on_epoch)


def _put_together(before: Dataset, after: Dataset) -> bool:
    """Whether `after` trains on train and validation of `before`, and tests the same."""
    if before.train.shape != after.train.shape or np.any(before.validation.users < 0):
        return False
    seen = csr_array(before.train + before.validation.targets)
    return _equal(seen, after.train) and _equal(before.test.targets, after.test.targets)


def _equal(one: csr_array, other: csr_array) -> bool:
    return np.array_equal(one.indptr, other.indptr) and np.array_equal(one.indices, other.indices)


def _refusal(dataset: Dataset) -> str:
    return (
        f"--refit needs validation interactions that data.options.validation = 0 puts back into train; those of "
        f"{dataset.name} (evaluated on {dataset.summary()['evaluated_on']}) cannot be put back. Take a split of each "
        "user's interactions: published or prepared by `recsys data prepare` (a folder with train and test files), "
        "by ratio, or leave-one-out"
    )
