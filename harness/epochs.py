"""Seconds of an epoch of our dense models and of RecBole's, of the same sizes, on the same split and machine.

    python -m harness.epochs --python ENV/bin/python --dataset ml-100k --output results/epochs-ml-100k

Both train on the same train part with batches of the same size, as many threads and the same optimizer (Adam);
evaluation is not counted, the making of batches is. RecBole (see harness/recbole.py) and ours take turns, ``--repeats``
times; of each the fastest epoch counts, the first of a run, which compiles and warms up, left out. Ratio = RecBole's
seconds / ours (higher is better).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from harness import command
from harness.recbole import export, run, with_recbole
from recsys.config import load_config
from recsys.data import Dataset, load
from recsys.errors import ConfigError
from recsys.results import save_results
from recsys.training.probe import StepProbe

__all__ = ["PAIRS", "Pair", "main", "measure"]


@dataclass(frozen=True)
class Pair:
    """One model in both libraries.

    Attributes:
        theirs: RecBole's name; its defaults hold unless `settings` says otherwise.
        ours: settings of ours that make the same sizes.
        settings: of RecBole.
    """

    theirs: str
    ours: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


# RecBole's batch of 2048 counts users (autoencoders), positives (pairwise) or samples: a positive and its negative.
PAIRS = {
    "multvae": Pair("MultiVAE", {"model.latent": 64, "train.batch_size": 2048}),
    "cdae": Pair("CDAE", {"model.regularization": 0.01, "train.batch_size": 2048}),
    "neumf": Pair(
        "NeuMF",
        {
            "model.factors": 64,
            "model.layers": [128, 128, 64],
            "model.dropout": 0.1,
            "model.negatives": 1,
            "train.batch_size": 1024,
        },
    ),
    "bprmf": Pair("BPR", {"train.batch_size": 2048}),
    "lightgcn": Pair("LightGCN", {"model.hops": 2, "train.batch_size": 2048}),
    "convncf": Pair(
        "ConvNCF",
        {
            "model.channels": [32] * 4,
            "model.kernels": [4, 4, 2, 2],
            "model.dropout": 0.2,
            "train.batch_size": 2048,
        },
    ),
}


def measure(
    name: str, dataset: Dataset, python: str, place: Path, repeats: int, threads: int
) -> dict[str, float]:
    """{"ours", "theirs"}: seconds of the fastest epoch of each."""
    pair = PAIRS[name]
    config = load_config(options={"model.name": name, "sparsity.method": "dense", **pair.ours})
    ours, theirs = [], []
    for _ in range(repeats):
        # Evaluated once, at the end: RecBole needs that for its best epoch.
        settings = {**pair.settings, "epochs": 3, "eval_step": 3, "eval_args": _SAMPLED}
        theirs += run(python, pair.theirs, place, settings, threads)["train_seconds"][1:]
        probe = StepProbe(config, dataset)
        ours += [probe.epoch_seconds() for _ in range(3)][1:]
    return {"ours": min(ours), "theirs": min(theirs)}


_SAMPLED = {"mode": {"valid": "uni1", "test": "uni1"}}


def main(
    python: Annotated[str, typer.Option(help="Python of the environment that RecBole is installed in.")],
    dataset: Annotated[str, typer.Option(help="Dataset, as for recsys train.")],
    output: Annotated[
        Path | None, typer.Option(callback=command.new_results, help="Write OUTPUT.json and OUTPUT.md.")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Default: environment SPARSECORE_DATA.")] = None,
    models: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(PAIRS),
    repeats: Annotated[int, typer.Option(min=1)] = 2,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Time epochs of our dense models and of RecBole's in turns."""
    names = models.split(",")
    for name in names:
        if name not in PAIRS:
            raise ConfigError(f"unknown model {name!r}; known: {', '.join(PAIRS)}")
    python = with_recbole(python)
    torch.set_num_threads(threads)
    loaded = load(dataset, data_dir=data_dir)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = export(loaded, Path(folder))
        for name in names:
            rows[name] = measure(name, loaded, python, place, repeats, threads)
            Console(markup=False, stderr=True).print(name, rows[name])
            if output is not None:  # after every model: a failure of a later one costs nothing
                document = {"dataset": loaded.summary(), "seconds": rows}
                save_results(output, "python -m harness.epochs", _page(loaded, rows, threads), document)
    typer.echo("\n".join(_page(loaded, rows, threads)))


def _page(dataset: Dataset, rows: dict[str, dict[str, float]], threads: int) -> list[str]:
    return [
        f"# Seconds of an epoch, dense, {dataset.name}",
        "",
        f"{dataset.n_users:,} users, {dataset.n_items:,} items, {dataset.n_interactions:,} interactions; "
        f"{threads} threads. Ratio: RecBole's seconds / ours.",
        "",
        "| model | RecBole | ours | ratio |",
        "|---|---|---|---|",
        *(
            f"| {PAIRS[name].theirs} | {row['theirs']:.3f} | {row['ours']:.3f} | {row['theirs'] / row['ours']:.2f} |"
            for name, row in rows.items()
        ),
    ]


if __name__ == "__main__":
    command.run_main(main)
