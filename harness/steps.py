"""Whole training steps: dense in its best form, masked and dynamic sparse, in one process, in turns.

    python -m harness.steps --threads 1,2 --output results/steps

writes ``OUTPUT.json`` and ``OUTPUT.md``. Ratios are dense time / time (higher is better), of the minima of interleaved
samples: of the step, and of the step with its share of one exploration every ``interval`` steps. Where there are
several dense forms, the fastest of them is "dense".
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import sparsecore
from harness.bpr import BprStep
from harness.command import new_results, run_main, whole_numbers
from recsys.config import Config
from recsys.data import load
from recsys.results import save_results
from recsys.training.probe import StepProbe, time_steps

__all__ = ["WORKLOADS", "Workload", "main", "measure"]

DENSITIES = (0.5, 0.25, 0.1)
_AGAINST_MASKED = 2.0


class TorchSparseProbe(StepProbe):
    """Steps whose graph products go through torch.sparse."""

    def step(self) -> None:
        with sparsecore.backend("torch"):
            super().step()


@dataclass(frozen=True)
class Workload:
    """Forms of one training step.

    Attributes:
        what: model, data, batch.
        build: makes every form, by name; names that begin with "dense" are dense forms.
        targets: by density, what the sparse form is meant to reach.
        dataset: one that has to be there.
    """

    what: str
    build: Callable[[], Mapping[str, Any]]
    targets: tuple[float, float, float]
    dataset: str = ""


def _probes(config: Config, masked: tuple[float, ...], dense: type[StepProbe] = StepProbe) -> dict[str, Any]:
    dataset = load(config.data.name, data_dir=config.data.dir, seed=config.data.seed, **config.data.options)
    forms: dict[str, Any] = {"dense": dense(config.replace(sparsity={"method": "dense"}), dataset)}
    if dense is not StepProbe:
        forms["dense, our propagation"] = StepProbe(config.replace(sparsity={"method": "dense"}), dataset)
    for method, densities in (("masked", masked), ("dsl", DENSITIES)):
        for density in densities:
            chosen = config.replace(sparsity={"method": method, "density": density})
            name = "sparse" if method == "dsl" else method
            probe = dense if method == "masked" else StepProbe
            forms[f"{name}@{density:g}"] = probe(chosen, dataset)
    return forms


def _multvae(batch: int) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Any]:
        data: dict[str, Any] = {
            "name": "synthetic",
            "options": {"users": 10_000, "items": 20_000, "interactions": 1_000_000},
        }
        config = Config.model_validate(
            {"data": data, "sparsity": {"interval": 100}, "train": {"batch_size": batch}}
        )
        # Beside the others, not among them: it computes something else, less exactly, and we have nothing of the kind.
        forms = _probes(config, masked=(0.5,))
        rounded = config.replace(sparsity={"method": "dense"}, train={"precision": "bfloat16"})
        return forms | {"bfloat16 dense": StepProbe(rounded, load("synthetic", **data["options"]))}

    return build


def _lightgcn() -> dict[str, Any]:
    config = Config.model_validate(
        {
            "data": {"name": "gowalla"},
            "model": {"name": "lightgcn"},
            "sparsity": {"interval": 100},
            "train": {"batch_size": 2048},
        }
    )
    return _probes(config, masked=(0.5,), dense=TorchSparseProbe)


def _bpr() -> dict[str, Any]:
    size = {"rows": 1_000_000, "dim": 64, "batch": 2048}
    forms = {name: BprStep(name, **size) for name in ("dense", "dense lazy", "dense lazy on huge pages")}
    forms["masked@0.5"] = BprStep("masked", **size, density=0.5)
    return forms | {f"sparse@{f:g}": BprStep("sparse", **size, density=f) for f in DENSITIES}


WORKLOADS = {
    "multvae-b500": Workload("MultVAE, 20,000 items (synthetic), batch 500", _multvae(500), (1.4, 2.0, 2.6)),
    "multvae-b16": Workload("MultVAE, 20,000 items (synthetic), batch 16", _multvae(16), (1.0, 1.0, 1.0)),
    "bpr-mf": Workload("BPR-MF, one table of 1,000,000 x 64, 2048 triples", _bpr, (3.0, 4.0, 5.0)),
    "lightgcn-gowalla": Workload(
        "LightGCN, gowalla, d = 64, 3 hops, 2048 triples", _lightgcn, (2.5, 2.5, 2.5), "gowalla"
    ),
}


def measure(workload: Workload, threads: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    """Time all forms for each number of threads.

    Returns:
        One row for each form and number of threads: ms of a step (minimum, median) and of an exploration, and the ratio
        to the fastest dense form (dense / form, higher is better); for sparse forms that to the masked one, too, each
        with its explorations.
    """
    before, forms = torch.get_num_threads(), workload.build()
    targets = dict(zip((f"sparse@{f:g}" for f in DENSITIES), workload.targets, strict=True))
    rows = []
    try:
        for n in threads:
            torch.set_num_threads(n)
            times = time_steps(forms, seconds)
            dense = [t for name, t in times.items() if name.startswith("dense") and "our" not in name]
            best = min(t.step.minimum for t in dense)
            middle = min(t.step.median for t in dense)
            masked = times.get("masked@0.5")
            rows += [
                {
                    "threads": n,
                    "form": name,
                    "ratio": best / t.step.minimum,
                    "median ratio": middle / t.step.median,
                    "with exploration": best / t.mean,
                    "target": targets.get(name),
                    "against masked": masked.mean / t.mean if masked and name in targets else None,
                    "step ms": 1e3 * t.step.minimum,
                    "step ms median": 1e3 * t.step.median,
                    "exploration ms": 1e3 * t.exploration,
                    "samples": t.step.samples,
                }
                for name, t in times.items()
            ]
    finally:
        torch.set_num_threads(before)
    return rows


def _page(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "# Whole training steps",
        "",
        "Ratio: time of the fastest dense form / time, minima of interleaved samples (that of medians beside it); then",
        "with the share of one exploration every 100 steps, and the time of the masked form at density 0.5 / time,",
        f"both with that share (target: {_AGAINST_MASKED:g} at density 0.5). Below 1 the form is slower than dense.",
        "bfloat16 dense: its products by autocast in 16 bits, which no sparse form has on a CPU; others are float32.",
    ]
    for name, rows in found.items():
        lines += ["", f"## {WORKLOADS[name].what}", ""]
        lines += [
            "| threads | form | ratio | median | with exploration | target | against masked "
            "| step ms (min / median) | exploration ms |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        lines += [
            f"| {r['threads']} | {r['form']} | {r['ratio']:.2f} | {r['median ratio']:.2f} "
            f"| {r['with exploration']:.2f} | {r['target'] or ''} "
            f"| {format(r['against masked'], '.2f') if r['against masked'] else ''} "
            f"| {r['step ms']:.2f} / {r['step ms median']:.2f} | {r['exploration ms']:.1f} |"
            for r in rows
        ]
    return lines


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Workloads; all of them if absent.")] = None,
    output: Annotated[
        Path | None, typer.Option(callback=new_results, help="Write OUTPUT.json and OUTPUT.md.")
    ] = None,
    threads: Annotated[
        str, typer.Option(callback=whole_numbers, help="Numbers of threads, comma-separated.")
    ] = "1,2",
    seconds: Annotated[float, typer.Option(help="Timing of each workload and number of threads.")] = 30.0,
) -> None:
    """Measure whole training steps against dense."""
    console, found = Console(markup=False, stderr=True), {}
    names = names or list(WORKLOADS)
    for name in names:  # whatever may be missing is missed before the first measurement
        if name not in WORKLOADS:
            raise typer.BadParameter(f"expected one of {', '.join(WORKLOADS)}, got {name!r}")
        if WORKLOADS[name].dataset:
            load(WORKLOADS[name].dataset)
    for name in names:
        rows = measure(WORKLOADS[name], tuple(int(n) for n in threads.split(",")), seconds)
        found[name] = rows
        gc.collect()
        for r in rows:
            console.print(
                f"{name} {r['threads']} threads, {r['form']}: {r['ratio']:.2f} ({r['step ms']:.2f} ms)"
            )
        if output is not None:
            save_results(output, "python -m harness.steps", _page(found), {"workloads": found})


if __name__ == "__main__":
    run_main(main)
