"""The README's code runs as it stands, and so do the examples."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import harness.cli
import recsys.cli

ROOT = Path(__file__).parents[1]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_code_runs() -> None:
    """All ``python`` blocks in one namespace, in order, as a reader would type them."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {"__name__": "readme"}
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
    assert "SparseLinear" in output.getvalue()


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda p: p.stem)
def test_code_of_the_other_pages_runs(page: Path) -> None:
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
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run(path: Path) -> None:
    example = runpy.run_path(str(path))
    with contextlib.redirect_stdout(io.StringIO()):
        assert example["main"](steps=120) > 0.9
