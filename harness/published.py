"""Finished dense runs beside published values: one table, with the command that repeats each.

    python -m harness.published RUN... --output results/published

Runs of the same settings but the seed are one row; folders that their initial weights were taken from are found from
here, as they were when the runs began. Ratio = ours / published (higher is better).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer

from harness.command import new_results, run_main
from recsys.config import Config, load_config, presets
from recsys.errors import RecsysError
from recsys.reproduce.definition import load_published
from recsys.results import save_results
from recsys.training.run_folder import RunFolder

__all__ = ["command_of", "flat", "main", "rows_of"]


def command_of(config: Config) -> str:
    """The `recsys train` that makes a dense run of these settings, from the preset of its model and data set.

    Runs that initial weights were taken from are named as the parts that they are: {"gmf": ...} is ``runs/gmf``.
    """
    preset = f"{config.model.name}-{config.data.name.partition('/')[0]}"
    known = load_config(preset) if preset in presets() else Config()
    parts = {name: f"runs/{name}" for name in config.train.pretrained}
    base, own = flat(known.to_dict()), flat(config.replace(train={"pretrained": parts}).to_dict())
    differing = {
        key: value
        for key, value in own.items()
        if base.get(key) != value
        and not key.startswith("sparsity.")
        and key not in ("data.dir", "train.seed", "train.epochs", "train.stop_epoch")
    }
    words = ["recsys", "train", *(("--preset", preset) if preset in presets() else ()), "--method", "dense"]
    words += [
        "--epochs",
        str(config.train.stop_epoch or config.train.epochs),
        "--seed",
        str(config.train.seed),
    ]
    for key, value in differing.items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.lr": 0.001} of {"train": {"lr": 0.001}}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def rows_of(paths: list[Path]) -> list[dict[str, Any]]:
    """One row for each group of runs that differ in the seed only.

    Raises:
        RecsysError: not a finished dense run.
    """
    groups: dict[str, list[tuple[Config, dict[str, Any]]]] = {}
    for path in paths:
        folder = RunFolder.open(path)
        config, metrics = folder.config(), folder.metrics()
        if metrics is None or config.sparsity.method != "dense":
            raise RecsysError(f"{path}: expected a dense run that has ended")
        names = dict.fromkeys(config.train.pretrained, "")
        key = config.replace(train={"seed": 0, "pretrained": names}, data={"dir": None}).hash
        groups.setdefault(key, []).append((config, metrics))
    published, rows = load_published(), []
    for group in groups.values():
        config, metrics = group[0]
        values = {}
        for result in published.find(config):
            for metric, value in result.values.items():
                ours = [m["test"][metric] for _, m in group if metric in m["test"]]
                if ours:
                    spread = stdev(ours) if len(ours) > 1 else None
                    values[metric] = {
                        "ours": fmean(ours),
                        "spread": spread,
                        "published": value,
                        "ratio": fmean(ours) / value,
                        "source": result.source,
                    }
        rows.append(
            {
                "model": config.model.name,
                "dataset": config.data.name,
                "seeds": [c.train.seed for c, _ in group],
                "epochs": [m["best_epoch"] for _, m in group],
                "seconds": fmean(m["seconds"] for _, m in group),
                "values": values,
                "command": command_of(config),
                "parts": {name: command_of(part) for name, part in _parts(config).items()},
                "versions": metrics["versions"],
            }
        )
    return rows


def _parts(config: Config) -> dict[str, Config]:
    """Settings of the runs that initial weights were taken from."""
    return {name: RunFolder.open(Path(folder)).config() for name, folder in config.train.pretrained.items()}


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished dense runs.")],
    output: Annotated[
        Path, typer.Option(callback=new_results, help="Results are written to OUTPUT.json and OUTPUT.md.")
    ],
) -> None:
    """Put finished dense runs beside published values."""
    rows = rows_of(runs)
    lines = [
        "# Dense models beside published values",
        "",
        "Ratio: ours / published, higher is better. Seconds are of training, without evaluation.",
        "",
        "| model | data | seeds | epochs | metric | ours | published | ratio | source | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for metric, value in row["values"].items():
            spread = "" if value["spread"] is None else f" ± {value['spread']:.4f}"
            lines.append(
                f"| {row['model']} | {row['dataset']} | {len(row['seeds'])} | {max(row['epochs'])} | {metric} "
                f"| {value['ours']:.4f}{spread} | {value['published']:.4f} | {value['ratio']:.3f} "
                f"| {value['source']} | {row['seconds']:,.0f} |"
            )
    lines += ["", "Commands, each with `--output`, and with every seed:", "", "```console"]
    for row in rows:
        lines += [f"{command} --output runs/{name}" for name, command in row["parts"].items()]
        lines.append(row["command"])
    lines.append("```")
    save_results(output, "python -m harness.published", lines, {"rows": rows})


if __name__ == "__main__":
    run_main(main)
