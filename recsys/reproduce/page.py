"""The page of a table of results: quality at a glance, published values beside it, then every cell with its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recsys.config import Config
from recsys.models.settings import FittedConfig
from recsys.reproduce.definition import Published, PublishedResult, TableDefinition
from recsys.sweep.summary import plus_minus

__all__ = ["Section", "table_page"]

Section = dict[str, Any]
"""A row of the table and what came of it: preset, config, metrics, summary (of `summarise`), cost (of `measure_cells`),
failed, dataset."""


def table_page(
    table: TableDefinition, published: Published, sections: Sequence[Section], notes: Sequence[str]
) -> list[str]:
    """Lines of Markdown."""
    lines = [f"# {table.title}", ""]
    if table.epochs:
        lines += [
            f"**{table.epochs} epochs in place of the presets'. Where those are fewer, it shows that it runs.**",
            "",
        ]
    lines += [
        "Test metrics at the epoch best on validation; mean ± sample standard deviation over seeds.",
        "Densities are the fraction of weights stored. static: index sets fixed; masked: dense tensors times masks",
        "with dsl's decisions; dsl: sparse storage, index sets that move.",
        "",
        published.about.strip(),
        "",
        "| preset | metric | published, dense | dense | method | "
        + " | ".join(f"{density:g}" for density in table.densities)
        + " |",
        "|---" * (5 + len(table.densities)) + "|",
    ]
    for section in sections:
        lines += _glance(table, published, section)
    for section in sections:
        lines += ["", *_details(published, section)]
    if notes:
        lines += ["", "## Left out", "", *(f"* {note}" for note in notes)]
    return lines


def _results(published: Published, section: Section) -> list[PublishedResult]:
    config: Config = section["config"]
    return published.find(config)


def _means(rows: Sequence[Mapping[str, Any]], metric: str, method: str, density: float | None = None) -> str:
    for row in rows:
        settings = row["settings"]
        # What is fitted does not read the method, and its only cell does not name it.
        if settings.get("sparsity.method", "dense") == method and settings.get("sparsity.density") == density:
            return plus_minus(row["test"].get(metric))
    return "-"


def _glance(table: TableDefinition, published: Published, section: Section) -> list[str]:
    lines = []
    for metric in section["metrics"]:
        values = [result.values[metric] for result in _results(published, section) if metric in result.values]
        theirs = ", ".join(f"{value:.4f}" for value in values) or "-"
        dense = _means(section["summary"], metric, "dense")
        sparse = [str(method) for method in table.methods if method != "dense"]
        if isinstance(section["config"].model, FittedConfig):
            lines.append(
                f"| {_label(section)} | {metric} | {theirs} | {dense} | - {'| - ' * len(table.densities)}|"
            )
            continue
        for method in sparse or ["dense"]:
            ours = [_means(section["summary"], metric, method, density) for density in table.densities]
            lines.append(
                f"| {_label(section)} | {metric} | {theirs} | {dense} | {method} | {' | '.join(ours)} |"
            )
    return lines


def _label(section: Section) -> str:
    """The preset, and the model and the data if they are others."""
    other = [str(section["set"][key]) for key in ("model.name", "data.name") if key in section["set"]]
    return " ".join([section["preset"], *other])


def _details(published: Published, section: Section) -> list[str]:
    rows, cost, metrics = section["summary"], section["cost"], section["metrics"]
    lines = [f"## {section['preset']}", ""]
    if section["set"]:
        changed = ", ".join(f"`{key} = {value}`" for key, value in section["set"].items())
        lines += [f"Other settings than the preset's: {changed}.", ""]
    for name, part in section["pretrained"].items():
        changed = ", ".join(f"`{key} = {value}`" for key, value in part["set"].items())
        lines += [
            f"Begins with what a run of `{part['preset']}`{f' ({changed})' if changed else ''} of the same method, "
            f"density and seed has learnt (`train.pretrained.{name}`).",
            "",
        ]
    if section["dataset"]:
        data = section["dataset"]
        lines += [
            f"{data['name']}: {data['users']:,} users, {data['items']:,} items, "
            f"{data['train_interactions']:,} interactions to train on; tested on {data['evaluated_on']}.",
            "",
        ]
    if rows:
        head = [
            "cell",
            "seeds",
            *metrics,
            "best epochs",
            "weights stored",
            "bytes in training",
            "M MACs a step",
        ]
        head += ["ms a step", "ms a recommendation"]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        dense = next(
            (row["cell"] for row in rows if row["settings"].get("sparsity.method", "dense") == "dense"), None
        )
        lines += [_line(row, metrics, cost, dense, rows) for row in rows]
        for result in _results(published, section):
            values = [f"{result.values[name]:.4f}" if name in result.values else "-" for name in metrics]
            lines.append(f"| published, dense | | {' | '.join(values)} " + "| " * 6 + "|")
        lines.append("")
    lines += [
        f"Published: {result.source}{f' ({result.note})' if result.note else ''}."
        for result in _results(published, section)
    ]
    lines += [f"Failed: {run['cell']} seed {run['seed']}: {run['error']}" for run in section["failed"]]
    return lines


def _line(
    row: Mapping[str, Any],
    metrics: Sequence[str],
    cost: Mapping[str, Any],
    dense: str | None,
    rows: Sequence[Mapping[str, Any]],
) -> str:
    def ratio(value: float, reference: float | None) -> str:
        return "" if not reference else f" ({value / reference:.2f}x)"

    size = next((r["bytes"] for r in rows if r["cell"] == dense), None)
    cells = [row["cell"], str(row["seeds"]), *(plus_minus(row["test"].get(name)) for name in metrics)]
    cells += [", ".join(map(str, row["best_epochs"])), f"{row['parameters_stored']:,}"]
    cells += [f"{row['bytes']:,}{ratio(row['bytes'], size)}"]
    # Where costs were measured, all cells saw one batch; else the first step of each run was counted.
    macs = {r["cell"]: r.get("macs") for r in rows} | {
        name: sum(one["macs"].values()) for name, one in cost.items()
    }
    mine = macs[row["cell"]]
    cells.append(f"{mine / 1e6:.1f}{ratio(mine, macs.get(dense or ''))}" if mine else "-")
    found = cost.get(row["cell"])
    if found is None:
        return "| " + " | ".join([*cells, "-", "-"]) + " |"
    for kind, digits in (("step", 2), ("recommend", 3)):
        share = f" ({found[f'{kind}_vs_dense']:.2f}x)" if f"{kind}_vs_dense" in found else ""
        cells.append(f"{found[f'{kind}_ms']:.{digits}f}{share}")
    return "| " + " | ".join(cells) + " |"
