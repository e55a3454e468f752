"""RecBole beside us: the same split, RecBole's own model, settings and evaluation, in RecBole's own environment.

    python -m harness.recbole CDAE --python ENV/bin/python --dataset ml-1m --data-dir DIR \
        --set learning_rate=0.001 --set epochs=100 --output results/recbole-cdae-ml-1m

writes our train, validation and test part as RecBole's atomic files, lets ``ENV``'s RecBole train on them (its test
users are shown train and validation items, as ours are), and writes its metrics and its seconds per epoch to
``OUTPUT.json`` and ``OUTPUT.md``. RecBole never sees this package, nor this package it. RecBole 1.2.1 runs beside
today's torch in an environment (Python 3.11) made by

    pip install torch==2.13.0 recbole "setuptools<80" "numpy<1.27" "scipy==1.10.1" "pandas<2.3"
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.sparse import csr_array

from harness import command
from recsys.data import Dataset, load
from recsys.errors import ConfigError, RecsysError
from recsys.results import save_results

__all__ = ["export", "main", "run", "with_recbole"]

PARTS = ("train", "valid", "test")
_DEFAULTS: dict[str, Any] = {
    "metrics": ["Recall", "NDCG", "Hit", "MRR"],
    "topk": [10, 20],
    "valid_metric": "NDCG@10",
}


def export(dataset: Dataset, folder: Path) -> Path:
    """Write a dataset as RecBole's benchmark files, ``exported.{train,valid,test}.inter``; returns their folder.

    Users and items are written as their rows and columns: raw ids may hold anything.

    Raises:
        ConfigError: for held-out users, which RecBole's general recommenders cannot be asked about.
    """
    if (dataset.validation.users < 0).any() or (dataset.test.users < 0).any():
        raise ConfigError(
            f"{dataset.name}: RecBole needs every user in train, but this split holds users out"
        )
    # Not the data set's name: RecBole keeps some names for files of its own.
    name = "exported"
    place = folder / name
    place.mkdir(parents=True)
    rows = [np.arange(dataset.n_users), dataset.validation.users, dataset.test.users]
    parts = [dataset.train, dataset.validation.targets, dataset.test.targets]
    for part, users, matrix in zip(PARTS, rows, parts, strict=True):
        pairs = _pairs(matrix, users)
        with (place / f"{name}.{part}.inter").open("w", encoding="utf-8") as file:
            file.write("user_id:token\titem_id:token\n")
            np.savetxt(file, pairs, fmt="%d", delimiter="\t")
    return place


def _pairs(matrix: csr_array, users: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.column_stack([np.repeat(users, np.diff(matrix.indptr)), matrix.indices])


def with_recbole(python: str) -> str:
    """A Python as it can be called from any folder: a path, made absolute, or a name on PATH.

    Raises:
        RecsysError: it cannot be run, or has no RecBole.
    """
    # Not resolved: the python of an environment is a link to one outside of it.
    found = os.path.abspath(python) if os.sep in python else python
    program = "import importlib.util, sys; sys.exit(importlib.util.find_spec('recbole') is None)"
    try:
        done = subprocess.run([found, "-P", "-c", program], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RecsysError(f"--python {python}: cannot be run: {error.strerror}") from error
    if done.returncode:
        raise RecsysError(
            f"--python {python}: has no RecBole; expected the Python of an environment that it is installed in, "
            f"see python -m pydoc harness.recbole {done.stderr.strip()[-500:]}".rstrip()
        )
    return found


def run(python: str, model: str, place: Path, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """Train RecBole's model on exported files with another Python; returns what harness/recbole_worker.py reports.

    Args:
        python: from `with_recbole`.

    Raises:
        RecsysError: RecBole fails; with the end of what it printed.
    """
    worker = Path(__file__).with_name("recbole_worker.py")
    task = {
        "model": model,
        "dataset": place.name,
        "threads": threads,
        "settings": {
            **_DEFAULTS,
            **settings,
            "data_path": str(place.parent),
            "benchmark_filename": list(PARTS),
            "load_col": {"inter": ["user_id", "item_id"]},
        },
    }
    report = place.parent / "report.json"
    # In the temporary folder, because RecBole writes logs where it stands; without our paths.
    done = subprocess.run(
        [python, "-P", str(worker), json.dumps(task), str(report)],
        cwd=place.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RecsysError(f"RecBole ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(report.read_text())


def _page(model: str, dataset: Dataset, found: dict[str, Any]) -> list[str]:
    training, validation = found["train_seconds"], found["evaluate_seconds"]
    lines = [
        f"# RecBole {found['version']}: {model} on {dataset.name}",
        "",
        f"{len(training)} epochs, the best by validation {found['settings']['valid_metric']}: {found['best_epoch']}. "
        f"Seconds an epoch: training {statistics.median(training):.2f} (least {min(training):.2f}), "
        f"evaluation {statistics.median(validation):.2f}; {found['threads']} threads.",
        "",
        "| | " + " | ".join(found["test"]) + " |",
        "|---|" + "---|" * len(found["test"]),
    ]
    for part in ("validation", "test"):
        lines.append(f"| {part} | " + " | ".join(f"{found[part][name]:.4f}" for name in found["test"]) + " |")
    changed = ", ".join(f"{key} = {value!r}" for key, value in found["settings"].items())
    return [*lines, "", f"Settings other than RecBole's defaults: {changed}."]


def main(
    model: Annotated[str, typer.Argument(help="RecBole's name of the model, such as CDAE.")],
    python: Annotated[str, typer.Option(help="Python of the environment that RecBole is installed in.")],
    dataset: Annotated[str, typer.Option(help="Dataset, as for recsys train.")],
    output: Annotated[
        Path,
        typer.Option(callback=command.new_results, help="Results are written to OUTPUT.json and OUTPUT.md."),
    ],
    data_dir: Annotated[str | None, typer.Option(help="Default: environment SPARSECORE_DATA.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of RecBole.")] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    set_: Annotated[list[str] | None, typer.Option("--set", help="RecBole setting KEY=VALUE.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Data option KEY=VALUE, such as split.")] = None,
) -> None:
    """Train a model of RecBole on our split of a dataset and write down its metrics and its speed."""
    settings = {"seed": seed, **_parsed(set_)}
    python = with_recbole(python)
    loaded = load(dataset, data_dir=data_dir, seed=seed, **_parsed(option))
    with tempfile.TemporaryDirectory() as folder:
        found = run(python, model, export(loaded, Path(folder)), settings, threads)
    found["settings"] = {**_DEFAULTS, **settings}
    save_results(
        output,
        "python -m harness.recbole",
        _page(model, loaded, found),
        {"dataset": loaded.summary(), **found},
    )
    typer.echo(f"{model}: " + "  ".join(f"{name} {value:.4f}" for name, value in found["test"].items()))


def _parsed(pairs: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE with VALUE in TOML; a word without quotes is text."""
    values: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"expected KEY=VALUE, got {pair!r}")
        try:
            values[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = text
    return values


if __name__ == "__main__":
    command.run_main(main)
