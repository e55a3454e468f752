"""The workflow that keeps the history of main: its script, with a stand-in for the command, in a scratch repository."""

from __future__ import annotations

import re
import subprocess
import textwrap
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
    script = script.replace("${{ github.sha }}", "sha")
    for commits in (2, 2):  # the branch begins, and gets one commit; then there is nothing new
        environment = {"GIT_AUTHOR_NAME": "n", "GIT_AUTHOR_EMAIL": "e@x", "HOME": str(checkout.parent)}
        environment |= {"GIT_COMMITTER_NAME": "n", "GIT_COMMITTER_EMAIL": "e@x", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stderr  # the failure is still told
        assert (checkout / "report.html").exists(), done.stderr
        kept = git(checkout, "log", "--format=%s", "origin/benchmark-results").split()
        assert len(kept) == commits
        assert git(checkout, "show", "origin/benchmark-results:machine") == "figures\n"


def test_no_gate_needs_a_base_that_may_not_be_there() -> None:
    """Of the first push of a branch github says that its base is 000..., and of a forced one something that is gone."""
    gates = [line for line in WORKFLOW.read_text().splitlines() if "harness gate" in line]
    assert len(gates) == 2
    assert all("--optional" in line for line in gates)
