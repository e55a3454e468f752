"""The trial of the gate: its changes apply to the code as it is, and a planted defect is caught."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from harness.power import CHANGES, Change, _scratch, apply, judge
from harness.revisions.subject import GitError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_every_change_applies(change: Change, tmp_path: Path) -> None:
    for name, _, _ in change.edits:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copyfile(ROOT / name, tmp_path / name)
    apply(change, tmp_path)
    for name, _, _ in change.edits:
        if name.endswith(".py"):
            compile((tmp_path / name).read_text(), name, "exec")


def test_a_change_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    with pytest.raises(GitError, match="2 times"):
        apply(Change("twice", (("a.py", "x = 1", "x = 2"),)), tmp_path)


def test_there_are_as_many_as_the_project_asks_for() -> None:
    assert sum(change.caught_by is None for change in CHANGES) == 20
    assert sum(change.caught_by is not None for change in CHANGES) == 8


@pytest.mark.slow
def test_a_defect_is_caught_and_a_comment_is_not(tmp_path: Path) -> None:
    inside = subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True, check=False)
    if inside.returncode:
        pytest.skip("not a git checkout")
    base = _scratch(ROOT, tmp_path / "scratch")
    by_name = {change.name: change for change in CHANGES}
    for name, code in (("docs 0", 0), ("a benchmark disappears", 1)):
        row = judge(tmp_path / "scratch", base, by_name[name], "^propagate", 2)
        assert (row["code"], row["right"]) == (code, True), row
