"""The same model dense, masked and sparse, trained on the spot and put side by side in one table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.sparse import csr_array
from torch import Tensor

from recsys.config import Config
from recsys.data import Dataset
from recsys.errors import ConfigError
from recsys.evaluation import evaluate, evaluate_oracle
from recsys.training.probe import StepProbe, time_recommendations, time_steps, typical_user
from recsys.training.run_folder import RunFolder
from recsys.training.session import fit, load_dataset, saved_recommender
from recsys.training.trainer import Trainer

__all__ = ["Row", "run"]


@dataclass(frozen=True)
class Row:
    """What was found of one way to train. MACs and `step_ms` are per step, with its share of one
    exploration; times are the fastest of interleaved samples."""

    name: str
    recall: float
    ndcg: float
    weights: int
    resident: int
    macs: dict[str, float]
    step_ms: float
    recommend_ms: float
    train_seconds: float

    @property
    def total_macs(self) -> float:
        return sum(self.macs.values())


def run(
    config: Config,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    timing_seconds: float = 6.0,
    console: Console | None = None,
) -> list[Row]:
    """Train dense, masked and sparse, print the table, recommend for one user.

    Args:
        config: settings that all three share. The sparse one is trained by `config.sparsity.method`, or by
            DSL where that says dense or masked.
        output: folder for the run of the sparse model, with its saved recommender; None writes nothing.
        overwrite: replace a run that is there.
        quiet: no progress bars.
        timing_seconds: spent on timing training steps; a third of it on timing recommendations.
        console: where to print; standard output by default.

    Raises:
        RecsysError: as `recsys.training.session.train`.
    """
    console = Console(markup=False) if console is None else console
    if config.evaluation.protocol != "full":
        raise ConfigError(
            "quickstart shows full ranking beside the most popular and the best possible one; "
            "expected evaluation.protocol=full; use recsys train for sampled ranking"
        )
    if config.data.everything:
        raise ConfigError("quickstart measures on test: expected data.everything=false")
    if output is not None:
        RunFolder.check_free(output, overwrite)
    dataset = load_dataset(config)
    console.print(
        f"{dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, "
        f"{dataset.n_interactions:,} interactions to train on. "
        f"{config.model.name}, {config.train.epochs} epochs each, density {config.sparsity.density:g}.",
        highlight=False,
    )
    sparse = config.sparsity.method if config.sparsity.method in ("static", "dsl") else "dsl"
    trainers: dict[str, Trainer] = {}
    found = {}
    for name, method in {"dense": "dense", "masked": "masked", "sparse": sparse}.items():
        trainer = Trainer(config.replace(sparsity={"method": method}), dataset)
        folder = None
        if output is not None and name == "sparse":
            folder = RunFolder.create(output, trainer.config, trainer.state_dict(), overwrite)
        found[name] = fit(trainer, folder, quiet=quiet)
        trainers[name] = trainer
    probes = {name: StepProbe(trainer.config, dataset) for name, trainer in trainers.items()}
    macs = {name: probe.macs() for name, probe in probes.items()}
    servers = {name: saved_recommender(trainer) for name, trainer in trainers.items()}
    user = typical_user(dataset)
    steps = time_steps(probes, timing_seconds)
    answers = time_recommendations(servers, user, timing_seconds / 3)
    k = config.train.ks[0]
    rows = [
        Row(
            name=name,
            recall=found[name]["test"][f"recall@{k}"],
            ndcg=found[name]["test"][f"ndcg@{k}"],
            weights=_weights(trainer),
            resident=found[name]["resident_bytes"]["total"],
            macs=macs[name],
            step_ms=1e3 * steps[name].mean,
            recommend_ms=answers[name],
            train_seconds=found[name]["seconds"],
        )
        for name, trainer in trainers.items()
    ]
    console.print(_table(rows, k, config))
    for line in [*_context(dataset, k), *verdict(rows, k)]:
        console.print(line, highlight=False)
    console.print(f"For user {user} the sparse model recommends:", highlight=False, markup=False)
    for place, (item, score) in enumerate(servers["sparse"].recommend(user, k=5), 1):
        console.print(f"  {place}. {item}  ({score:.2f})", highlight=False, markup=False)
    if output is not None:
        console.print(
            f"The run of the sparse model is in {output}.", highlight=False, markup=False, soft_wrap=True
        )
    return rows


def verdict(rows: list[Row], k: int) -> list[str]:
    """In words, where the sparse model wins and where it loses, each against dense and masked."""
    lines = []
    sparse = rows[-1]
    for other in rows[:-1]:
        found: dict[str, list[str]] = {"better": [], "equal within 1 %": [], "worse": []}
        for label, ours, theirs, more_is_better in (
            (f"Recall@{k}", sparse.recall, other.recall, True),
            (f"NDCG@{k}", sparse.ndcg, other.ndcg, True),
            ("bytes in training", sparse.resident, other.resident, False),
            ("MACs per step", sparse.total_macs, other.total_macs, False),
            ("time per step", sparse.step_ms, other.step_ms, False),
            ("time of training with compilation", sparse.train_seconds, other.train_seconds, False),
            ("time per recommendation", sparse.recommend_ms, other.recommend_ms, False),
        ):
            ratio = ours / theirs if theirs else math.nan
            gain = ratio - 1 if more_is_better else 1 - ratio
            judgement = "better" if gain > 0.01 else "equal within 1 %" if gain >= -0.01 else "worse"
            found[judgement].append(f"{label} {ratio:.2f}x")
        parts = [f"{judgement}: {', '.join(listed) or 'nothing'}" for judgement, listed in found.items()]
        lines.append(f"Sparse against {other.name}: {'; '.join(parts)}.")
    return lines


def _context(dataset: Dataset, k: int) -> list[str]:
    """What the quality is to be held against: popularity, and the best possible where it is known."""
    popularity = torch.from_numpy(np.asarray(dataset.train.sum(axis=0), dtype=np.float32))

    def score(users: np.ndarray, inputs: csr_array) -> Tensor:
        return popularity.expand(len(users), -1)

    key = f"recall@{k}"
    parts = [f"most popular items to everybody {evaluate(score, dataset.test, ks=[k])[key]:.4f}"]
    if dataset.oracle is not None:
        best = evaluate_oracle(dataset, dataset.test, ks=[k])[key]
        parts.append(f"best possible (true preferences known) {best:.4f}")
    return [f"For comparison, Recall@{k}: {'; '.join(parts)}."]


def _table(rows: list[Row], k: int, config: Config) -> Table:
    """80 columns wide at most, as a terminal is."""
    table = Table(
        title=f"{config.model.name}, weights of density {config.sparsity.density:g}",
        caption="fwd + bwd + exp: forward, backward and exploration's share.\n"
        "Resident in training; times: the fastest, in turns in one process.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for header in (
        f"Recall\n@{k}",
        f"NDCG\n@{k}",
        "weights\nstored",
        "resident\nMB",
        "M MACs\na step",
        "fwd + bwd\n+ exp",
        "ms a\nstep",
        "ms a\nrecom.",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.recall:.4f}",
            f"{row.ndcg:.4f}",
            f"{row.weights:,}",
            f"{row.resident / 1e6:.1f}",
            f"{row.total_macs / 1e6:.1f}",
            "+".join(f"{count / 1e6:.0f}" for count in row.macs.values()),
            f"{row.step_ms:.2f}",
            f"{row.recommend_ms:.3f}",
        )
    return table


def _weights(trainer: Trainer) -> int:
    """Weights stored: all parameters but biases."""
    return sum(p.numel() for name, p in trainer.model.named_parameters() if "bias" not in name)
