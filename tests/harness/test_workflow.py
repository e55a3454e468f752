"""The workflow that keeps the history of main: its script, with a stand-in for the command, in a scratch repository.

And what plain asv installs, which no other test runs.
"""

from __future__ import annotations

import json
import re
import subprocess
import textwrap
import tomllib
from pathlib import Path

import pytest

WORKFLOW = Path(__file__).parents[2] / ".github" / "workflows" / "benchmarks.yml"


def step(name: str) -> tuple[str, str]:
    """Condition and script of a step that has both, by a part of its name."""
    text = WORKFLOW.read_text()
    pattern = rf"- if: ([^\n]*)\n +name: [^\n]*{name}[^\n]*\n +run: \|\n((?:          [^\n]*\n)+)"
    found = re.search(pattern, text)
    assert found is not None
    return found[1], textwrap.dedent(found[2])


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a remote, and a command harness in which one workload fails."""
    root, remote = tmp_path / "work" / "checkout", tmp_path / "remote"
    subprocess.run(["git", "init", "-q", "--bare", str(remote)], check=True)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    git(root, "commit", "-q", "--allow-empty", "-m", "one")
    git(root, "remote", "add", "origin", str(remote))
    command = root / ".venv" / "bin" / "harness"
    command.parent.mkdir(parents=True)
    command.write_text(
        "#!/bin/sh\n"
        'test "$1" = run || { touch report.html; exit 0; }\n'
        "mkdir -p .asv/results && echo figures > .asv/results/machine\n"
        "exit 1\n"
    )
    command.chmod(0o755)
    return root


def test_history_is_kept_whatever_fails(checkout: Path) -> None:
    condition, script = step("keep the figures of main")
    assert "!cancelled()" in condition  # GitHub skips a step after one that failed, unless it says so
    for commits in (2, 2):  # the branch begins, and gets one commit; then there is nothing new
        done = keep(checkout, script)
        assert done.returncode == 1, done.stderr  # the failure is still told
        assert (checkout / "report.html").exists(), done.stderr
        kept = git(checkout, "log", "--format=%s", "origin/benchmark-results").split()
        assert len(kept) == commits
        assert git(checkout, "show", "origin/benchmark-results:machine") == "figures\n"


def keep(checkout: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run the step as on a runner: nobody is known to git there, and it guesses no one."""
    settings = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "user.useConfigOnly",
        "GIT_CONFIG_VALUE_0": "true",
    }
    return subprocess.run(
        ["bash", "-e", "-c", script.replace("${{ github.sha }}", "sha")],
        cwd=checkout,
        env={"HOME": str(checkout.parent), "PATH": "/usr/bin:/bin", **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_history_begins_with_nothing_of_the_code(checkout: Path) -> None:
    keep(checkout, step("keep the figures of main")[1])
    assert git(checkout, "log", "--format=%s", "origin/benchmark-results").split() == ["sha", "history"]


@pytest.mark.parametrize("registered", [True, False])
def test_a_folder_that_was_left_is_no_obstacle(checkout: Path, registered: bool) -> None:
    """A job that was cancelled leaves the worktree; one whose checkout was made anew, a folder that git knows not."""
    script, left = step("keep the figures of main")[1], checkout.parent / "history"
    if registered:
        git(checkout, "worktree", "add", "-q", "-b", "benchmark-results", str(left))
    left.mkdir(exist_ok=True)
    (left / "half").write_text("")
    assert keep(checkout, script).returncode == 1
    assert git(checkout, "ls-tree", "--name-only", "origin/benchmark-results").split() == ["machine"]


def test_a_history_that_another_runner_wrote_on_is_continued(checkout: Path, tmp_path: Path) -> None:
    script, other = step("keep the figures of main")[1], tmp_path / "other"
    keep(checkout, script)
    remote = str(tmp_path / "remote")
    subprocess.run(["git", "clone", "-q", "-b", "benchmark-results", remote, str(other)], check=True)
    (other / "another").write_text("")
    git(other, "add", "-A")
    git(other, "commit", "-qm", "another")
    git(other, "push", "-q", "origin", "HEAD")
    (checkout / ".asv" / "results" / "old").write_text("")
    assert keep(checkout, script).returncode == 1
    assert set(git(checkout, "log", "--format=%s", "origin/benchmark-results").split()) == {
        "another",
        "sha",
        "history",
    }
    kept = git(checkout, "ls-tree", "--name-only", "origin/benchmark-results").split()
    assert set(kept) == {"machine", "another", "old"}


def test_no_gate_needs_a_base_that_may_not_be_there() -> None:
    """Of the first push of a branch github says that its base is 000..., and of a forced one something that is gone."""
    gates = [line for line in WORKFLOW.read_text().splitlines() if "harness gate" in line]
    assert len(gates) == 2
    assert all("--optional" in line for line in gates)


def test_asv_installs_what_the_packages_import_as_the_constraints_have_it() -> None:
    root = WORKFLOW.parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=;\[ ]", dependency)[0] for dependency in project["dependencies"]}
    matrix = json.loads((root / "benchmarks" / "asv.conf.json").read_text())["matrix"]["req"]
    assert needed <= matrix.keys()
    pinned = "".join((root / name).read_text() for name in ("constraints.txt", "constraints-but-torch.txt"))
    versions = dict(line.split("==") for line in pinned.split() if "==" in line)
    assert {name: matrix[name] for name in needed} == {name: [versions[name]] for name in needed}
