"""Bad input of every command: a line that says what to do, exit code 2, and no traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import harness.cli
from harness import bench, cost, encodings, epochs, floors, kernels, power, published, recbole, where
from harness.command import mendable, run_main, shares, some_of, whole_numbers
from harness.revisions.subject import GitError
from recsys.errors import ConfigError
from sparsecore.errors import DensityError

Ended = Callable[..., str]


@pytest.fixture
def ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command in an empty folder that has to end with code 2; what it said, in one line without a frame."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("SPARSECORE_DATA", raising=False)

    def run(main: Callable[..., Any], *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main() if main is harness.cli.main else run_main(main, GitError)
        found = capsys.readouterr()
        assert exit_.value.code == 2
        return " ".join(found.err.split())

    return run


OUT = ("--output", "out")


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (where.main, ["nothing.json", *OUT], "No such file or directory: 'nothing.json'"),
        (published.main, [".", *OUT], "not the folder of a run"),
        (epochs.main, ["--python", "x", "--dataset", "ml-1m", "--models", "y"], "unknown model 'y'"),
        (
            recbole.main,
            ["CDAE", "--python", "./x", "--dataset", "ml-1m", *OUT],
            "--python ./x: cannot be run",
        ),
        (cost.main, ["nothing", *OUT], "unknown preset 'nothing'"),
        (cost.main, ["multvae-ml-1m", *OUT], "SPARSECORE_DATA"),
        (cost.main, ["multvae-ml-1m", *OUT, "--densities", "0.5,2"], "--densities"),
        (floors.main, ["--threads", "0"], "--threads"),
        (floors.main, ["--part", "x"], "expected some of dense, torch.sparse"),
        (encodings.main, ["--threads", "x"], "expected whole numbers from 1"),
        (power.main, [*OUT, "--only", "["], "regular expression"),
        (kernels.main, ["--only", "["], "regular expression"),
        (power.main, [*OUT], "not a git repository"),
        (bench.bench, ["["], "regular expression"),
        (bench.bench, ["x", "--json", "nowhere/x.json"], "make the folder first"),
        (harness.cli.main, ["list", "--only", "["], "regular expression"),
        (harness.cli.main, ["gate", "--base", "HEAD", "--only", "["], "regular expression"),
        (harness.cli.main, ["gate", "--base", "HEAD", "--json", "nowhere/x"], "make the folder first"),
        (harness.cli.main, ["gate", "--base", "HEAD", "--markdown", "."], "expected a file"),
        (harness.cli.main, ["report", "--html", "nowhere/x.html"], "make the folder first"),
        (harness.cli.main, ["gate", "--base", "HEAD", "--json", "/proc/x.json"], "can be written to"),
        (floors.main, ["--output", "/proc/x"], "can be written to"),
        (floors.main, ["--output", "/proc/x/y"], "can be made"),
        (power.main, [*OUT, "--changes", "nosuch"], "expected some of"),
    ],
)
def test_bad_input_is_told(ended: Ended, main: Callable[..., Any], arguments: list[str], words: str) -> None:
    assert words in ended(main, *arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "not JSON"), ("nothing", "not JSON"), ("{}", "it has no arguments"), ("3", "it has no arguments")],
)
def test_a_file_of_something_else_is_named(ended: Ended, text: str, words: str) -> None:
    Path("run.json").write_text(text)
    said = ended(where.main, "run.json", *OUT)
    assert "run.json: " in said
    assert words in said


def test_a_file_of_something_alike_is_named(ended: Ended) -> None:
    names = ("total", "backend", "interpreted", "simd", "gpu", "features", "arguments")
    Path("run.json").write_text(json.dumps({"machine": 1, **dict.fromkeys(names)}))
    assert "run.json: machine: expected dict, got 1" in ended(where.main, "run.json", *OUT)


def test_what_a_user_can_mend_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (
        ConfigError("no such model"),
        DensityError("no such density"),
        FileNotFoundError(2, "no such file"),
        json.JSONDecodeError("no such value", "", 0),
        GitError("no such commit"),
    ):
        with pytest.raises(SystemExit) as exit_, mendable(GitError):
            raise error
        said = capsys.readouterr().err
        assert (exit_.value.code, said.count("\n")) == (2, 1)
        assert said.startswith("error: ")
        assert "no such" in said
    with pytest.raises(ValueError, match="ours"), mendable():
        raise ValueError("an error of ours")
    with pytest.raises(GitError), mendable():
        raise GitError("of another command")


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (whole_numbers, ["1", "1,2", "1, 2"], ["", "0", "x", "1,", "-1", "1.5"]),
        (shares, ["1", "0.5,0.1", "1e-3"], ["", "0", "1.1", "x", "0.5,", "nan"]),
        (some_of(["a", "b"]), ["a", "a,b"], ["", "c", "a,c"]),
    ],
)
def test_lists_with_commas(check: Callable[[str], str], good: list[str], bad: list[str]) -> None:
    for text in good:
        assert check(text) == text
    for text in bad:
        with pytest.raises(typer.BadParameter, match="expected"):
            check(text)
