"""How good the gate is: commits that change nothing must pass, planted defects must be caught, on this machine.

    python -m harness.power --output results/power
    python -m harness.power --jobs 3 --output results/power-loaded

In a scratch clone every change is committed on top of the current commit, and ``harness gate --base HEAD~1`` judges
it. ``--jobs N`` runs N trials at a time, so that each finds the machine busy with the others' measurements;
``--load N`` runs N processes beside it that do nothing but take a core each.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harness.command import new_results, regular_expression, run_main, some_of
from harness.revisions.subject import GitError, git, repository
from recsys.results import save_results

__all__ = ["CHANGES", "Change", "main"]

# What a gate of this trial measures: an operation, a layer, a model's steps, its quality.
ONLY = "^(spmm-2000x300|linear-1000|lightgcn-train|lightgcn-quality)"


@dataclass(frozen=True)
class Change:
    """A commit.

    Attributes:
        edits: file, text that it has, text that takes its place; an empty old text appends.
        caught_by: a figure that must be among the regressions; None for a change that must pass.
    """

    name: str
    edits: tuple[tuple[str, str, str], ...]
    caught_by: str | None = None


def _append(name: str, file: str, text: str) -> Change:
    return Change(name, ((file, "", text),))


_HARMLESS = (
    *(_append(f"docs {n}", "README.md", f"\n<!-- {n} -->\n") for n in range(6)),
    *(_append(f"changelog {n}", "CHANGELOG.md", f"\n- {n}\n") for n in range(3)),
    _append("a test", "tests/test_structure.py", "\n# nothing\n"),
    *(
        _append(f"comment in {file}", file, "\n# A comment.\n")
        for file in (
            "sparsecore/nn/linear.py",
            "sparsecore/topology/grow.py",
            "sparsecore/backends/numba/linear.py",
            "recsys/models/lightgcn.py",
            "recsys/training/trainer.py",
        )
    ),
    Change(
        "docstring",
        (
            (
                "sparsecore/nn/linear.py",
                '"""x (*, in_features) -> (*, out_features)."""',
                '"""y = W x + b, batched."""',
            ),
        ),
    ),
    Change(
        "rename of a local",
        (
            (
                "sparsecore/nn/linear.py",
                "dense_bias = None if isinstance(bias, SparseBias) else bias\n"
                "        output = ops.spmm(*self.operands, flat, dense_bias)",
                "added = None if isinstance(bias, SparseBias) else bias\n"
                "        output = ops.spmm(*self.operands, flat, added)",
            ),
        ),
    ),
    Change(
        "rename in a model",
        (
            ("recsys/models/lightgcn.py", "ranking = F.softplus", "pairwise = F.softplus"),
            ("recsys/models/lightgcn.py", "return ranking +", "return pairwise +"),
        ),
    ),
    _append("a new function", "sparsecore/measure.py", "\n\ndef _unused() -> None:\n    return None\n"),
    _append("a new module", "sparsecore/unused.py", '"""Nothing."""\n'),
)

_DEFECTS = (
    Change(
        "spmm 1.3x slower",
        (
            (
                "sparsecore/backends/numba/linear.py",
                "    return y\n",
                "    part = round(0.3 * batch)\n"
                "    if part:\n"
                "        given = array(values), array(crow), _columns(col), array(x[:part])\n"
                "        module.spmm(*given, y[:part].numpy(), threads(part * nnz))\n"
                "    return y\n",
            ),
        ),
        "time_vs_frozen",
    ),
    Change(
        "a hidden dense copy of a weight",
        (
            (
                "sparsecore/nn/linear.py",
                "        flat = input if input.dim() == 2",
                "        self._copy = self.values.new_zeros(self.out_features, self.in_features)\n"
                "        flat = input if input.dim() == 2",
            ),
        ),
        "peak_bytes",
    ),
    Change(
        "one propagation hop more",
        (("recsys/models/lightgcn.py", "self.table, self.hops, rows)", "self.table, self.hops + 1, rows)"),),
        "macs_forward",
    ),
    Change(
        "columns of 64 bits",
        (
            ("sparsecore/sizes.py", "return torch.uint8", "return torch.int64"),
            ("sparsecore/sizes.py", "return torch.int16", "return torch.int64"),
        ),
        "resident_bytes",
    ),
    Change(
        "optimizer state allocated dense",
        (
            (
                "recsys/training/trainer.py",
                "            self.optimizer.step()\n",
                "            self.optimizer.step()\n"
                "            for parameter in self.model.parameters():\n"
                "                spare = parameter.new_zeros(4 * parameter.numel())\n"
                "                self.optimizer.state[parameter].setdefault('spare', spare)\n",
            ),
        ),
        "state_bytes",
    ),
    Change(
        "5 % of quality lost",
        (("recsys/training/parts.py", "lr=train.lr, fused", "lr=0.8 * train.lr, fused"),),
        "quality_loss",
    ),
    Change(
        "a benchmark disappears",
        (("harness/suite/registry.py", "", '\ndel WORKLOADS["lightgcn-train"]\n'),),
        "*",
    ),
    Change(
        "a figure turns NaN",
        (
            (
                "sparsecore/accounting.py",
                '        """Sum of all."""\n        return (',
                '        """Sum of all."""\n        return float("nan") * (',
            ),
        ),
        "resident_bytes",
    ),
)

CHANGES = (*_HARMLESS, *_DEFECTS)


def apply(change: Change, root: Path) -> None:
    """Make the edits of a change.

    Raises:
        GitError: a file has not the text that is to be replaced, or has it more than once.
    """
    for name, old, new in change.edits:
        path = root / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if old and text.count(old) != 1:
            raise GitError(
                f"the change {change.name!r} no longer fits the sources: {name} has {old!r} {text.count(old)} times, "
                "expected once"
            )
        path.write_text(text.replace(old, new) if old else text + new, encoding="utf-8")


def _scratch(root: Path, place: Path) -> str:
    """Clone the current commit; its hash."""
    git(root, "clone", "--quiet", "--no-hardlinks", str(root), str(place))
    git(place, "config", "user.name", "nobody")
    git(place, "config", "user.email", "nobody@localhost")
    git(place, "checkout", "--quiet", "--detach")
    return git(place, "rev-parse", "HEAD")


def judge(scratch: Path, base: str, change: Change, only: str, rounds: int) -> dict[str, Any]:
    """Commit a change on top of a commit and let the gate judge: exit code, figures that regressed, seconds."""
    git(scratch, "checkout", "--quiet", "--force", base)
    git(scratch, "clean", "--quiet", "--force", "-d")
    apply(change, scratch)
    git(scratch, "add", "--all")
    git(scratch, "commit", "--quiet", "--message", change.name)
    begun, found = time.perf_counter(), scratch / ".harness" / "found.json"
    found.parent.mkdir(exist_ok=True)
    found.unlink(missing_ok=True)
    arguments = ["gate", "--base", "HEAD~1", "--only", only, "--rounds", str(rounds), "--json", str(found)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "harness.cli", *arguments],
        cwd=scratch,
        env={**os.environ, "PYTHONPATH": str(scratch)},
        capture_output=True,
        text=True,
        check=False,
    )
    if not found.exists():
        raise RuntimeError(f"{change.name}: the gate ended with {done.returncode}: {done.stderr[-2000:]}")
    findings = json.loads(found.read_text())["findings"]
    worse = sorted({f["metric"] for f in findings if f["status"] == "regression"})
    doubtful = sorted({f["metric"] for f in findings if f["status"] == "inconclusive"})
    right = (
        done.returncode != 1
        if change.caught_by is None
        else done.returncode == 1 and change.caught_by in worse
    )
    return {
        "code": done.returncode,
        "regressions": worse,
        "inconclusive": doubtful,
        "right": right,
        "seconds": time.perf_counter() - begun,
    }


@contextlib.contextmanager
def _load(processes: int) -> Iterator[None]:
    program = "x = 1.0\nwhile True:\n    x = x * 1.0000001 % 3\n"
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main(
    output: Annotated[
        Path, typer.Option(callback=new_results, help="Results are written to OUTPUT.json and OUTPUT.md.")
    ],
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Repeats at a time.")] = 1,
    load: Annotated[int, typer.Option(min=0, help="Processes that take a core each beside it.")] = 0,
    only: Annotated[str, typer.Option(callback=regular_expression, help="Workloads of the gate.")] = ONLY,
    rounds: Annotated[int, typer.Option(min=2)] = 3,
    changes: Annotated[
        str,
        typer.Option(
            callback=lambda value: value and some_of(c.name for c in CHANGES)(value),
            help="Comma-separated names; default: all.",
        ),
    ] = "",
) -> None:
    """Try the gate on commits that change nothing, and on planted defects."""
    chosen = [c for c in CHANGES if not changes or c.name in changes.split(",")]
    console = Console(markup=False, stderr=True)
    rows: dict[str, list[dict[str, Any]]] = {change.name: [] for change in chosen}
    before = f"load average before it {os.getloadavg()[0]:.1f}"
    beside = f"{os.cpu_count()} cores, {jobs} trials at a time, {load} busy loops beside them, {before}"
    saving = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="harness-power-") as folder, _load(load):
        scratches: queue.Queue[Path] = queue.Queue()
        for job in range(jobs):
            scratches.put(Path(folder) / f"scratch{job}")
            base = _scratch(repository(), Path(folder) / f"scratch{job}")

        def trial(repeat: int) -> None:
            scratch = scratches.get()
            try:
                for change in chosen:
                    row = judge(scratch, base, change, only, rounds)
                    with saving:
                        rows[change.name].append(row)
                        console.print(f"{repeat + 1}: {change.name}: {row}", highlight=False, soft_wrap=True)
                        _save(output, chosen, rows, beside)
            finally:
                scratches.put(scratch)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(trial, range(repeats)))


def _save(output: Path, chosen: list[Change], rows: dict[str, list[dict[str, Any]]], beside: str) -> None:
    """Written after every judgement: an interrupted trial keeps what it has."""
    harmless = [row for change in chosen if change.caught_by is None for row in rows[change.name]]
    defects = [row for change in chosen if change.caught_by is not None for row in rows[change.name]]
    alarms = sum(row["code"] == 1 for row in harmless)
    lines = [
        "# Power of the gate, and its false alarms",
        "",
        f"{alarms} false alarms in {len(harmless)} judgements of commits that change nothing "
        f"({sum(row['code'] == 2 for row in harmless)} inconclusive); "
        f"{sum(row['right'] for row in defects)} of {len(defects)} planted defects caught, each by the figure "
        f"meant for it. Machine: {beside}.",
        "",
        "| commit | caught by | verdicts | right | figures that regressed | seconds |",
        "|---|---|---|---|---|---|",
    ]
    words = {0: "pass", 1: "regression", 2: "inconclusive"}
    for change in chosen:
        found = rows[change.name]
        if found:
            figures = sorted({metric for row in found for metric in row["regressions"]})
            lines.append(
                f"| {change.name} | {change.caught_by or '-'} | {', '.join(words[row['code']] for row in found)} "
                f"| {sum(row['right'] for row in found)} of {len(found)} | {', '.join(figures) or '-'} "
                f"| {max(row['seconds'] for row in found):.0f} |"
            )
    save_results(output, "python -m harness.power", lines, {"beside": beside, "judgements": rows})


if __name__ == "__main__":
    run_main(main, GitError)
