"""The README's code runs as it stands, and so do the examples."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import harness.cli
import recsys.cli

ROOT = Path(__file__).parents[1]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ``python`` blocks in one namespace, in order, as a reader would type them."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
    assert "SparseLinear" in output.getvalue()


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda p: p.stem)
def test_code_of_the_other_pages_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where it writes files
    namespace: dict[str, object] = {"__name__": page.stem}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
            exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_marked_to_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``console run`` blocks, beside the files that ``file=`` blocks hold."""
    monkeypatch.chdir(tmp_path)
    for language, name, content in re.findall(
        r"```(\w+) (file=\S+|run)\n(.*?)```", page.read_text(), flags=re.DOTALL
    ):
        if language != "console":
            Path(name.removeprefix("file=")).write_text(content)
            continue
        for line in content.splitlines():
            program, *arguments = shlex.split(line)
            app = {"recsys": recsys.cli.app, "harness": harness.cli.app}[program]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target, section in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), target
        if section:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert section in anchors, f"{target}#{section}"


def test_a_transformer_becomes_sparse() -> None:
    example = runpy.run_path(str(ROOT / "examples" / "sparse_transformer.py"))
    with contextlib.redirect_stdout(io.StringIO()):
        assert example["main"](steps=120) > 0.9


def test_training_in_two_processes() -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(ROOT / "examples" / "data_parallel.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "3200 weights of 32000 stored on every rank" in done.stdout


def test_every_example_is_run() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {"data_parallel", "sparse_transformer"}
