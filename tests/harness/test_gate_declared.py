"""What a suite lost between two revisions, by what both declare."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import harness
from harness.gate import declared
from harness.gate.declared import Declared, missing
from harness.gate.declared import suite_of as asked
from harness.gate.expectations import Allowance
from harness.gate.run import Plan, compare
from harness.gate.verdict import Exit, exit_code
from harness.revisions.subject import Subject
from harness.suite.asv import GROUPS
from harness.suite.registry import WORKLOADS
from harness.suite.workload import METRICS

NAME = "propagate-5000x64"


def ours() -> dict[str, Declared]:
    return {
        name: {
            "forms": list(work.forms),
            "metrics": [m for m in GROUPS[work.group] if METRICS[m].kind != "report"],
            "quick": work.quick,
        }
        for name, work in WORKLOADS.items()
    }


def test_nothing_is_missing_of_the_same_suite() -> None:
    assert list(missing(ours(), [])) == []


def test_a_workload_a_form_and_a_figure_that_are_gone_fail() -> None:
    base = ours()
    base["old-work"] = {"forms": ["dense"], "metrics": ["macs"], "quick": True}
    base[NAME]["forms"].append("csr@0.01")
    base[NAME]["metrics"].append("cache_misses")
    found = list(missing(base, []))
    assert [(f.status, f.workload, f.form, f.metric) for f in found] == [
        ("regression", NAME, "csr@0.01", "*"),
        ("regression", NAME, "*", "cache_misses"),
        ("regression", "old-work", "*", "*"),
    ]
    assert "expectations.toml" in found[0].why
    allowed = [Allowance(workload=NAME, form="csr@*", removed=True, reason="nobody stores so few")]
    assert [f.status for f in missing(base, allowed)] == ["allowed", "regression", "regression"]


def test_a_figure_that_only_informs_now_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ours()
    monkeypatch.setitem(METRICS, "macs", METRICS["seconds"])
    assert {(f.form, f.metric) for f in missing({NAME: base[NAME]}, [])} == {("*", "macs")}


def suite_of(root: Path, registry: str) -> None:
    """Commit a repository whose harness has a suite of one workload."""
    files = {
        "sparsecore/__init__.py": "",
        "harness/__init__.py": "",
        "harness/suite/__init__.py": "",
        "harness/suite/workload.py": (
            "from types import SimpleNamespace as M\n"
            "METRICS = {'macs': M(kind='count'), 'joules': M(kind='count'), 'seconds': M(kind='report')}\n"
        ),
        "harness/suite/asv.py": "GROUPS = {'operation': ('macs', 'joules', 'seconds')}\n",
        "harness/suite/registry.py": registry,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(root)]
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)


def test_the_bases_own_suite_is_asked(tmp_path: Path) -> None:
    root = tmp_path / "house"
    suite_of(
        root,
        "from types import SimpleNamespace as W\n"
        f"WORKLOADS = {{'{NAME}': W(group='operation', forms=('dense', 'old'))}}\n",
    )
    suite = asked(root, "HEAD", tmp_path / "store")
    found = suite.dropped([])
    assert suite.differs
    assert [(f.status, f.form, f.metric) for f in found] == [
        ("regression", "old", "*"),
        ("regression", "*", "joules"),
    ]
    same = Subject("base", "0", tmp_path, "same")
    verdict = compare(same, same, Plan([]), dropped=found)  # also where there is nothing to measure
    assert verdict.same
    assert exit_code(verdict.findings) == Exit.regression


def test_a_suite_that_does_not_import_is_told(tmp_path: Path) -> None:
    root = tmp_path / "house"
    suite_of(root, "raise RuntimeError('broken suite')\n")
    found = asked(root, "HEAD", tmp_path / "store").dropped([])
    assert [f.status for f in found] == ["inconclusive"]
    assert "RuntimeError: broken suite" in found[0].why
    subprocess.run(["git", "-C", str(root), "rm", "-rqf", "harness"], check=True)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(root)]
    subprocess.run([*git, "commit", "-qm", "before there was a suite"], check=True)
    assert asked(root, "HEAD", tmp_path / "store").dropped([]) == []


def test_a_workload_that_a_quick_run_no_longer_takes_is_gone() -> None:
    base = ours()
    slow = next(name for name, work in WORKLOADS.items() if not work.quick)
    base[slow]["quick"] = True
    assert [(f.status, f.workload, f.why[:43]) for f in missing(base, [])] == [
        ("regression", slow, "the suite has no such quick workload any mo")
    ]


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("kernel_forms.py", True),
        ("graph_forms.py", True),
        ("operands.py", True),
        ("gpu_steps.py", True),
        ("suite/frozen.py", True),
        ("revisions/worker.py", True),
        ("gate/page.py", False),
        ("history/reader.py", False),
        ("report/trend.py", False),
    ],
)
def test_whatever_makes_figures_is_part_of_the_suite(
    name: str, differs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(declared, "_PROGRAM", "print('{}')")
    root = tmp_path / "house"
    (root / "sparsecore").mkdir(parents=True)
    (root / "sparsecore" / "__init__.py").write_text("")
    own = Path(harness.__file__).parent
    shutil.copytree(own, root / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(root)]
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for _ in range(2):
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", "one"], check=True)
        with (root / "harness" / name).open("a") as file:
            file.write("# changed\n")
    assert not asked(root, "HEAD~1", tmp_path / "store").differs
    assert asked(root, "HEAD", tmp_path / "store").differs == differs
