"""The page "Where it runs", made of test runs: ``pytest --outcomes FILE`` writes what passed, a file for each setting.

    python -m harness.where results/where/*.json --output docs/where.md

Rows of the first table are settings, those of the second one features, which tests name with a mark.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.command import new_file, run_main
from recsys.errors import RecsysError
from recsys.files import replacing

__all__ = ["main", "page"]

_HEAD = """# Where it runs

Made by `python -m harness.where results/where/*.json` of test runs with `--outcomes results/where/SETTING.json`.
What each setting ran, when, and of which commit, is at the end: the whole suite, but for gpu (the tests that need
one) and triton (its part of the suite, without what takes minutes in the interpreter). torch, torch-sparse, portable
and triton are tox environments of these names; python313-torch26 is tox's py313-torch26, and torch-2.15 its newest;
the others differ in processor or device.
"""
_KEYS = {"machine", "total", "backend", "interpreted", "simd", "gpu", "features", "arguments"}
_KINDS = {"machine": dict, "total": dict, "features": dict, "arguments": list}


def page(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown, from the contents of the files by their names."""
    lines = [
        _HEAD,
        "| setting | Python | torch | backend | vector code | device | passed | skipped | failed |",
    ]
    lines.append("|---" * 9 + "|")
    for name, run in runs.items():
        machine, total = run["machine"], run["total"]
        backend = f"{run['backend']}{', interpreted' if run['interpreted'] else ''}"
        cells = [
            name,
            machine["python"],
            machine["torch"],
            backend,
            run["simd"] if run["simd"] != "auto" else machine["isa"],
            run["gpu"] or f"CPU ({machine['microarchitecture']})",
            *(str(total.get(outcome, 0)) for outcome in ("passed", "skipped", "failed")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "What is not run in a setting has no mark there, nor what had no name yet when it ran.", ""]
    lines += [f"| feature | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
    for feature in sorted({feature for run in runs.values() for feature in run["features"]}):
        marks = [_mark(run["features"].get(feature, {})) for run in runs.values()]
        lines.append(f"| {feature} | {' | '.join(marks)} |")
    lines.append("")
    for name, run in runs.items():
        machine = run["machine"]
        command = f"`pytest {shlex.join(run['arguments'])}`"
        note = f" ({run['note']})" if "note" in run else ""
        lines.append(f"* {name}: {machine['date']}, commit {machine['commit']}, {command}{note}")
    return "\n".join([*lines, ""])


def _mark(outcomes: dict[str, int]) -> str:
    if outcomes.get("failed"):
        return f"{outcomes['failed']} of {sum(outcomes.values())} fail"
    passed, skipped = outcomes.get("passed", 0), outcomes.get("skipped", 0)
    if skipped:
        return f"{passed} pass, {skipped} skipped" if passed else "skipped"
    return "yes" if passed else ""


def _read(file: Path) -> dict[str, Any]:
    """What pytest wrote.

    Raises:
        RecsysError: it is something else.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecsysError(f"{file}: not JSON: {error}") from error
    absent = _KEYS - set(document) if isinstance(document, dict) else _KEYS
    if absent:
        raise RecsysError(
            f"{file}: expected what pytest --outcomes writes, but it has no {', '.join(sorted(absent))}"
        )
    for key, kind in _KINDS.items():
        if not isinstance(document[key], kind):
            raise RecsysError(f"{file}: {key}: expected {kind.__name__}, got {document[key]!r:.40}")
    return document


def main(
    files: Annotated[list[Path], typer.Argument(help="What pytest --outcomes wrote.")],
    output: Annotated[Path, typer.Option(callback=new_file, help="The page.")] = Path("docs/where.md"),
) -> None:
    """Write the page."""
    runs = {file.stem: _read(file) for file in files}
    with replacing(output) as temporary:
        temporary.write_text(page(runs), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
