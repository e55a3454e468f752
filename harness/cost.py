"""What a training step and a recommendation cost: dense, masked and dynamic sparse, in one process, in turns.

    python -m harness.cost multvae-ml-1m lightgcn-lastfm --output results/cost

writes ``OUTPUT.json`` and ``OUTPUT.md``: multiply-adds and resident bytes (exact), times as ratios of the minima of
interleaved samples, and what an exploration adds. Nothing is trained to its end: the recommenders that are timed are
those of a few steps. The quality of such runs is measured by ``recsys reproduce``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from harness.command import new_results, run_main, shares
from recsys.config import Config, load_config
from recsys.data import Dataset
from recsys.recommender import SavedRecommender
from recsys.results import save_results
from recsys.training.probe import StepProbe, time_recommendations, time_steps, typical_user
from recsys.training.session import load_dataset, saved_recommender
from recsys.training.trainer import Trainer

HEAD = (
    "| method@density | step | MACs | bytes | recommendation | step ms (min / median) | exploration ms "
    "| recommendation ms | epoch s |"
)

__all__ = ["compare_steps", "main"]


def compare_steps(
    config: Config, dataset: Dataset, densities: list[float], seconds: float, epoch: bool = False
) -> list[dict[str, Any]]:
    """One row for dense, and one for masked and dsl at each density.

    Times are ratios of minima to dense, of a step with the share of one exploration every ``interval`` steps; so are
    MACs, which are exact, as bytes are. A recommendation is one user's ten best items, from a recommender that was
    saved and loaded; a third of the seconds goes to those.
    """
    cells = [("dense", 1.0), *((method, f) for f in densities for method in ("masked", "dsl"))]
    probes = {
        f"{method}@{density:g}" if method != "dense" else method: StepProbe(
            config.replace(sparsity={"method": method, "density": density}), dataset
        )
        for method, density in cells
    }
    times = time_steps(probes, seconds)
    macs = {name: probe.macs() for name, probe in probes.items()}
    size = {name: probe.resident_bytes().total for name, probe in probes.items()}
    servers = {name: _served(probe.trainer) for name, probe in probes.items()}
    answers = time_recommendations(servers, typical_user(dataset), seconds / 3)
    return [
        {
            "cell": name,
            "macs": macs[name],
            "macs vs dense": sum(macs[name].values()) / sum(macs["dense"].values()),
            "bytes": size[name],
            "bytes vs dense": size[name] / size["dense"],
            "step ms": 1e3 * times[name].step.minimum,
            "step ms median": 1e3 * times[name].step.median,
            "exploration ms": 1e3 * times[name].exploration,
            "time vs dense": times[name].mean / times["dense"].mean,
            "recommendation ms": answers[name],
            "recommendation vs dense": answers[name] / answers["dense"],
            "samples": times[name].step.samples,
            **({"epoch s": probe.epoch_seconds()} if epoch else {}),
        }
        for name, probe in probes.items()
    ]


def _served(trainer: Trainer) -> SavedRecommender:
    """What a machine that serves the model loads."""
    with tempfile.TemporaryDirectory() as folder:
        saved_recommender(trainer).save(folder, overwrite=True)
        return SavedRecommender.load(folder)


def _page(workloads: dict[str, Any]) -> list[str]:
    lines = [
        "# Cost of a training step and of a recommendation",
        "",
        "Against dense in the same process (minimum of interleaved samples), lower is better. *step* and *MACs*",
        "include an exploration's share (one every `interval` steps); *bytes* are weights, indices, gradients,",
        "optimizer state, masks or history bits, and graphs. masked: dense tensors times masks, same decisions.",
        "*recommendation*: from a user's id to the ids of ten items, by a saved recommender.",
    ]
    for name, part in workloads.items():
        facts = f"{part['dataset']}, batch {part['batch']}, exploration every {part['interval']} steps."
        lines += ["", f"## {name}", "", facts, "", HEAD, "|" + "---|" * 9]
        lines += [
            f"| {r['cell']} | {r['time vs dense']:.2f} | {r['macs vs dense']:.3f} | {r['bytes vs dense']:.3f} "
            f"| {r['recommendation vs dense']:.2f} | {r['step ms']:.2f} / {r['step ms median']:.2f} "
            f"| {r['exploration ms']:.1f} | {r['recommendation ms']:.3f} "
            f"| {format(r['epoch s'], '.1f') if 'epoch s' in r else '-'} |"
            for r in part["rows"]
        ]
    return [*lines, "", f"Threads: {torch.get_num_threads()}."]


def main(
    presets: Annotated[list[str], typer.Argument(help="Presets of recsys.")],
    output: Annotated[
        Path, typer.Option(callback=new_results, help="Results are written to OUTPUT.json and OUTPUT.md.")
    ],
    densities: Annotated[str, typer.Option(callback=shares, help="Comma-separated.")] = "0.5,0.25,0.1",
    seconds: Annotated[float, typer.Option(help="Timing of each preset.")] = 30.0,
    threads: Annotated[int, typer.Option(min=0, help="Torch threads; 0 leaves torch's default.")] = 0,
    epochs: Annotated[bool, typer.Option(help="Also time one whole epoch of each.")] = False,
    data_dir: Annotated[str | None, typer.Option(help="Default: environment SPARSECORE_DATA.")] = None,
) -> None:
    """Measure training steps and recommendations of presets, dense against masked and dynamic sparse."""
    if threads:
        torch.set_num_threads(threads)
    console = Console(markup=False, stderr=True)
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
        # After each preset: what was measured stays if a later one is interrupted.
        save_results(
            output,
            "python -m harness.cost",
            _page(workloads),
            {"threads": torch.get_num_threads(), "workloads": workloads},
        )
        console.print(f"{preset}: " + ", ".join(f"{r['cell']} {r['time vs dense']:.2f}" for r in rows))


if __name__ == "__main__":
    run_main(main)
