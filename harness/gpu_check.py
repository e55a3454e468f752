"""What a GPU makes of it: tests, every operation against its best dense form, training steps, memory.

    python -m harness.gpu_check --output results/gpu

writes ``OUTPUT.json`` and ``OUTPUT.md``, anew after every measurement, within ``--seconds``; what there was no time for
is listed. ``--device cpu --quick``
runs all of it on tiny shapes, through the same code (torch.sparse), and judges nothing. Measurements are made in a
process of their own (`harness.gpu_worker`): what fails there has its error in its row.

A bare machine needs torch, numba, scipy and, for the tests, pytest, hence no typer here. Tests in files that import
more (hypothesis for what it draws, pydantic for training whole models) are left out there; the page names the files
and what they lack. The tests are those of the current folder, a checkout. ``--slow`` runs the tests marked slow too,
those of nccl: give more ``--seconds`` then.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sparsecore
from harness.gpu_forms import OPERATIONS
from harness.gpu_further import FURTHER
from harness.gpu_operands import Operation, Run, only_csr
from harness.gpu_page import SECTIONS, left_out, page, shown_density
from harness.gpu_steps import FURTHER_WORKLOADS, MEMORY, WORKLOADS
from harness.gpu_worker import Job, Row, describe_error, launch_times, run_jobs, time_calls, watch
from harness.places import results_refused
from recsys.results import save_results

__all__ = ["jobs", "main", "measure", "run_tests"]

_TOLERANCE = 1e-3  # relative; float32 products over 20,000 terms stay below 1e-5
_TESTS_SECONDS = 180.0  # of which most compile kernels
_SLOW_SECONDS = 240.0  # more for those marked slow
_TESTS = Path("tests/sparsecore")  # of the current folder: an installed package has no tests beside it
_NOT_COLLECTED = re.compile(r"^SKIPPED \[\d+\] (\S+?)(?::\d+)?: not collected: needs (\S+)$", re.MULTILINE)


def jobs() -> dict[str, list[Job]]:
    """What is measured, by section; in this order, so that what is new is what a short run leaves out."""
    operations = {"operations": OPERATIONS, "further operations": FURTHER}
    steps: dict[str, Any] = {
        "training steps": WORKLOADS,
        "memory": MEMORY,
        "further training steps": FURTHER_WORKLOADS,
    }
    found: dict[str, list[Job]] = {
        section: [
            Job("harness.gpu_check", name, density)
            for name, operation in group.items()
            for density in operation.densities
        ]
        for section, group in operations.items()
    }
    found |= {section: [Job("harness.gpu_steps", name) for name in group] for section, group in steps.items()}
    return {section: found[section] for section in SECTIONS}


def measure(job: Job, device: str, quick: bool) -> list[Row]:
    """One row of an operation at a density; forms that fail are named in it.

    Returns:
        ``ratio`` and ``median ratio`` (fastest dense / ours), ``loop ratio`` (of the longer of device's and host's
        time, again of the best dense form), the fastest ``dense`` form, ``ms`` and ``median ms``,
        ``dense ms``, ``host ms`` and ``dense host ms`` (to launch a call), ``others`` (time / ours), relative
        ``deviation`` from the reference, ``syncs``. Or ``error``.
    """
    operation = (OPERATIONS | FURTHER)[job.name]
    with _precision(operation.tf32):
        return _measure(job, operation, device, quick)


@contextmanager
def _precision(tf32: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else before)
    # Convolutions have another switch, which is on by default. Not `cudnn.flags`: it sets what products may do, too.
    convolutions = _set_cudnn(tf32, True)
    try:
        yield
    finally:
        _set_cudnn(*convolutions)
        torch.set_float32_matmul_precision(before)


def _set_cudnn(tf32: bool, benchmark: bool) -> tuple[bool, bool]:
    """Whether convolutions may use TF32 and look for their fastest algorithm; what was set before."""
    cudnn = torch.backends.cudnn
    with warnings.catch_warnings():  # newer versions recommend another name for it
        warnings.simplefilter("ignore")
        before = cudnn.allow_tf32, cudnn.benchmark
        cudnn.allow_tf32, cudnn.benchmark = tf32, benchmark
    return before


def _measure(job: Job, operation: Operation, device: str, quick: bool) -> list[Row]:
    size = operation.quick if quick else operation.size
    torch.manual_seed(0)
    forms = operation.build(job.density, device, **size)
    others = {**forms.others, **(_by_torch(operation, job.density, device, size) if operation.rival else {})}
    row, failed = job.row(), {}
    ours = forms.ours(0)
    name, reference = next(iter(forms.dense.items()))
    expected = reference(0)
    row["deviation"] = forms.error(ours, expected)
    if not row["deviation"] <= _TOLERANCE:
        return [row | {"error": f"wrong: relative error {row['deviation']:.2g} against {name}"}]
    seen = watch(lambda: forms.ours(1), device)
    row |= {"syncs": seen.syncs, "sync places": seen.places}
    calls = {"ours": forms.ours}
    for name, run in {**others, **forms.dense}.items():  # a dense form may write where the expected result is
        try:
            error = forms.error(run(0), expected) if name in others else 0.0
            if not error <= _TOLERANCE:
                failed[name] = f"wrong: relative error {error:.2g}"
                continue
            run(1)
            calls[name] = run
        except Exception as error:
            failed[name] = describe_error(error)
    launches = launch_times(calls, device)
    # Twice what the slowest to launch takes, so that the device never waits for the host.
    times = time_calls(calls, device, samples=1 if quick else 25, lead=min(0.02, 2 * max(launches.values())))
    # What a call takes in a loop of calls: the device waits for the host, or the host for the device.
    loop = {name: max(found.minimum, launches[name]) for name, found in times.items()}
    mine, dense = times["ours"], [name for name in forms.dense if name in times]
    best = min(dense, key=lambda name: times[name].minimum)
    return [
        row
        | {
            "ratio": times[best].minimum / mine.minimum,
            "median ratio": min(times[name].median for name in dense) / mine.median,
            "loop ratio": min(loop[name] for name in dense) / loop["ours"],
            "dense": best,
            "ms": 1e3 * mine.minimum,
            "median ms": 1e3 * mine.median,
            "dense ms": 1e3 * times[best].minimum,
            "host ms": 1e3 * launches["ours"],
            "dense host ms": 1e3 * launches[best],
            "others": {name: times[name].minimum / mine.minimum for name in others if name in times},
            "failed forms": failed,
            "samples": mine.samples,
        }
    ]


def _by_torch(
    operation: Operation, density: float | None, device: str, size: Mapping[str, int]
) -> Mapping[str, Run]:
    """Our form on the torch backend with csr weights and the same inputs; on CUDA alone, elsewhere it is ours."""
    if torch.device(device).type != "cuda":
        return {}
    torch.manual_seed(0)
    with only_csr():
        run = operation.build(density, device, **size).ours

    def by_torch(i: int) -> Any:
        with sparsecore.backend("torch"):
            return run(i)

    return {"torch backend, csr": by_torch}


def run_tests(seconds: float, slow: bool = False) -> dict[str, Any]:
    """Tests marked ``gpu``, of those marked ``slow`` too only if asked for.

    Returns:
        Outcomes by number, exit code, the output's end if one fails, and ``not collected``: test files that hold such
        tests and import a package that is not here, with its name.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-m",
        "gpu" if slow else "gpu and not slow",
        "tests",
    ]
    # A test file whose imports are missing here must not keep the others from running.
    command += ["--bare", "--continue-on-collection-errors", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "4"]  # most of the time kernels are compiled
    begin = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        code, output = done.returncode, done.stderr + done.stdout
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        code, output = -1, f"{output}\nstopped after {seconds:.0f} seconds"
    pattern = r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|warnings?)"
    counts = {what: int(number) for number, what in re.findall(pattern, output.strip().split("\n")[-1])}
    tail = output[-6000:] if code else ""
    return {
        "exit code": code,
        "counts": counts,
        "seconds": time.monotonic() - begin,
        "slow": slow,
        "not collected": _not_collected(output),
        "tail": tail,
    }


def _not_collected(output: str) -> dict[str, str]:
    found = {
        file: package for place, package in _NOT_COLLECTED.findall(output) for file in _with_gpu_tests(place)
    }
    return dict(sorted(found.items()))


def _with_gpu_tests(place: str) -> list[str]:
    """Test files at a place (a file or a folder of tests) that hold tests marked gpu, as far as their text tells."""
    found = Path(place)
    files = [found] if found.is_file() else found.rglob("test_*.py")
    marked = [f for f in files if re.search(r"mark\.gpu|every_device|\bdevices\(", f.read_text())]
    return [str(f) for f in marked]


def _save(output: Path | None, document: dict[str, Any]) -> None:
    if output is None:
        return
    lines = page(document)
    try:
        save_results(output, "python -m harness.gpu_check", lines, document)
    except (OSError, ImportError) as error:  # a bare machine may lack what describes it, git for one
        document["machine"] = f"not described: {describe_error(error)}"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(output.name + ".json").write_text(json.dumps(document, indent=1) + "\n")
        output.with_name(output.name + ".md").write_text("\n".join([*lines, "", document["machine"], ""]))


def _progress(row: Row) -> str:
    head = " ".join(part for part in (row["name"], row.get("form") or f"@ {shown_density(row)}") if part)
    if "error" in row:
        return f"{head}: {row['error']}"
    found = [
        f"{key} {row[key]:.3g}"
        for key in ("ratio", "ms", "resident ratio", "peak ratio", "counted ratio", "syncs")
        if row.get(key)
    ]
    return f"{head}: {', '.join(found)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the GPU tests, then measure operations, training steps and memory against dense."""
    parser = argparse.ArgumentParser(prog="python -m harness.gpu_check", description=main.__doc__)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--output", type=Path, help="Write OUTPUT.json and OUTPUT.md.")
    parser.add_argument(
        "--quick", action=switch, default=False, help="Tiny shapes: everything runs once, nothing is judged."
    )
    parser.add_argument("--device", default="cuda", help="Where to measure [default: cuda].")
    parser.add_argument(
        "--tests", action=switch, default=True, help="Run the tests marked gpu first; never with --quick."
    )
    parser.add_argument(
        "--slow", action=switch, default=False, help="Of the tests those marked slow too: nccl's."
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=420.0,
        help="Of all together; what is left then is not measured, and listed [default: 420].",
    )
    given = parser.parse_args(arguments)
    if why := "" if given.output is None else results_refused(given.output):
        parser.error(f"--output: {why}")
    if torch.device(given.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --quick runs everything on the CPU")
    if given.tests and not given.quick and not _TESTS.is_dir():
        parser.error(f"no {_TESTS} here: run it in a checkout, whose tests it runs, or give --no-tests")
    _check(given.output, given.quick, given.device, given.tests, given.slow, given.seconds)


def _check(output: Path | None, quick: bool, device: str, tests: bool, slow: bool, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    document: dict[str, Any] = {"quick": quick, "seconds": 0.0, "device": {}, "tests": None}
    document |= {section: [] for section in SECTIONS} | {"warnings": {}}
    if tests and not quick:
        document["tests"] = run_tests(min(_TESTS_SECONDS + slow * _SLOW_SECONDS, seconds), slow)
        _tell(f"tests: {document['tests']['counts']}, not collected: {document['tests']['not collected']}")
        _save(output, document)
    listed = jobs()
    section_of = {job: section for section, group in listed.items() for job in group}
    for job, reply in run_jobs([job for group in listed.values() for job in group], device, quick, deadline):
        document["device"] |= reply.facts
        document[section_of[job]] += reply.rows
        for text in reply.warnings:
            document["warnings"].setdefault(text, job.name)
        for row in reply.rows:
            _tell(_progress(row))
        document["seconds"] = round(seconds - (deadline - time.monotonic()), 1)
        _save(output, document)
    if missing := left_out(document):
        _tell(f"not measured, {len(missing)} in all: {'; '.join(missing)}")
    if output is None:
        print("\n".join(page(document)))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
