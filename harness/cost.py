"""What a training step costs: dense, masked and dynamic sparse, in one process, in turns.

    python -m harness.cost multvae-ml-1m lightgcn-lastfm --output results/cost

writes ``OUTPUT.json`` and ``OUTPUT.md``: multiply-adds and resident bytes (exact), time of a step as a ratio of the
minima of interleaved samples, and what an exploration adds. The quality of such
runs is measured by ``harness.reproduce``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import sparsecore
from harness.results import save_results
from recsys.config import Config, load_config
from recsys.data import Dataset
from recsys.training.session import load_dataset
from recsys.training.trainer import Trainer
from sparsecore.measure import interleaved

HEAD = "| method@density | time | MACs | bytes | step ms (min / median) | exploration ms | epoch s |"

__all__ = ["Subject", "compare_steps", "main"]


class Subject:
    """One way to train a model, ready to take single steps."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.trainer = Trainer(config, dataset)
        self.trainer.model.train()
        self.batches = self._endless(config.train.batch_size)
        self.interval = config.sparsity.interval
        self.step()  # gradients and optimizer state exist from here on

    def step(self) -> None:
        """A training step on the next batch, without exploration."""
        if self.trainer.explorer is not None:
            self.trainer.explorer.steps = 0
        self.trainer.train_step(next(self.batches))

    def exploring_step(self, phase: Callable[[str], AbstractContextManager] = nullcontext) -> None:
        """A training step that ends with an exploration, at the drop fraction of the middle of the run."""
        explorer = self.trainer.explorer
        assert explorer is not None
        run = self.trainer.config.train.epochs * self.trainer.steps_per_epoch
        explorer.steps = max(1, run // 2 // self.interval) * self.interval - 1
        explorer._arm()
        self.trainer.train_step(next(self.batches), phase)

    def macs(self) -> dict[str, int]:
        """Multiply-adds of one step by phase, and of one exploration."""
        counter = sparsecore.MacCounter()
        if self.trainer.explorer is None:
            self.trainer.train_step(next(self.batches), counter.phase)
        else:
            self.exploring_step(counter.phase)
        return {name: counter.macs.get(name, 0) for name in ("forward", "backward", "exploration")}

    def epoch_seconds(self) -> float:
        """Wall-clock seconds of one whole epoch, sampling and explorations included."""
        begin = time.perf_counter()
        trainer = self.trainer
        for batch in trainer.model.batches(trainer.dataset, trainer.config.train.batch_size, trainer.order):
            trainer.train_step(batch)
        return time.perf_counter() - begin

    def _endless(self, size: int) -> Iterator[Any]:
        for _ in itertools.count():
            for batch in self.trainer.model.batches(self.trainer.dataset, size, self.trainer.order):
                if batch.size == size or self.trainer.steps_per_epoch == 1:
                    yield batch


def compare_steps(
    config: Config, dataset: Dataset, densities: list[float], seconds: float, epoch: bool = False
) -> list[dict[str, Any]]:
    """One row for dense, and one for masked and dsl at each density.

    Times are ratios of minima to dense, with the share of one exploration every ``interval`` steps; so are MACs, which
    are exact, as bytes are.
    """
    cells = [("dense", 1.0), *((method, f) for f in densities for method in ("masked", "dsl"))]
    subjects = {
        f"{method}@{density:g}" if method != "dense" else method: Subject(
            config.replace(sparsity={"method": method, "density": density}), dataset
        )
        for method, density in cells
    }
    steps: dict[str, Callable[[], object]] = {name: subject.step for name, subject in subjects.items()}
    times = interleaved(steps, seconds=seconds)
    explorers: dict[str, Callable[[], object]] = {
        name: s.exploring_step for name, s in subjects.items() if s.trainer.explorer is not None
    }
    exploring = interleaved(explorers, seconds=seconds / 2)
    rows = []
    dense_macs = dense_bytes = 0.0
    base = times["dense"].minimum
    for name, subject in subjects.items():
        macs, interval = subject.macs(), subject.interval
        total = macs["forward"] + macs["backward"] + macs["exploration"] / interval
        trainer = subject.trainer
        size = sparsecore.resident_bytes(trainer.model, trainer.optimizer, trainer.explorer).total
        if name == "dense":
            dense_macs, dense_bytes = total, size
        extra = max(0.0, exploring[name].minimum - times[name].minimum) if name in exploring else 0.0
        rows.append(
            {
                "cell": name,
                "macs": macs,
                "macs vs dense": total / dense_macs,
                "bytes": size,
                "bytes vs dense": size / dense_bytes,
                "step ms": 1e3 * times[name].minimum,
                "step ms median": 1e3 * times[name].median,
                "exploration ms": 1e3 * extra,
                "time vs dense": (times[name].minimum + extra / interval) / base,
                "samples": times[name].samples,
                **({"epoch s": subject.epoch_seconds()} if epoch else {}),
            }
        )
    return rows


def _page(workloads: dict[str, Any]) -> list[str]:
    lines = [
        "# Cost of a training step",
        "",
        "Against dense in the same process (minimum of interleaved samples), lower is better. *time* and *MACs*",
        "include an exploration's share (one every `interval` steps); *bytes* are weights, indices, gradients,",
        "optimizer state, masks or history bits, and graphs. masked: dense tensors times masks, same decisions.",
    ]
    for name, part in workloads.items():
        facts = f"{part['dataset']}, batch {part['batch']}, exploration every {part['interval']} steps."
        lines += ["", f"## {name}", "", facts, "", HEAD, "|---|---|---|---|---|---|---|"]
        lines += [
            f"| {r['cell']} | {r['time vs dense']:.2f} | {r['macs vs dense']:.3f} | {r['bytes vs dense']:.3f} "
            f"| {r['step ms']:.2f} / {r['step ms median']:.2f} | {r['exploration ms']:.1f} "
            f"| {format(r['epoch s'], '.1f') if 'epoch s' in r else '-'} |"
            for r in part["rows"]
        ]
    return [*lines, "", f"Threads: {torch.get_num_threads()}."]


def main(
    presets: Annotated[list[str], typer.Argument(help="Presets of recsys.")],
    output: Annotated[Path, typer.Option(help="Results are written to OUTPUT.json and OUTPUT.md.")],
    densities: Annotated[str, typer.Option(help="Comma-separated.")] = "0.5,0.25,0.1",
    seconds: Annotated[float, typer.Option(help="Timing of each preset.")] = 30.0,
    threads: Annotated[int, typer.Option(help="Torch threads; 0 leaves torch's default.")] = 0,
    epochs: Annotated[bool, typer.Option(help="Also time one whole epoch of each.")] = False,
    data_dir: Annotated[str | None, typer.Option(help="Default: environment SPARSECORE_DATA.")] = None,
) -> None:
    """Measure training steps of presets, dense against masked and dynamic sparse."""
    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    workloads = {}
    for preset in presets:
        config = load_config(preset, options={"data.dir": data_dir})
        dataset = load_dataset(config)
        shares = [float(f) for f in densities.split(",")]
        rows = compare_steps(config, dataset, shares, seconds, epochs)
        workloads[preset] = {
            "dataset": f"{dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, "
            f"{dataset.n_interactions:,} interactions",
            "batch": config.train.batch_size,
            "interval": config.sparsity.interval,
            "rows": rows,
        }
        console.print(f"{preset}: " + ", ".join(f"{r['cell']} {r['time vs dense']:.2f}" for r in rows))
    save_results(
        output, "harness.cost", _page(workloads), {"threads": torch.get_num_threads(), "workloads": workloads}
    )


if __name__ == "__main__":
    typer.run(main)
