"""Revisions as folders, and the processes that measure them."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import harness
import sparsecore
from harness.gate.verdict import last_line
from harness.revisions.collect import Outcome, collect
from harness.revisions.subject import GitError, Subject, commit_of, extract, git, repository, snapshot

ROOT = Path(__file__).parents[2]
HARNESS = Path(harness.__file__).parents[1]
HOME = Path(sparsecore.__file__).parents[1]  # of the package that is installed


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A repository with two commits; kernels are the same in both."""
    root = tmp_path / "house"
    kernels = root / "sparsecore" / "backends" / "numba"
    kernels.mkdir(parents=True)
    (kernels / "k.py").write_text("k = 1\n")
    (root / "sparsecore" / "__init__.py").write_text("v = 1\n")
    (root / ".gitignore").write_text("__pycache__/\n*.log\n")
    run = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(root)]
    subprocess.run(["git", "init", "-q", "-b", "main", str(root)], check=True)
    for version in (1, 2):
        (root / "sparsecore" / "__init__.py").write_text(f"v = {version}\n")
        (root / "notes.md").write_text(f"{version}\n")
        subprocess.run([*run, "add", "-A"], check=True)
        subprocess.run([*run, "commit", "-qm", f"{version}"], check=True)
    return root


def test_revisions_are_unpacked_and_share_compiled_kernels(house: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    old, new = (extract(house, revision, store) for revision in ("HEAD~1", "HEAD"))
    assert (old.path / "sparsecore" / "__init__.py").read_text() == "v = 1\n"
    assert (new.path / "sparsecore" / "__init__.py").read_text() == "v = 2\n"
    assert not (new.path / "notes.md").exists()
    assert old.digest != new.digest
    places = [(side.path / "sparsecore" / "backends" / "numba").resolve() for side in (old, new)]
    assert places[0] == places[1]
    assert (places[0] / "k.py").read_text() == "k = 1\n"
    assert extract(house, new.revision[:8], store).path == new.path


def test_a_commit_that_a_shallow_clone_lacks(house: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--depth", "1", house.as_uri(), str(clone)], check=True)
    with pytest.raises(GitError, match=r"'HEAD~1'; this clone is shallow, git fetch --unshallow"):
        commit_of(clone, "HEAD~1")
    with pytest.raises(GitError, match=r"'HEAD~9'; see git log"):
        commit_of(house, "HEAD~9")


def test_the_working_tree_counts_as_the_commit_until_something_differs(house: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    committed, tree = extract(house, "HEAD", store), snapshot(house, store)
    assert (tree.digest, tree.revision, tree.label) == (committed.digest, committed.revision, "working tree")
    (house / "notes.md").write_text("not measured\n")
    (house / "sparsecore" / "run.log").write_text("ignored\n")
    assert snapshot(house, store).digest == committed.digest
    (house / "sparsecore" / "more.py").write_text("")
    changed = snapshot(house, store)
    assert changed.digest != committed.digest
    assert changed.revision.endswith("+")
    (house / "sparsecore" / "more.py").unlink()
    (house / "sparsecore" / "__init__.py").unlink()  # deleted, and not yet said to git
    assert not (snapshot(house, store).path / "sparsecore" / "__init__.py").exists()


def test_what_git_refuses_is_said(house: Path, tmp_path: Path) -> None:
    with pytest.raises(GitError, match="no commit is called 'nowhere'"):
        extract(house, "nowhere", tmp_path)
    with pytest.raises(GitError, match="no commit"):
        extract(house, "", tmp_path)
    with pytest.raises(GitError, match="not a git repository"):
        repository(tmp_path)
    subprocess.run(["git", "-C", str(house), "rm", "-rqf", "sparsecore"], check=True)
    commit = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(house), "commit", "-qm", "gone"]
    subprocess.run(commit, check=True)
    with pytest.raises(GitError, match="nothing to measure"):
        extract(house, "HEAD", tmp_path)
    assert git(house, "rev-parse", "--is-inside-work-tree") == "true"


def test_constants_that_are_compiled_in_part_the_kernels(house: Path, tmp_path: Path) -> None:
    store, kernels = tmp_path / "store", Path("sparsecore", "backends", "numba")
    (house / "sparsecore" / "sizes.py").write_text("BLOCK = 1\n")
    (house / "sparsecore" / "other.py").write_text("")
    (house / kernels / "k.py").write_text("from sparsecore.sizes import BLOCK\n")
    before = snapshot(house, store)
    (house / "sparsecore" / "other.py").write_text("x = 1\n")
    same = snapshot(house, store)
    (house / "sparsecore" / "sizes.py").write_text("BLOCK = 2\n")
    after = snapshot(house, store)
    places = [(side.path / kernels).resolve() for side in (before, same, after)]
    assert places[0] == places[1] != places[2]


def test_kernels_begin_with_what_the_installed_package_has_compiled(house: Path, tmp_path: Path) -> None:
    """Where they are the same, of the same files' times: numba looks at those."""
    kernels, installed = Path("sparsecore", "backends", "numba"), tmp_path / "site"
    shutil.copytree(house / "sparsecore", installed / "sparsecore")
    cache = installed / kernels / "__pycache__"
    cache.mkdir()
    (cache / "k.f-1.py311.nbi").write_bytes(b"index")
    (cache / "k.cpython-311.pyc").write_bytes(b"")
    os.utime(installed / kernels / "k.py", ns=(1, 10**18 + 7))
    code = (
        "import sys\nfrom pathlib import Path\nfrom harness.revisions.subject import snapshot\n"
        "side = snapshot(Path(sys.argv[1]), Path(sys.argv[2]))\nprint((side.path / sys.argv[3]).resolve())"
    )

    def place(store: str) -> Path:
        command = [sys.executable, "-P", "-c", code, str(house), str(tmp_path / store), str(kernels)]
        path = os.pathsep.join([str(installed), str(HARNESS)])
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
        )
        return Path(done.stdout.strip())

    same = place("same")
    assert [path.name for path in (same / "__pycache__").iterdir()] == ["k.f-1.py311.nbi"]
    assert (same / "k.py").stat().st_mtime_ns == 10**18 + 7
    (house / kernels / "k.py").write_text("k = 3\n")
    assert not (place("other") / "__pycache__").exists()


def test_constants_of_the_kernels_are_defined_where_they_are_imported_from() -> None:
    """Otherwise a change of one would not be seen, and old compiled code would be measured."""
    folder = ROOT / "sparsecore" / "backends" / "numba"
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if not module.startswith("sparsecore.") or module.startswith("sparsecore.backends"):
                continue
            tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
            imported = {
                alias.asname or alias.name
                for other in tree.body
                if isinstance(other, ast.ImportFrom | ast.Import)
                for alias in other.names
            }
            assert not imported & {alias.name for alias in node.names}, f"{path.name}: {module}"


def test_a_process_that_measures(tmp_path: Path) -> None:
    here = Subject("here", "0", HOME, "0")
    begun: list[str] = []
    found = collect(here, ["propagate-5000x64", "no-such-work"], seconds=0.01, progress=begun.append)
    assert begun == ["propagate-5000x64", "no-such-work"]
    figures = found["propagate-5000x64"].figures
    assert figures["csr"]["macs"] > 0
    assert {"time_vs_frozen", "time_vs_dense", "noise"} <= set(figures["csr"])
    assert "KeyError" in (found["no-such-work"].error or "")


def test_a_process_that_fails(tmp_path: Path) -> None:
    package = tmp_path / "sparsecore"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('not today')\n")
    broken = Subject("broken", "0", tmp_path, "0")
    found = collect(broken, ["propagate-5000x64", "import"])
    shown = last_line(found["import"].error or "")
    assert shown == "the measuring process ended with 1: not today"
    assert all("not today" in (found[name].error or "") for name in ("propagate-5000x64", "import"))
    # Another sparsecore than the one that was meant is never measured.
    found = collect(Subject("elsewhere", "0", tmp_path / "empty", "0"), ["import"])
    assert "was to come from" in (found["import"].error or "")
    here = Subject("here", "0", HOME, "0")
    found = collect(here, ["propagate-5000x64"], timeout=0.3)
    assert "longer than 0.3 s" in last_line(found["propagate-5000x64"].error or "")


def worker(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A measuring process that does no more than `body`, which may call tell(event) and find the names in `works`."""
    program = (
        "import json, os, sys, time\n"
        "request = json.load(open(sys.argv[-1]))\n"
        "works, output = request['workloads'], open(request['output'], 'a')\n"
        "def tell(**event): print(json.dumps(event), file=output, flush=True)\n"
    )
    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return start([command[0], "-c", program + body, command[-1]], **options)

    monkeypatch.setattr("harness.revisions.collect.subprocess.Popen", popen)


def test_the_limit_is_a_workloads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = "60 if name == 'hangs' else 0.9"
    worker(
        monkeypatch,
        f"for name in works: tell(start=name); time.sleep({seconds}); tell(name=name, figures={{}})",
    )
    found = collect(Subject("x", "0", HOME, "0"), ["a", "b", "c", "hangs", "d"], timeout=2.5)
    assert {name for name, outcome in found.items() if outcome.error} == {"hangs"}
    assert "longer than 2.5 s" in (found["hangs"].error or "")


def test_a_killed_process_is_told_in_the_line_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    worker(
        monkeypatch,
        "tell(start=works[0]); print('a warning', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)",
    )
    found = collect(Subject("x", "0", HOME, "0"), ["a"])
    assert "was killed by SIGKILL" in last_line(found["a"].error or "")
    assert "where memory runs out: a warning" in last_line(found["a"].error or "")


def test_nothing_begins_once_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    worker(
        monkeypatch,
        "for name in works: tell(start=name); time.sleep(60 * (name == 'b')); tell(name=name, figures={})",
    )
    stop = threading.Event()
    found: dict[str, Outcome] = {}
    begun: list[str] = []

    def progress(name: str) -> None:
        begun.append(name)
        if name == "b":
            stop.set()

    collect(Subject("x", "0", HOME, "0"), ["a", "b", "c"], progress=progress, stop=stop, into=found)
    assert begun == ["a", "b"]
    assert found == {"a": Outcome(figures={})}
