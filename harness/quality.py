"""The page "Quality against density", made of the tables that `recsys reproduce` wrote.

    python -m harness.quality results/*.json --output docs/quality.md

Files that something else wrote are passed over. A row is a preset of a file, and one metric: the one by which its
epochs were chosen, if the table has it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.command import fail, new_file, run_main
from harness.published import flat
from recsys.config import load_config, presets
from recsys.files import replacing
from recsys.sweep.summary import plus_minus

__all__ = ["main", "page"]

_HEAD = """# Quality against density

Made by `python -m harness.quality results/*.json` of tables that `recsys reproduce` wrote; each name leads to its file,
with the command, the machine, other metrics, bytes and multiply-adds. Test metrics at the epoch best on validation,
mean ± sample standard deviation over seeds; differences below one standard deviation are noise. dsl: sparse storage,
index sets that move; masked: dense tensors times masks, with the same rules; static: index sets that stay. "Among 99
others": targets are ranked among as many items, the published ones where the data has them and else drawn. What to make
of it: [results.md](results.md#quality).
"""
_METHODS = ("dsl", "masked", "static")
# Varied by the table, told by its columns, or of no influence on quality.
_UNSAID = {"sparsity.method", "sparsity.density", "train.seed", "train.epochs", "data.dir", "data.seed"}


def page(documents: dict[str, dict[str, Any]], folder: str = "../results") -> str:
    """Markdown.

    Args:
        documents: contents of the files by their names without suffix.
        folder: where the files are, seen from the page.
    """
    sections = [
        (section["preset"] if len(document["sections"]) > 1 else name, f"{folder}/{name}.md", section)
        for name, document in documents.items()
        for section in document["sections"]
    ]
    sections.sort(key=lambda found: found[0])
    rows = [row for _, _, section in sections for row in section["summary"]]
    densities = sorted({row["settings"].get("sparsity.density", 1.0) for row in rows} - {1.0}, reverse=True)
    lines = [
        _HEAD,
        f"| | at most epochs | metric | seeds | dense | method | {' | '.join(f'{d:g}' for d in densities)} |",
    ]
    lines.append("|---" * (6 + len(densities)) + "|")
    for label, link, section in sections:
        lines += _rows(f"[{label}]({link})", section, densities)
    lines += ["", "Where settings are others than those of the preset of today:", ""]
    lines += [f"* {label}: {changes}" for label, _, section in sections if (changes := _changes(section))]
    return "\n".join([*lines, ""])


def _rows(label: str, section: dict[str, Any], densities: list[float]) -> list[str]:
    config, metric = section["config"], _metric(section)

    def value(method: str, density: float | None) -> str:
        for row in section["summary"]:
            settings = row["settings"]
            is_method = settings.get("sparsity.method", "dense") == method
            if is_method and settings.get("sparsity.density") == density:
                return plus_minus(row["test"].get(metric))
        return "-"

    methods = [method for method in _METHODS if any(value(method, d) != "-" for d in densities)]
    sampled = config["evaluation"]["protocol"] == "sampled"
    head = [
        label,
        str(config["train"]["epochs"]) if methods else "-",
        metric + (f" among {config['evaluation']['negatives']} others" if sampled else ""),
        str(max(row["seeds"] for row in section["summary"])),
        value("dense", None),
    ]
    lines = []
    for method in methods or ["-"]:
        cells = [*head, method, *(value(method, density) for density in densities)]
        lines.append(f"| {' | '.join(cells)} |")
        head = [""] * len(head)
    return lines


def _metric(section: dict[str, Any]) -> str:
    chosen = section["config"]["train"]["metric"]
    return str(chosen if chosen in section["metrics"] else section["metrics"][-1])


def _changes(section: dict[str, Any]) -> str:
    if section["preset"] not in presets():
        return "of a preset that is no more"
    known, saved = flat(load_config(section["preset"]).to_dict()), flat(section["config"])
    changes = [
        f"`{key} = {json.dumps(saved[key])}`"
        for key in saved
        if key not in _UNSAID and (key not in known or known[key] != saved[key])
    ]
    parts = section.get("pretrained", {}).values()  # files of older versions do without
    return ", ".join([*changes, *(f"begins with what `{part['preset']}` has learnt" for part in parts)])


def _read(file: Path) -> dict[str, Any] | None:
    """What `recsys reproduce` wrote, or None if something else did."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"{file}: not JSON: {error}")
    known = isinstance(document, dict) and "table" in document and "sections" in document
    return document if known else None


def main(
    files: Annotated[list[Path], typer.Argument(help="Results; those of recsys reproduce are taken.")],
    output: Annotated[Path, typer.Option(callback=new_file, help="The page.")] = Path("docs/quality.md"),
) -> None:
    """Write the page."""
    documents = {file.stem: document for file in files if (document := _read(file)) is not None}
    if not documents:
        fail("none of the files was written by recsys reproduce")
    with replacing(output) as temporary:
        temporary.write_text(page(documents), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
