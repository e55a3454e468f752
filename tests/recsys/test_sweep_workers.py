"""Sweeps in processes: what fails, dies or is interrupted leaves the others, and us, alive."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from recsys.sweep import make_grid, run_cells
from recsys.sweep.progress import Display
from recsys.sweep.workers import Event, Failure, Task, _cause_of_death
from recsys.training import session
from recsys.training.run_folder import RunFolder


def cells_of(config, *changes):
    """A cell for each {"table.key": value} of [train]."""
    cells = []
    for change in changes:
        cells += make_grid(lambda v, c=change: config.replace(train={**c, **seed_of(v)}), [], 1).cells
    return cells


def seed_of(variation):
    return {key.removeprefix("train."): value for key, value in variation.items()}


def test_one_ends_one_fails_one_dies(make_config, tmp_path):
    config = make_config("dense", "train.epochs=3")
    good, bad, killed = cells_of(config, {}, {"lr": 1e30}, {"epochs": 100_000})
    seen = []

    def kill(event):
        seen.append((event.kind, event.task.folder.name))
        if event.kind == "epoch" and event.task.folder.name == killed.folder and len(waiting()) == 1:
            os.kill(waiting()[0].pid, signal.SIGKILL)

    def waiting():
        return multiprocessing.active_children()

    outcome = run_cells([good, bad, killed], tmp_path, jobs=2, threads=1, on_event=kill)
    (run,) = outcome.runs
    assert run["test"] == session.train(good.config, quiet=True)["test"]
    assert [one["config_hash"] for one in outcome.runs] == [good.config.hash]
    reasons = {one["folder"]: one["error"] for one in outcome.failed}
    assert "diverged" in reasons[bad.folder]
    assert "SIGKILL" in reasons[killed.folder]
    assert [kind for kind, name in seen if name == good.folder] == [
        "start",
        "epoch",
        "epoch",
        "epoch",
        "done",
    ]
    assert RunFolder(tmp_path / killed.folder).load_checkpoint()["epoch"] >= 1
    assert not multiprocessing.active_children()


def test_an_interrupted_sweep_stops_its_workers_and_continues(make_config, tmp_path):
    (cell,) = cells_of(make_config("dense", "train.epochs=12"), {})

    def interrupt(event):
        if event.kind == "epoch":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells([cell], tmp_path, threads=1, on_event=interrupt)
    assert not multiprocessing.active_children()
    folder = RunFolder(tmp_path / cell.folder)
    begun = folder.load_checkpoint()["epoch"]
    assert begun >= 1
    records = []
    run_cells([cell], tmp_path, threads=1, on_event=lambda event: records.append(event.record))
    epochs = [record["epoch"] for record in records if record is not None]
    assert epochs == list(range(begun + 1, 13))
    assert [record["epoch"] for record in folder.log()] == list(range(1, 13))


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups here")
def test_ctrl_c_of_a_terminal(tmp_path):
    """All processes get SIGINT at once, as from a terminal: one line is printed and nothing is left running."""
    command = [sys.executable, "-c", "from recsys.cli import main; main()", "sweep"]
    command += ["--set", "data.options={users=120, items=60, interactions=1800, clusters=6}"]
    command += ["--set", "model.hidden=32", "--set", "model.latent=8", "--set", "train.epochs=100000"]
    command += ["--grid", "sparsity.method=dense", "--threads", "1", "-o", str(tmp_path / "s")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        for _ in range(2400):
            logs = list((tmp_path / "s").glob("*/log.jsonl"))
            # An epoch's line comes before its checkpoint: with the second line, the first epoch's is there.
            if logs and logs[0].read_bytes().count(b"\n") >= 2:
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert re.search(r"error: interrupted; 0 of 1 runs in .* have ended; the same command continues", stderr)
    for _ in range(200):  # what python itself keeps for its processes ends a little later
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process is left")
    assert RunFolder(logs[0].parent).load_checkpoint()["epoch"] >= 1


def test_causes_of_death():
    assert "memory" in _cause_of_death(-signal.SIGKILL)
    assert "SIGSEGV" in _cause_of_death(-signal.SIGSEGV)
    assert "exit code 3" in _cause_of_death(3)


def test_how_long_the_rest_takes(make_config, tmp_path, monkeypatch):
    from rich.console import Console

    from recsys.sweep import progress

    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    tasks = [Task(make_config("dense"), tmp_path / str(place)) for place in range(3)]
    console = Console(file=(tmp_path / "out.txt").open("w"), width=120)
    with console.file, Display(7, 2, console=console, jobs=2) as display:
        for task in tasks[:2]:
            display(Event("start", task))
        clock[0] = 50.0
        display(Event("done", tasks[0]))
        clock[0] = 5000.0
        display(Event("failed", tasks[1], failure=Failure("it broke")))  # says nothing about the others
        display(Event("start", tasks[2]))
        clock[0] = 20000.0
        display(Event("done", tasks[2]))
    shown = [line for line in (tmp_path / "out.txt").read_text().splitlines() if "ended after" in line]
    assert shown == [
        "0: ended after 50 s (3 of 7); about 100 s for the other 4",
        "2: ended after 15000 s (5 of 7); about 2.1 h for the other 2",
    ]


def test_progress_without_and_with_a_terminal(make_config, tmp_path):
    from rich.console import Console

    config = make_config("dense", "train.epochs=2")
    one, two = (Task(config, tmp_path / name) for name in ("one", "two"))
    events = [
        Event("start", one),
        Event("start", two),
        Event("epoch", one, record={"epoch": 1, "validation": {"ndcg@20": 0.25}}),
        Event("epoch", two, record={"epoch": 1}),
        Event("done", one),
        Event("failed", two, failure=Failure("it [broke]")),
    ]
    texts = {}
    for terminal in (False, True):
        for quiet in (False, True):
            with (tmp_path / "out.txt").open("w") as file:
                console = Console(file=file, width=120, force_terminal=terminal)
                with Display(3, 1, quiet, console) as display:
                    for event in events:
                        display(event)
                        display._progress.refresh()
            texts[terminal, quiet] = (tmp_path / "out.txt").read_text()
    plain = texts[False, False].splitlines()
    assert plain[0] == "1 of 3 runs have ended already"
    assert plain[1:3] == ["one: begins", "two: begins"]
    assert re.fullmatch(r"one: ended after \d+ s \(2 of 3\); about \d+ s for the other 1", plain[3])
    assert re.fullmatch(r"two: failed after \d+ s: it \[broke\]", plain[4])
    assert "ndcg@20 0.2500" in texts[True, False]
    for terminal in (False, True):
        assert texts[terminal, True].startswith("two: failed")
