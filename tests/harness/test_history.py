"""Results in asv's files: what we write, the installed asv reads; what asv and we wrote, our reader reads."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harness.cli import app
from harness.history.identity import Identity, identify
from harness.history.reader import read_file, read_results
from harness.history.run import RESULTS, commits_between
from harness.history.writer import HistoryError, discover, held, results_file, write_run
from harness.revisions.collect import Outcome
from harness.revisions.subject import GitError, ancestry
from harness.suite.registry import WORKLOADS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmarks() -> dict[str, dict[str, Any]]:
    return discover(ROOT / "benchmarks" / "benchmarks")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    run = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(tmp_path)]
    subprocess.run(["git", "init", "-q", "-b", "main", str(tmp_path)], check=True)
    for number in range(3):
        subprocess.run([*run, "commit", "-q", "--allow-empty", "-m", f"{number}"], check=True)
    return tmp_path


def spmm(value: float) -> dict[str, Outcome]:
    return {"spmm-2000x300-b64": Outcome(figures={"csr@0.5": {"macs": value}, "dense": {"macs": 9.0}})}


def values(path: Path, metric: str = "macs") -> dict[tuple, float | None]:
    return {
        record.params: record.value
        for record in read_file(path).records
        if record.benchmark.endswith(f".track_{metric}")
        and not (record.value is not None and math.isnan(record.value))
    }


def test_every_workload_and_form_is_a_benchmark(benchmarks: dict[str, dict[str, Any]]) -> None:
    found = {eval(name) for b in benchmarks.values() for name in b["params"][0]}
    assert found == set(WORKLOADS)
    assert all(b["version"].startswith("1") and b["unit"] for b in benchmarks.values())
    versions = {b["version"] for name, b in benchmarks.items() if name.endswith("time_vs_frozen")}
    assert versions == {"1-frozen2"}
    assert len({b["setup_cache_key"] for b in benchmarks.values()}) == len(
        {name.rpartition(".")[0] for name in benchmarks}
    )


def test_what_is_written_is_read_by_asv_and_by_us(house: Path, benchmarks: dict[str, dict[str, Any]]) -> None:
    from asv.machine import Machine
    from asv.results import Results

    results, identity = house / "results", identify(1)
    commit = commits_between(house, "HEAD")[0]
    failed = {"lightgcn-train": Outcome(error="ValueError")}
    path = write_run(results, house, commit, identity, benchmarks, spmm(7.0) | failed)
    assert path == results_file(results, commit, identity)
    asvs = Results.load(str(path), machine_name=identity.name)
    name = "bench_operations.OperationsSmall.track_macs"
    assert 7.0 in asvs.get_result_value(name, benchmarks[name]["params"])
    machine = json.loads((results / identity.name / "machine.json").read_text())
    assert machine.keys() - {"version"} == {name for name, _ in Machine.fields}
    assert values(path)[("spmm-2000x300-b64", "csr@0.5")] == 7.0
    assert values(path)[("lightgcn-train", "dense")] is None
    runs, problems = read_results(results)
    assert (problems, [run.commit for run in runs]) == ([], [commit])
    assert runs[0].requirements.keys() >= {"torch", "numba"}


def test_a_second_run_adds_and_an_interrupted_one_harms_nothing(
    house: Path, benchmarks: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from asv.results import Results

    results, identity = house / "results", identify(1)
    commit = commits_between(house, "HEAD")[0]
    write_run(results, house, commit, identity, benchmarks, spmm(7.0))
    other = {"propagate-5000x64": Outcome(figures={"csr": {"macs": 3.0}})}
    path = write_run(results, house, commit, identity, benchmarks, other)
    assert values(path)[("spmm-2000x300-b64", "csr@0.5")] == 7.0
    assert values(path)[("propagate-5000x64", "csr")] == 3.0
    before = path.read_bytes()

    def dies(self: Results, folder: str) -> None:
        (Path(folder) / "half").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(Results, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        write_run(results, house, commit, identity, benchmarks, spmm(8.0))
    assert path.read_bytes() == before
    assert read_results(results)[1] == []
    assert not list(results.glob(".new-*"))


def test_damaged_files_are_named_and_skipped(house: Path, benchmarks: dict[str, dict[str, Any]]) -> None:
    results, identity = house / "results", identify(1)
    commits = commits_between(house, "HEAD~2..HEAD")
    assert len(commits) == 2
    good = write_run(results, house, commits[0], identity, benchmarks, spmm(7.0))
    bad = write_run(results, house, commits[1], identity, benchmarks, spmm(8.0))
    whole = json.loads(bad.read_text())
    damages: list[str] = [
        bad.read_text()[:-200],
        "[]",
        json.dumps({**whole, "version": 1}),
        json.dumps({key: value for key, value in whole.items() if key != "commit_hash"}),
        json.dumps({**whole, "results": {"x": [[1.0], [["a"], ["b", "c"]]]}}),
        json.dumps({**whole, "results": {"x": [["text"], [["a"]]]}}),
        json.dumps({**whole, "results": {"x": 3}}),
    ]
    for text in damages:
        bad.write_text(text)
        runs, problems = read_results(results)
        assert [run.path for run in runs] == [good]
        assert len(problems) == 1
        assert bad.name in problems[0]


def test_machines_are_kept_apart(house: Path, benchmarks: dict[str, dict[str, Any]]) -> None:
    results, one = house / "results", identify(1)
    two = dataclasses.replace(one, threads=2)
    assert one.name != two.name
    for field in dataclasses.fields(Identity):
        value = getattr(one, field.name)
        other = dataclasses.replace(one, **{field.name: value + 1 if isinstance(value, int) else value + "x"})
        assert other.name != one.name, field.name
    commit = commits_between(house, "HEAD")[0]
    path = write_run(results, house, commit, one, benchmarks, spmm(7.0))
    write_run(results, house, commit, two, benchmarks, spmm(8.0))
    assert [run.machine for run in read_results(results, two.name)[0]] == [two.name]
    # A file that was copied between machines' folders is not believed.
    stray = results / two.name / f"copied-{path.name}"
    stray.write_bytes(path.read_bytes())
    runs, problems = read_results(results)
    assert len(runs) == 2
    assert "of the machine" in problems[0]


@pytest.mark.parametrize("name", ["SPARSECORE_BACKEND", "THP_MEM_ALLOC_ENABLE"])
def test_settings_of_the_environment_are_part_of_a_machine(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    plain = identify(1)
    monkeypatch.setenv(name, "1")
    assert identify(1).name != plain.name


def test_a_setting_that_is_not_set_leaves_names_as_they_were() -> None:
    words = {f.name: "x" for f in dataclasses.fields(Identity) if f.default is dataclasses.MISSING}
    numbers = {"cores": 2, "memory_gib": 8, "threads": 1, "frozen": 2}
    assert Identity(**{**words, **numbers}).name == "x-2c-torchx-t1-d897dba7"


def test_a_series_survives_a_rename_of_its_file_and_an_edit_of_a_docstring(
    benchmarks: dict[str, dict[str, Any]],
) -> None:
    """asv's default version is a hash of the source; ours is set by hand."""
    sources = {name: b["code"] for name, b in benchmarks.items()}
    assert all(b["version"] not in sources[name] for name, b in benchmarks.items())
    assert {b["version"] for b in benchmarks.values()} == {"1", "1-frozen2"}


def test_order_of_parameters_does_not_matter(house: Path, benchmarks: dict[str, dict[str, Any]]) -> None:
    results, identity = house / "results", identify(1)
    commit = commits_between(house, "HEAD")[0]
    turned = {name: {**b, "params": [p[::-1] for p in b["params"]]} for name, b in benchmarks.items()}
    first = values(write_run(results, house, commit, identity, benchmarks, spmm(7.0)))
    again = values(write_run(house / "other", house, commit, identity, turned, spmm(7.0)))
    assert first == again


def test_bad_bench_files_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "bench_x.py").write_text("raise RuntimeError('broken bench')\n")
    with pytest.raises(HistoryError, match="broken bench"):
        discover(folder)


@pytest.fixture
def kept(house: Path, benchmarks: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a package, in which measuring takes no time: `measured` is written to a file there."""
    (house / "sparsecore").mkdir()
    (house / "sparsecore" / "__init__.py").write_text("")
    (house / ".gitignore").write_text(".asv\n.harness\nmeasured\n")
    run = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(house)]
    subprocess.run([*run, "add", "-A"], check=True)
    subprocess.run([*run, "commit", "-qm", "a package"], check=True)

    def collect(subject: object, names: list[str], **options: object) -> dict[str, Outcome]:
        with (house / "measured").open("a") as file:
            file.write(f"{' '.join(names)}\n")
        figures = {"macs": 1.0} | ({"seconds": 0.5} if options["seconds"] else {})
        return {name: Outcome(figures={"csr@0.5": figures, "csr": figures}) for name in names}

    monkeypatch.setattr("harness.history.run.collect", collect)
    monkeypatch.setattr("harness.history.run.discover", lambda folder: benchmarks)
    monkeypatch.chdir(house)
    return house


def command(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, arguments)
    return found.exit_code, found.output.replace("\n", " ")


SPMM, PROPAGATE = "spmm-2000x300-b64", "propagate-5000x64"


def test_backfill_measures_what_a_file_lacks(kept: Path) -> None:
    assert command("backfill", "HEAD", "--only", SPMM)[0] == 0
    assert command("backfill", "HEAD", "--only", f"^({SPMM}|{PROPAGATE})$")[0] == 0
    assert (kept / "measured").read_text().splitlines() == [SPMM, PROPAGATE]
    code, output = command("backfill", "HEAD", "--only", f"^({SPMM}|{PROPAGATE})$")
    assert (code, "has figures already" in output) == (0, True)
    command("backfill", "HEAD", "--again", "--only", SPMM)
    assert (kept / "measured").read_text().splitlines() == [SPMM, PROPAGATE, SPMM]
    (path,) = (kept / RESULTS).glob("*/*-*.json")
    assert held(path) == {SPMM: {"macs", "seconds"}, PROPAGATE: {"macs", "seconds"}}


def test_what_failed_is_measured_again(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failing = {SPMM: Outcome(error="ValueError")}
        patch.setattr("harness.history.run.collect", lambda *names, **options: failing)
        assert command("backfill", "HEAD", "--only", SPMM)[0] == 1
    assert command("backfill", "HEAD", "--only", SPMM)[0] == 0
    assert (kept / "measured").read_text().splitlines() == [SPMM]


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"version": 2}'])
def test_a_damaged_file_costs_no_measurement(damage: str, kept: Path) -> None:
    assert command("run", "--only", SPMM)[0] == 0
    (path,) = (kept / RESULTS).glob("*/*-*.json")
    path.write_text(damage)
    with pytest.raises(HistoryError, match="not a result file"):
        held(path)
    ended = CliRunner().invoke(app, ["report"])
    assert isinstance(ended.exception, HistoryError)
    assert "none of the 1 result files" in str(ended.exception)
    code, output = command("backfill", "HEAD", "--only", SPMM)
    assert code == 0
    assert f"set aside as {path.name}.damaged" in output
    assert path.with_name(f"{path.name}.damaged").read_text() == damage
    assert held(path).keys() == {SPMM}
    assert command("report")[0] == 0


def test_what_keeps_figures_from_being_written_is_told_before_they_are_measured(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path) -> None:
        raise HistoryError("a bench file does not import")

    monkeypatch.setattr("harness.history.run.discover", broken)
    assert isinstance(CliRunner().invoke(app, ["run", "--only", SPMM]).exception, HistoryError)
    assert not (kept / "measured").exists()


@pytest.mark.parametrize("machine", [True, False])
def test_that_results_cannot_be_written_is_told_before_they_are_measured(machine: bool, kept: Path) -> None:
    place = kept / RESULTS / identify(1).name if machine else kept / RESULTS
    place.parent.mkdir(parents=True)
    place.write_text("not a folder")
    found = CliRunner().invoke(app, ["run", "--only", SPMM])
    assert isinstance(found.exception, HistoryError)
    assert f"{place}: results cannot be written there" in str(found.exception)
    assert not (kept / "measured").exists()


def test_what_was_not_measured_stays(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("run", "--only", SPMM)[0] == 0
    (path,) = (kept / RESULTS).glob("*/*-*.json")
    there = values(path), values(path, "seconds")
    assert all(there)
    assert command("run", "--only", SPMM, "--seconds", "0")[0] == 0  # counts, and no times
    for outcome in (Outcome(missing="not in SPARSECORE_DATA"), Outcome(error="MemoryError")):
        with monkeypatch.context() as patch:
            patch.setattr("harness.history.run.collect", lambda *names, one=outcome, **options: {SPMM: one})
            assert command("run", "--only", SPMM)[0] == (outcome.error is not None)
    assert (values(path), values(path, "seconds")) == there


def test_times_are_measured_where_only_counts_are_kept(kept: Path) -> None:
    for seconds in ("0", "0", "0.5", "0.5"):
        assert command("backfill", "HEAD", "--only", SPMM, "--seconds", seconds)[0] == 0
    assert (kept / "measured").read_text().splitlines() == [SPMM, SPMM]


def test_an_interrupt_keeps_what_was_measured(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(
        subject: object, names: list[str], *, into: dict[str, Outcome], **options: object
    ) -> None:
        into |= spmm(7.0)
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.history.run.collect", interrupted)
    code, output = command("run", "--only", f"^({SPMM}|{PROPAGATE})$")
    assert code == 130
    assert "interrupted" in output
    (path,) = (kept / RESULTS).glob("*/*-*.json")
    assert values(path)[(SPMM, "csr@0.5")] == 7.0


def test_a_folder_with_other_things_is_not_replaced_by_a_site(kept: Path, tmp_path: Path) -> None:
    assert command("run", "--only", SPMM)[0] == 0
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    for place, why in ((mine, "holds other things"), (mine / "thesis.txt", "is a file")):
        found = CliRunner().invoke(app, ["publish", "--output", str(place)])
        assert isinstance(found.exception, HistoryError)
        assert why in str(found.exception)
    assert (mine / "thesis.txt").read_text() == "precious"


def test_commits_of_one_second_are_in_the_order_of_their_ancestry(
    house: Path, benchmarks: dict[str, dict[str, Any]]
) -> None:
    when = {"GIT_AUTHOR_DATE": "2026-11-28T12:00:00Z", "GIT_COMMITTER_DATE": "2026-11-28T12:00:00Z"}
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(house)]
    commits = []
    for number in range(6):
        subprocess.run(
            [*git, "commit", "-q", "--allow-empty", "-m", f"{number}"], check=True, env={**os.environ, **when}
        )
        commits += commits_between(house, "HEAD")
        write_run(house / "results", house, commits[-1], identify(1), benchmarks, spmm(number + 1.0))
    runs, _ = read_results(house / "results", ancestry=ancestry(house))
    assert [run.commit for run in runs] == commits


def test_the_report_is_of_the_current_commit_and_its_ancestors(kept: Path) -> None:
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(kept)]

    def commit() -> str:
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
        return commits_between(kept, "HEAD")[0][:10]

    subprocess.run([*git, "checkout", "-q", "-b", "side"], check=True)
    later = {"GIT_COMMITTER_DATE": "2035-01-01T12:00:00Z"}  # the newest of all by its date
    subprocess.run(
        [*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True, env={**os.environ, **later}
    )
    side = commits_between(kept, "HEAD")[0][:10]
    assert command("run", "--only", SPMM)[0] == 0
    subprocess.run([*git, "checkout", "-q", "main"], check=True)
    ended = CliRunner().invoke(app, ["report"])
    assert isinstance(ended.exception, HistoryError)
    assert "results of 1 commits" in str(ended.exception)
    first = commit()
    assert command("run", "--only", SPMM)[0] == 0
    code, output = command("report")
    assert (code, output.startswith(f"{first}: nothing older")) == (0, True)
    assert command("report", "--commit", "side")[1].startswith(f"{side}: nothing older")
    second = commit()
    code, output = command("report")
    assert (code, output.startswith(f"{second} is not measured, its nearest ancestor that is: {first}")) == (
        0,
        True,
    )
    assert command("report", "--exit-code")[0] == 2
    assert command("report", "--exit-code", "--commit", first)[0] == 0


@pytest.mark.parametrize("folder", ["sparsecore", "harness", "benchmarks"])
def test_figures_of_what_was_not_committed_are_not_kept(folder: str, kept: Path) -> None:
    if folder == "harness":
        shutil.copytree(
            ROOT / "harness", kept / folder, ignore=shutil.ignore_patterns("__pycache__", "new.py")
        )
        (kept / folder / "notes.txt").write_text("")
    subprocess.run(["git", "-C", str(kept), "config", "status.showUntrackedFiles", "no"], check=True)
    (kept / folder).mkdir(exist_ok=True)
    if folder != "harness":
        (kept / folder / "new.py").write_text("")
    code, output = command("run", "--only", SPMM)
    assert (code, "nothing was kept" in output) == (0, True)
    assert not (kept / RESULTS).exists()
    if folder == "harness":
        assert isinstance(CliRunner().invoke(app, ["backfill", "HEAD"]).exception, HistoryError)


def test_the_suite_of_another_checkout_does_not_measure(kept: Path) -> None:
    (kept / "harness").mkdir()
    (kept / "harness" / "suite.py").write_text("")
    for arguments in (["run"], ["gate", "--base", "HEAD"], ["backfill", "HEAD"]):
        found = CliRunner().invoke(app, arguments)
        assert isinstance(found.exception, GitError)
        assert "install this checkout" in str(found.exception)
    assert not (kept / "measured").exists()
