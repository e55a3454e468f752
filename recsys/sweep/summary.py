"""Runs that differ in their seed only, as one row: mean and standard deviation, as JSON, Markdown and on a terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from recsys.errors import ConfigError

__all__ = ["best_row", "markdown_table", "plus_minus", "shown_metrics", "summarise", "terminal_tables"]

HEAD = ("best epochs", "weights stored", "bytes in training", "M MACs a step", "seconds")


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every cell, in the order of first appearance.

    Returns:
        Rows of cell, settings, seeds (how many), test and validation ({metric: {"mean", "sd"}}; sd is the sample
        standard deviation, None of one seed), best_epochs, parameters_stored, bytes (resident in training), macs (of
        a training step, with its share of an exploration; None where it was not counted), seconds (mean of training,
        without evaluation). Rows of older files have no macs.
    """
    rows = []
    for name in dict.fromkeys(run["cell"] for run in runs):
        mine = [run for run in runs if run["cell"] == name]
        rows.append(
            {
                "cell": name,
                "settings": mine[0]["settings"],
                "seeds": len(mine),
                "test": _moments([run["test"] for run in mine]),
                "validation": _moments([run["validation"] for run in mine]),
                "best_epochs": sorted(run["best_epoch"] for run in mine),
                "parameters_stored": mine[0]["parameters_stored"],
                "bytes": mine[0]["resident_bytes"]["total"],
                "macs": math.fsum(mine[0].get("macs_per_step", {}).values()) or None,
                "seconds": statistics.mean(run["seconds"] for run in mine),
            }
        )
    return rows


def _moments(metrics: Sequence[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    common = [name for name in metrics[0] if all(name in one for one in metrics)]
    found: dict[str, dict[str, float | None]] = {}
    for name in common:
        values = [one[name] for one in metrics]
        found[name] = {
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
        }
    return found


def plus_minus(moments: dict[str, float | None] | None) -> str:
    """``0.3622 ± 0.0049``, without the second part where one seed was run; - where there is nothing."""
    if moments is None:
        return "-"
    mean, sd = moments["mean"], moments["sd"]
    return f"{mean:.4f}" if sd is None else f"{mean:.4f} ± {sd:.4f}"


def best_row(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The row with the highest mean of a *validation* metric: what may be chosen without having seen the test set.

    Raises:
        ConfigError: the metric was not computed on validation users.
    """
    known = [row for row in rows if metric in row["validation"]]
    if not known:
        valid = sorted({name for row in rows for name in row["validation"]})
        raise ConfigError(
            f"--best {metric}: no run has it for its validation users; there is: {', '.join(valid) or 'nothing'}"
        )
    return max(known, key=lambda row: row["validation"][metric]["mean"])


def shown_metrics(rows: Sequence[dict[str, Any]], chosen: str, asked: Sequence[str] = ()) -> list[str]:
    """Which test metrics a table has room for: those asked for, else recall and NDCG and what chose the epoch."""
    valid = list(dict.fromkeys(name for row in rows for name in row["test"]))
    usual = [name for name in valid if name.partition("@")[0] in ("recall", "ndcg") or name == chosen]
    return list(asked) or usual


def markdown_table(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[str]:
    """Lines of a table; bytes and multiply-adds also as a share of the dense row, or the first."""
    reference = _reference(rows)
    head = ["cell", "seeds", *metrics, *HEAD]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(_words(row, metrics, reference)) + " |")
    return lines


def terminal_tables(rows: Sequence[dict[str, Any]], metrics: Sequence[str], title: str) -> list[Table]:
    """The same for a terminal of 80 columns: quality, three metrics at a time, and cost."""
    reference = _reference(rows)
    words = [_words(row, metrics, reference) for row in rows]
    tables = []
    for start in range(0, len(metrics), 3):
        names = list(metrics[start : start + 3])
        table = _new_table(title, "± sample sd over seeds; at the epoch best on validation.", "seeds", *names)
        for name, seeds, *others in words:
            table.add_row(name, seeds, *others[start : start + len(names)])
        tables.append(table)
    cost = _new_table("cost", None, "best epochs", "weights stored", "MB in training", "M MACs", "seconds")
    for row, (name, _, *others) in zip(rows, words, strict=True):
        epochs, stored, _, _, seconds = others[len(metrics) :]
        size = f"{row['bytes'] / 1e6:,.3g}" if row["bytes"] < 1e8 else f"{row['bytes'] / 1e6:,.0f}"
        macs = f"{row['macs'] / 1e6:,.4g}" if row.get("macs") else "-"
        cost.add_row(name, epochs, stored, size, macs, seconds)
    return [*tables, cost]


def _new_table(title: str, caption: str | None, *heads: str) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _reference(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The dense row, or the first."""
    dense = [row for row in rows if row["settings"].get("sparsity.method") == "dense"]
    return (dense or rows)[0]


def _words(row: dict[str, Any], metrics: Sequence[str], reference: dict[str, Any]) -> list[str]:
    share = f" ({row['macs'] / reference['macs']:.0%})" if row.get("macs") and reference.get("macs") else ""
    return [
        row["cell"],
        str(row["seeds"]),
        *(plus_minus(row["test"].get(name)) for name in metrics),
        ", ".join(map(str, row["best_epochs"])),
        f"{row['parameters_stored']:,}",
        f"{row['bytes']:,} ({row['bytes'] / reference['bytes']:.0%})",
        f"{row['macs'] / 1e6:,.1f}{share}" if row.get("macs") else "-",
        f"{row['seconds']:.1f}",
    ]
