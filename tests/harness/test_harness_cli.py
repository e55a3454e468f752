"""The command, the doctor, plain benchmarks, and the measuring API."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import harness.cli
import sparsecore
from harness.cli import app
from harness.doctor import examine
from harness.gate.run import Verdict
from harness.revisions.subject import Subject
from harness.suite.registry import WORKLOADS
from sparsecore.errors import SparsecoreError

ROOT = Path(__file__).parents[2]


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "harness.cli", *arguments]
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def functions() -> dict:
    dense, sparse = nn.Linear(60, 40), sparsecore.SparseLinear(60, 40, density=0.25)
    x = torch.ones(8, 60)
    return {"dense": lambda: dense(x), "sparse": lambda: sparse(x)}


def test_compare(functions: dict) -> None:
    found = harness.compare(functions, seconds=0.05)
    assert (found["dense"].macs, found["sparse"].macs) == (8 * 2400, 8 * 600)
    assert found["dense"].ratio == found["dense"].low == found["dense"].high == 1.0
    assert 0 < found["sparse"].low <= found["sparse"].ratio * 1.0001
    assert found["sparse"].peak_bytes >= 4 * 8 * 40
    assert [line.split()[0] for line in str(found).splitlines()[1:]] == ["dense", "sparse"]
    assert harness.compare(functions, baseline="sparse", seconds=0.05)["sparse"].ratio == 1.0


def test_compare_refuses(functions: dict) -> None:
    with pytest.raises(SparsecoreError, match="at least two"):
        harness.compare({"dense": functions["dense"]})
    with pytest.raises(SparsecoreError, match="one of dense, sparse"):
        harness.compare(functions, baseline="masked")
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = harness.nothing_like_it


def test_the_fixture_shows_its_tables(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "import torch\n"
        "def test_it(compare):\n"
        "    x = torch.ones(30, 30)\n"
        "    found = compare({'dense': lambda: x @ x, 'half': lambda: x[:15] @ x}, seconds=0.02)\n"
        "    assert found['half'].macs * 2 == found['dense'].macs\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "comparisons" in done.stdout
    assert "time of dense" in done.stdout


def test_doctor() -> None:
    checks = {check.what: check for check in examine()}
    assert {"load", "memory", "threads", "clock", "libraries", "vector units", "compiled kernels"} <= set(
        checks
    )
    assert checks["libraries"].status == "ok"
    assert all(check.advice for check in checks.values() if check.status != "ok")
    many = {check.what: check for check in examine(threads=10_000)}
    assert many["threads"].status == "bad"
    found = CliRunner().invoke(app, ["doctor"])
    assert found.exit_code in (0, 1)
    assert "vector units" in found.output


def test_list() -> None:
    found = CliRunner().invoke(app, ["list", "--only", "^gather"])
    assert found.exit_code == 0
    assert "gather_dot" in found.output.replace("\n", "")
    assert "multvae" not in found.output


def test_names_in_tables_are_whole_where_nobody_looks_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = CliRunner().invoke(app, ["list"]).output.splitlines()
    assert {line.split()[0] for line in lines if line.strip()} >= set(WORKLOADS)
    monkeypatch.setenv("COLUMNS", "70")
    assert max(map(len, CliRunner().invoke(app, ["list"]).output.splitlines())) <= 70


def test_settings_that_change_what_is_measured_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    side = Subject("x", "x", tmp_path, "x")
    monkeypatch.setattr("harness.gate.run.gate", lambda *given: Verdict(side, side))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SPARSECORE_SIMD", "portable")
    monkeypatch.delenv("SPARSECORE_BACKEND", raising=False)
    page, document = tmp_path / "page.md", tmp_path / "found.json"
    found = CliRunner().invoke(
        app, ["gate", "--base", "HEAD", "--markdown", str(page), "--json", str(document)]
    )
    assert found.exit_code == 0, found.output
    assert "SPARSECORE_SIMD=portable is set" in found.output
    assert "SPARSECORE_SIMD portable" in page.read_text()
    machine = json.loads(document.read_text())["machine"]
    assert (machine["SPARSECORE_SIMD"], "SPARSECORE_BACKEND" in machine) == ("portable", False)


def test_publish_has_no_option_that_does_nothing() -> None:
    found = CliRunner().invoke(app, ["publish", "--threads", "2"])
    assert found.exit_code == 2
    assert "No such option" in found.output


def test_plain_benchmarks(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    program = [sys.executable, "-m", "benchmarks", "^propagate", "--seconds", "0.02", "--json", str(output)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "propagate-5000x64" in done.stdout
    assert json.loads(output.read_text())["propagate-5000x64"]["csr"]["time_vs_dense"] > 0
    done = subprocess.run(
        [*program[:3], "nothing like it"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "harness list" in done.stderr


def test_errors_are_one_line(tmp_path: Path) -> None:
    done = command("gate", "--base", "HEAD", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "not a git repository" in done.stderr
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    done = command("report", cwd=tmp_path)
    assert done.returncode == 2
    assert "harness run" in done.stderr
    done = command("publish", cwd=tmp_path)
    assert done.returncode == 2
    assert "harness run" in done.stderr


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(sys, "argv", ["harness", "doctor"])
    with pytest.raises(SystemExit) as ended:
        harness.cli.main()
    assert ended.value.code == 2
    assert 'pip install "sparsecore[bench]"' in capsys.readouterr().err


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A repository of our packages with one commit, and links to what measures."""
    root = tmp_path / "house"
    root.mkdir()
    for name in ("sparsecore", "recsys", "benchmarks"):
        files = subprocess.run(
            ["git", "ls-files", name], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if files.returncode:
            pytest.skip("not a git checkout")
        for file in files.stdout.split():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes((ROOT / file).read_bytes())
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(root)]
    subprocess.run(["git", "init", "-q", "-b", "main", str(root)], check=True)
    (root / ".gitignore").write_text("__pycache__/\n.harness/\n.asv/\n")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    return root


@pytest.mark.slow
def test_gate_run_and_report(house: Path) -> None:
    only = ["--only", "^propagate"]
    same = command("gate", "--base", "HEAD", *only, cwd=house)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "same sources" in same.stdout.replace("\n", " ")

    first = command("run", "--seconds", "0.02", *only, cwd=house)
    assert first.returncode == 0, first.stdout + first.stderr
    kept = command("report", "--html", "page.html", cwd=house)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    assert "propagate-5000x64" in (house / "page.html").read_text()
    assert "has figures already" in command("backfill", "HEAD", *only, cwd=house).stdout

    # One more hop than was asked for: its multiply-adds tell.
    graph = house / "sparsecore" / "nn" / "graph.py"
    text = graph.read_text()
    hop = "return ops.propagate(*self.arrays(), x)"
    assert text.count(hop) == 1
    graph.write_text(text.replace(hop, "_ = ops.propagate(*self.arrays(), x)\n        " + hop))
    broken = command("gate", "--base", "HEAD", "--counters", "--json", "found.json", *only, cwd=house)
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert "REGRESSION" in broken.stdout
    document = json.loads((house / "found.json").read_text())
    assert document["exit_code"] == 1
    dirty = command("run", "--seconds", "0", *only, cwd=house)
    assert "nothing was kept" in dirty.stderr
