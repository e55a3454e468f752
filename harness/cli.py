"""The command `harness`."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from harness import command
from harness.gate.expectations import ExpectationsError
from harness.history.run import Kept
from harness.history.writer import HistoryError
from harness.revisions.subject import GitError
from recsys.files import replacing
from recsys.machine import describe_machine

__all__ = ["app", "main"]

app = typer.Typer(
    cls=command.Interruptible,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Measures sparsecore and recsys: multiply-adds, memory, time and quality, commit after commit.",
)

Only = Annotated[
    str | None,
    typer.Option(
        callback=command.regular_expression, help="Workloads whose name matches this regular expression."
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
STORE = Path(".harness")


@app.callback()
def _harness() -> None:
    """Counters decide first, ratios taken in turns in one process second; clocks only inform."""


@app.command()
def gate(
    base: Annotated[str, typer.Option(help="Revision to hold the working tree against.")],
    counters: Annotated[bool, typer.Option("--counters", help="Counts and quality only: no times.")] = False,
    times: Annotated[bool, typer.Option("--times", help="Times even where the counts have decided.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Real shapes too.")] = False,
    only: Only = None,
    optional: Annotated[
        bool, typer.Option("--optional", help="Pass if the base is not here, as in a shallow clone.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=2, help="Fresh processes of each side.")] = 3,
    threads: Threads = 1,
    markdown: Annotated[
        Path | None, typer.Option(callback=command.new_file, help="Also write the verdict here, as Markdown.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--json", callback=command.new_file, help="Also write the findings here.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also list what is new or was skipped.")] = False,
) -> None:
    """Is the working tree worse than a revision? Exit code 0 pass, 1 regression, 2 inconclusive or cannot run."""
    from harness.gate.page import show, write
    from harness.gate.run import Plan
    from harness.gate.run import gate as run
    from harness.gate.verdict import exit_code
    from harness.revisions.collect import settings
    from harness.revisions.subject import commit_of, expect_own_suite, repository
    from harness.suite.registry import choose

    root = repository()
    expect_own_suite(root)
    errors = Console(markup=False, stderr=True)
    workloads = choose(only, quick=not full)
    if not workloads:
        raise typer.BadParameter(f"no workload matches {only!r}; see harness list")
    if optional:
        try:
            commit_of(root, base)
        except GitError as error:
            Console(markup=False).print(
                f"PASS: nothing to hold the working tree against: {error}", highlight=False
            )
            raise typer.Exit() from None
    if counters and times:
        raise typer.BadParameter("--counters takes no times, --times takes them always: give one of the two")
    plan = Plan(workloads, False if counters else True if times else None, rounds, threads=threads)
    machine = describe_machine() | settings()
    for name, value in settings().items():
        errors.print(f"{name}={value} is set: both sides are measured so", style="yellow", highlight=False)
    verdict = run(
        root, base, plan, root / STORE / "subjects", lambda line: errors.print(line, highlight=False)
    )
    show(verdict, command.console(), verbose)
    write(verdict, f"harness {shlex.join(sys.argv[1:])}", machine, markdown, output)
    raise typer.Exit(int(exit_code(verdict.findings)))


@app.command()
def run(
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="Small shapes only, or those of real data too.")
    ] = True,
    only: Only = None,
    threads: Threads = 1,
    seconds: Annotated[float, typer.Option(min=0, help="Timing of a workload; 0 only counts.")] = 1.0,
) -> None:
    """Measure the current commit and keep the figures in asv's format. Exit code 1 if a workload fails."""
    from harness.history.run import measure_commit
    from harness.revisions.subject import PACKAGES, expect_own_suite, is_clean, repository, snapshot
    from harness.suite.registry import choose

    root = repository()
    workloads = choose(only, quick)
    if not workloads:
        raise typer.BadParameter(f"no workload matches {only!r}; see harness list")
    expect_own_suite(root)
    subject = snapshot(root, root / STORE / "subjects")
    # What measures counts too: figures of another suite than the commit's are not the commit's.
    clean = is_clean(root, *PACKAGES, "harness", "benchmarks")
    kept = measure_commit(root, subject, workloads, seconds=seconds, threads=threads, keep=clean)
    _tell(kept)
    if not clean:
        Console(markup=False, stderr=True).print(
            "sparsecore, recsys, harness or benchmarks differ from HEAD: nothing was kept; commit first",
            style="yellow",
        )
    raise typer.Exit(1 if kept.failed else 0)


@app.command()
def report(
    html: Annotated[Path | None, typer.Option(callback=command.new_file, help="Write the page here.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    machine: Annotated[
        str | None, typer.Option(help="Machine, as in .asv/results. Default: this one.")
    ] = None,
    threads: Threads = 1,
    commit: Annotated[str, typer.Option(help="Revision that is held against its ancestors.")] = "HEAD",
    judge: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 (regression) or 2 (inconclusive), not always 0.")
    ] = False,
) -> None:
    """A page on a commit's results on a machine, held against those of its ancestors: one file that opens from disk."""
    from harness.history.identity import identify
    from harness.history.reader import read_results
    from harness.history.run import RESULTS
    from harness.report.page import build, to_html, to_markdown
    from harness.revisions.subject import ancestry, repository

    root = repository()
    folder = root / RESULTS
    name = machine or identify(threads).name
    line = ancestry(root, commit)
    runs, problems = read_results(folder, name, line)
    for problem in problems:
        Console(markup=False, stderr=True).print(problem, style="yellow", highlight=False, soft_wrap=True)
    if not runs:
        if others := len(read_results(folder, name)[0]):
            raise HistoryError(
                f"{folder} has results of {others} commits on the machine {name}, but none of {commit} or an ancestor "
                "that is in this clone; measure it with harness run, or name another with --commit"
            )
        if problems:
            raise HistoryError(
                f"none of the {len(problems)} result files in {folder / name} can be read (see above); harness run and "
                "harness backfill set those of their commits aside and measure anew"
            )
        there = sorted(path.name for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []
        raise HistoryError(
            f"{folder} has no results of the machine {name}; measure a commit with harness run"
            + (f", or name one of {', '.join(there)}" if there else "")
        )
    found = build(runs, problems, line[-1])
    if html is not None:
        with replacing(html) as temporary:
            temporary.write_text(to_html(found), encoding="utf-8")
    Console(markup=False).print(found.verdict, highlight=False, soft_wrap=True)
    if as_markdown:
        print(to_markdown(found))
    raise typer.Exit(found.code if judge else 0)


@app.command()
def publish(
    output: Annotated[Path, typer.Option(help="Folder of the site.")] = Path(".asv/html"),
) -> None:
    """asv's own pages from the same results, with what they need from the network put beside them."""
    from harness.history.publish import publish as run
    from harness.revisions.subject import repository

    place = run(repository(), output)
    Console(markup=False).print(
        f"{place}: open it with python -m http.server --directory {output} and a browser",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def doctor(threads: Threads = 1) -> None:
    """What on this machine spoils measurements, and what to do. Exit code 1 if something does."""
    from harness.doctor import examine

    console, bad = Console(markup=False), False
    for check in examine(threads):
        mark, style = {"ok": ("ok", "green"), "note": ("note", "yellow"), "bad": ("BAD", "bold red")}[
            check.status
        ]
        bad = bad or check.status == "bad"
        console.print(Text(f"{mark:>4}", style), f" {check.what}: {check.found}", highlight=False)
        if check.advice:
            console.print(f"      {check.advice}", highlight=False)
    raise typer.Exit(int(bad))


@app.command()
def backfill(
    revisions: Annotated[str, typer.Argument(help="A..B, or one revision.")],
    full: Annotated[bool, typer.Option("--full", help="Real shapes too.")] = False,
    only: Only = None,
    threads: Threads = 1,
    seconds: Annotated[float, typer.Option(min=0, help="Timing of a workload; 0 only counts.")] = 0.5,
    again: Annotated[bool, typer.Option("--again", help="Also what has figures already.")] = False,
) -> None:
    """Measure past commits, with this interpreter and its packages: no environment is built. Of each commit those
    workloads are measured that have no figure yet.
    """
    from harness.history.identity import identify
    from harness.history.run import RESULTS, commits_between, measure_commit
    from harness.history.writer import held, results_file
    from harness.revisions.subject import expect_own_suite, extract, is_clean, repository
    from harness.suite.asv import GROUPS
    from harness.suite.registry import choose

    root = repository()
    workloads = choose(only, quick=not full)
    if not workloads:
        raise typer.BadParameter(f"no workload matches {only!r}; see harness list")
    expect_own_suite(root)
    if not is_clean(root, "harness", "benchmarks"):
        raise HistoryError(
            "harness or benchmarks differ from HEAD, and figures are kept of what is committed: commit first"
        )
    failed = False
    for commit in commits_between(root, revisions):
        left = workloads
        if not again:
            try:
                there = held(results_file(root / RESULTS, commit, identify(threads)))
            except HistoryError:  # damaged: nothing of it is left, and measuring sets it aside
                there = {}
            left = [
                workload
                for workload in workloads
                if workload.name not in there
                or (
                    seconds > 0
                    and "seconds" in GROUPS[workload.group]
                    and "seconds" not in there[workload.name]
                )
            ]
        if not left:
            Console(markup=False).print(f"{commit[:10]}: has figures already", highlight=False)
            continue
        try:
            subject = extract(root, commit, root / STORE / "subjects")
        except GitError as error:
            Console(markup=False).print(f"{commit[:10]}: skipped, {error}", highlight=False)
            continue
        kept = measure_commit(root, subject, left, seconds=seconds, threads=threads)
        failed = failed or bool(kept.failed)
        _tell(kept)
    raise typer.Exit(1 if failed else 0)


def _tell(kept: Kept) -> None:
    console = Console(markup=False)
    missing = {name: o.missing for name, o in kept.outcomes.items() if o.missing is not None}
    console.print(
        f"{kept.subject.revision[:10]}: {len(kept.outcomes)} workloads in {kept.seconds:.0f} s, "
        f"{len(kept.failed)} failed, {len(missing)} skipped; kept in {kept.path or 'no file'}",
        highlight=False,
        soft_wrap=True,
    )
    for name, why in missing.items():
        console.print(f"  {name}: skipped, {why}", highlight=False)
    for name in kept.failed:
        console.print(f"  {name}: failed\n{kept.outcomes[name].error}", highlight=False)


@app.command("list")
def list_workloads(only: Only = None) -> None:
    """The workloads: name, kind, forms, whether a quick run takes them, and what they are."""
    from rich import box
    from rich.table import Table

    from harness.suite.registry import choose

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("workload", "kind", "quick", "forms", "what"):
        table.add_column(name, overflow="fold")
    for workload in choose(only):
        forms = f"{len(workload.forms)}"
        table.add_row(workload.name, workload.group, "yes" if workload.quick else "", forms, workload.what)
    command.console().print(table)


_EXTRA = ("asv", "asv_runner", "jinja2", "matplotlib", "psutil")


def main() -> None:
    """Entry point; errors that a user can mend are one line, and exit code 2."""
    # As at the end of a with block: workers are stopped, and temporary folders go.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with command.mendable(GitError, ExpectationsError, HistoryError):
            app()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        command.fail(
            f'{error.name} is not installed; harness needs more than the library: pip install "sparsecore[bench]"'
        )


if __name__ == "__main__":
    main()
