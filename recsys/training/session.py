"""A training run from settings to metrics: with a folder or without, from the start or resumed."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recsys.config import Config
from recsys.data import Dataset, EvalSet, load
from recsys.data.everything import everything
from recsys.errors import ConfigError, DataError, RecsysError
from recsys.evaluation import beyond_accuracy
from recsys.recommender import SavedRecommender
from recsys.training.densities import dense_size, nnz_per_tensor
from recsys.training.moved import placed
from recsys.training.run_folder import RunFolder
from recsys.training.tensorboard import TensorBoardLog, require_tensorboard
from recsys.training.trainer import Trainer

__all__ = ["evaluate_run", "fit", "load_dataset", "placed", "resume", "saved_recommender", "train"]

Listener = Callable[[dict[str, Any]], object]
_LARGE = 64 << 20  # bytes: a smaller file is written at every epoch, however slow the machine is just then


def load_dataset(config: Config) -> Dataset:
    """The data that a run's settings name."""
    data = config.data
    reserved = {"name": "name", "data_dir": "dir", "seed": "seed"}.keys() & data.options.keys()
    if reserved:
        key = min(reserved)
        raise ConfigError(
            f"data.options.{key} is no option of a data set; did you mean data.{key.removeprefix('data_')}?"
        )
    dataset = load(data.name, data_dir=data.dir, seed=data.seed, **data.options)
    return everything(dataset) if data.everything else dataset


def train(
    config: Config,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    dataset: Dataset | None = None,
    quiet: bool = False,
    on_epoch: Listener | None = None,
) -> dict[str, Any]:
    """Train, evaluate the best epoch on test once, and return the metrics.

    Args:
        config: all settings.
        output: folder of the run, see `RunFolder`; None keeps nothing. Made only once settings and data are
            known to be good.
        overwrite: replace a run that is there.
        dataset: what `load_dataset(config)` returns, if it is loaded already.
        quiet: no progress bar; there is none either where standard error is not a terminal.
        on_epoch: is called with the log record of every epoch.

    Returns:
        What metrics.json holds, all of the best epoch:

        validation, test: means over the users with targets; empty where there are none (`data.options.validation`,
            `data.everything`), as is then beyond_accuracy, which is of test. users: how many these are ("evaluated"),
            how many of them have nothing in train ("without_train"), how many are ranked for among fewer candidates
            than was asked for ("fewer_candidates") and how many users there are ("all"); a mean over all, a user
            without targets counting 0, as UltraGCN's authors report it, is the value times evaluated / all.
        beyond_accuracy: see `recsys.evaluation.beyond_accuracy`.
        protocol: what targets were ranked against. split: hash of the data as it was divided.
        macs_per_step: multiply-adds of a training step, see `Trainer.macs`; exploration is 0 if there was none.
        nnz: how many weights of each parameter are kept; dense_size: how many there would be in a dense model.
        method, density, best_epoch, epochs, steps, seconds, parameters_stored, resident_bytes, config_hash, versions,
            dataset.

    Raises:
        OutputExistsError: the folder is there and not to be overwritten.
        RecsysError: bad settings or data; training diverged.
        KeyboardInterrupt: on Ctrl-C; the folder then holds the last epoch that was written, for `resume`: the last
            complete one, unless to write one takes long.
    """
    if output is not None:
        expect_place(config, output, overwrite)
    dataset = load_dataset(config) if dataset is None else dataset
    if not len(dataset.test.rows_with_targets) and not config.data.everything:
        raise DataError(
            f"{dataset.name}: no user has a test item, so there would be nothing to report; give the split a test part "
            "(data.options.test), or data with more interactions of a user; to train on all there is and measure "
            "nothing: data.everything=true, or recsys train --refit RUN --everything"
        )
    trainer = Trainer(config, dataset)
    if output is None:
        return fit(trainer, None, quiet=quiet, on_epoch=on_epoch)
    folder = RunFolder.create(output, config, trainer.state_dict(), overwrite)
    with folder.busy():
        return fit(trainer, folder, quiet=quiet, on_epoch=on_epoch)


def expect_place(config: Config, output: str | Path, overwrite: bool = False) -> None:
    """Raise what `train` does where a run cannot be kept, before data is loaded."""
    RunFolder.check_free(output, overwrite)
    if config.train.tensorboard:
        require_tensorboard()


def resume(
    path: str | Path,
    *,
    data_dir: str | None = None,
    device: str | None = None,
    dataset: Dataset | None = None,
    quiet: bool = False,
    on_epoch: Listener | None = None,
) -> dict[str, Any]:
    """Continue an interrupted run exactly where its last written epoch ended; arguments as in `train`.

    `data_dir` says in which folder the data is now, if it has moved, `device` where to go on, if it is another one.

    A run that has ended is not touched; its metrics are returned.

    Raises:
        RecsysError: not a run, no checkpoint, or a damaged one; the data has changed; another process writes to it.
    """
    folder = RunFolder.open(path)
    metrics = folder.metrics()
    if metrics is not None:
        return metrics
    config = placed(folder.config(), data_dir, device)
    trainer = Trainer(config, load_dataset(config) if dataset is None else dataset, fresh=False)
    with folder.busy():
        trainer.load_state_dict(folder.load_checkpoint())
        folder.truncate_log(trainer.epoch)
        return fit(trainer, folder, quiet=quiet, on_epoch=on_epoch)


def fit(
    trainer: Trainer,
    folder: RunFolder | None = None,
    *,
    quiet: bool = False,
    on_epoch: Listener | None = None,
) -> dict[str, Any]:
    """Run a trainer to its end, see `train`. Its model then has the weights of the best epoch."""
    with ExitStack() as stack:
        curves = None
        if folder is not None and trainer.config.train.tensorboard:
            curves = stack.enter_context(TensorBoardLog(folder.tensorboard, trainer.epoch))
        _train_epochs(trainer, folder, curves, quiet, on_epoch)
    if trainer.best_weights is None and folder is not None:
        trainer.best_weights = folder.load_best()
    trainer.load_best()
    parameters = list(trainer.model.parameters())  # a fitted model has buffers only
    # The one time that test users are scored.
    test, ks = trainer.dataset.test, trainer.config.train.ks
    ranking = trainer.rank(test) if len(test.rows_with_targets) else None
    metrics = {
        "dataset": trainer.dataset.summary(),
        "split": trainer.dataset.fingerprint,
        "protocol": {
            name: trainer.evaluator.describe(part)
            for name, part in _parts(trainer).items()
            if len(part.rows_with_targets)
        },
        "method": trainer.config.sparsity.method,
        "density": 1.0 if trainer.config.sparsity.method == "dense" else trainer.config.sparsity.density,
        "validation": trainer.best_metrics,
        "test": {} if ranking is None else ranking.means(ks),
        "beyond_accuracy": {} if ranking is None else beyond_accuracy(ranking, trainer.dataset.train, ks),
        "users": {
            name: {
                "evaluated": len(part.rows_with_targets),
                "all": len(part),
                "without_train": trainer.dataset.without_train(part),
                "fewer_candidates": trainer.evaluator.with_fewer(part),
            }
            for name, part in _parts(trainer).items()
        },
        "best_epoch": trainer.best_epoch,
        "epochs": trainer.epoch,
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 3),
        "parameters_stored": sum(stored.numel() for stored in parameters or trainer.model.buffers()),
        "nnz": nnz_per_tensor(trainer.model, trainer.explorer),
        "dense_size": dense_size(trainer.model),
        "resident_bytes": trainer.resident,
        "macs_per_step": {"forward": 0.0, "backward": 0.0, "exploration": 0.0, **trainer.macs},
        "config_hash": trainer.config.hash,
        "versions": _versions(),
    }
    if folder is not None:
        saved_recommender(trainer).save(folder.recommender, overwrite=True)
        if ranking is not None:
            ids = ranking.rows if test.user_ids is None else test.user_ids[ranking.rows]
            folder.save_per_user(ids, ranking.per_user(ks))
        folder.save_metrics(metrics)
    return metrics


def _parts(trainer: Trainer) -> dict[str, EvalSet]:
    return {"validation": trainer.dataset.validation, "test": trainer.dataset.test}


def _train_epochs(
    trainer: Trainer,
    folder: RunFolder | None,
    curves: TensorBoardLog | None,
    quiet: bool,
    on_epoch: Listener | None,
) -> None:
    pace = None if folder is None else _Pace(folder.path / "checkpoint.pt")
    while not trainer.finished:
        with _progress(trainer, quiet) as progress:
            title = f"{trainer.config.sparsity.method} epoch {trainer.epoch + 1}/{trainer.last_epoch}"
            task = progress.add_task(title, total=trainer.steps_per_epoch)
            record = trainer.run_epoch(lambda: progress.advance(task))  # noqa: B023
        if folder is not None and pace is not None:
            # Best weights first, checkpoint last: a run cut off before it makes the epochs since again,
            # identically.
            with pace.writing(trainer.finished) as due:
                if due and trainer.best_weights is not None:
                    folder.save_best(trainer.best_weights)
                    trainer.best_weights = None
                folder.append_log(record)
                if due:
                    folder.save_checkpoint(trainer.state_dict())
        if curves is not None:
            curves.write(record)
        if on_epoch is not None:
            on_epoch(record)


class _Pace:
    """When to write a checkpoint: at every epoch, or a large one such that it takes a tenth of the time at most."""

    def __init__(self, file: Path) -> None:
        self._file, self._took, self._ended = file, 0.0, -math.inf

    @contextmanager
    def writing(self, always: bool) -> Iterator[bool]:
        """Whether to write now; what is in the block is timed if so."""
        begun = time.monotonic()
        due = always or self._file.stat().st_size < _LARGE or begun - self._ended >= 9 * self._took
        yield due
        if due:
            self._ended = time.monotonic()
            self._took = self._ended - begun


def saved_recommender(trainer: Trainer) -> SavedRecommender:
    """The model of a trainer, with the ids and the history that it needs to serve."""
    config, dataset = trainer.config, trainer.dataset
    stored = trainer.density if config.sparsity.method in ("static", "dsl") else 1.0
    return SavedRecommender(
        trainer.model,
        settings=config.model.model_dump(),
        density=stored,
        history=dataset.train,
        user_ids=dataset.user_ids,
        item_ids=dataset.item_ids,
        dataset=dataset.name,
    )


def _progress(trainer: Trainer, quiet: bool) -> Progress:
    console = Console(markup=False, stderr=True)
    best = (
        "" if trainer.best_epoch is None else f"best {trainer.config.train.metric} {trainer.best_value:.4f}"
    )
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn(best),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
    )


def _versions() -> dict[str, str]:
    # torch itself says which build it is; the version of the package may not.
    versions = {
        "python": platform.python_version(),
        "platform": sys.platform,
        "torch": str(torch.__version__),
    }
    for name in ("sparsecore", "numpy", "scipy", "numba"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a distribution"
    return versions


def evaluate_run(
    path: str | Path, data_dir: str | None = None, device: str | None = None
) -> dict[str, dict[str, float]]:
    """Validation and test metrics of the best epoch of a run, computed anew from its weights.

    Of a run that has not ended, those of validation alone: test is not looked at while there is something to choose.

    Args:
        path: the folder of the run.
        data_dir: the folder in which the data is now, if it has moved.
        device: where to score; None is where it was trained.

    Raises:
        RecsysError: not a run, or nothing of it was saved yet; the data has changed; there is nobody to evaluate.
    """
    folder = RunFolder.open(path)
    config = placed(folder.config(), data_dir, device)
    if config.data.everything:
        raise RecsysError(
            f"{path} was trained on everything (data.everything): there is nobody left to evaluate"
        )
    ended = folder.metrics()
    weights = folder.load_best()
    dataset = load_dataset(config)
    dataset.expect((ended or folder.load_checkpoint()).get("split"), str(path))
    trainer = Trainer(config, dataset, fresh=False)
    try:
        trainer.model.load_state_dict(weights)
    except RuntimeError as error:
        raise RecsysError(
            f"the weights in {path} do not fit the data {config.data.name!r}: has it changed since? ({error})"
        ) from error
    if not trainer.selects and ended is None:
        raise RecsysError(f"{path} has not ended and has no validation users: nothing to evaluate it on yet")
    return {
        "validation": trainer.evaluate(trainer.dataset.validation) if trainer.selects else {},
        "test": {} if ended is None else trainer.evaluate(trainer.dataset.test),
    }
