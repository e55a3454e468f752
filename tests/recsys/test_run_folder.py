"""The folder of a run: never half there, never overwritten by accident."""

from __future__ import annotations

import contextlib
import os
import resource
import stat

import numpy as np
import pytest
import torch

from recsys.config import Config
from recsys.errors import OutputExistsError, RecsysError
from recsys.files import new_folder, replacing, save_tensors
from recsys.training.run_folder import RunFolder

STATE = {"epoch": 3, "model": {"w": torch.arange(4.0)}, "none": None}


def make(path, **options):
    return RunFolder.create(path, Config(), STATE, **options)


def leftovers(path):
    return [p.name for p in path.iterdir() if p.name.startswith(".")]


def test_create_then_open(tmp_path):
    make(tmp_path / "a" / "run")
    folder = RunFolder.open(tmp_path / "a" / "run")
    assert folder.config() == Config()
    state = folder.load_checkpoint()
    assert state["epoch"] == 3
    assert torch.equal(state["model"]["w"], torch.arange(4.0))
    assert folder.metrics() is None
    assert leftovers(tmp_path / "a") == []


def test_existing_run_is_not_overwritten(tmp_path):
    make(tmp_path / "run").append_log({"epoch": 1})
    with pytest.raises(OutputExistsError, match=r"--resume.*--overwrite"):
        make(tmp_path / "run")
    assert RunFolder(tmp_path / "run").log() == [{"epoch": 1}]
    make(tmp_path / "run", overwrite=True)
    assert RunFolder(tmp_path / "run").log() == []
    assert leftovers(tmp_path) == []


def test_empty_folder_may_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").config() == Config()


def test_foreign_folder_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match="not written by recsys"):
        make(tmp_path, overwrite=True)
    with pytest.raises(OutputExistsError, match="not a folder"):
        make(tmp_path / "thesis.tex", overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_failure_while_creating_keeps_the_old_run(tmp_path):
    make(tmp_path / "run").append_log({"epoch": 1})
    with pytest.raises(Exception, match=r"pickle|local object"):  # of Python 3.13: Can't get local object
        RunFolder.create(tmp_path / "run", Config(), {"bad": lambda: 0}, overwrite=True)
    assert RunFolder(tmp_path / "run").log() == [{"epoch": 1}]
    assert leftovers(tmp_path) == []


def test_unwritable_place_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    for check in (RunFolder.check_free, make):
        with pytest.raises(
            RecsysError, match=r"cannot write .*file is not a folder; choose another --output"
        ):
            check(tmp_path / "file" / "deeper" / "run")
    (tmp_path / "closed").mkdir(mode=0o500)
    if not os.access(tmp_path / "closed", os.W_OK):  # else this user may write anywhere
        with pytest.raises(RecsysError, match="no permission to write in"):
            RunFolder.check_free(tmp_path / "closed" / "run")


@contextlib.contextmanager
def little_room(size=1000):
    """Files cannot grow beyond this many bytes, in place of a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line(tmp_path):
    folder = make(tmp_path / "run")
    large = {"w": torch.ones(5000), "epoch": 4}
    many = {"ndcg@20": np.random.default_rng(0).random(5000)}
    for name, write in (
        ("checkpoint.pt", lambda: folder.save_checkpoint(large)),
        ("best.safetensors", lambda: folder.save_best({"w": torch.ones(5000)})),
        ("per_user.npz", lambda: folder.save_per_user(np.arange(5000), many)),
        ("metrics.json", lambda: folder.save_metrics({"text": "x" * 5000})),
        ("log.jsonl", lambda: folder.append_log({"text": "x" * 5000})),
    ):
        with (
            little_room(),
            pytest.raises(RecsysError, match=rf"cannot write .*{name}: .* MB are free.*--resume"),
        ):
            write()
    with little_room(), pytest.raises(RecsysError, match=r"cannot write .*other: "):
        RunFolder.create(tmp_path / "other", Config(), large)
    assert folder.load_checkpoint()["epoch"] == 3
    assert leftovers(tmp_path) == leftovers(folder.path) == []


def test_not_a_run(tmp_path):
    with pytest.raises(RecsysError, match=r"config\.toml"):
        RunFolder.open(tmp_path)


def test_damaged_and_missing_files(tmp_path):
    folder = make(tmp_path / "run")
    with pytest.raises(RecsysError, match="no epoch"):
        folder.load_best()
    folder.save_best({"w": torch.ones(3)})
    assert torch.equal(folder.load_best()["w"], torch.ones(3))
    for name, load in (("best.safetensors", folder.load_best), ("checkpoint.pt", folder.load_checkpoint)):
        data = (folder.path / name).read_bytes()
        for damaged in (data[: len(data) // 2], b"", b"nonsense" * 9, b"abc", b"\x80\x02.", bytes(300)):
            (folder.path / name).write_bytes(damaged)
            with pytest.raises(RecsysError, match=f"{name} is damaged"):
                load()
    for state in ({}, [1], {"config": "x"}):
        torch.save(state, folder.path / "checkpoint.pt")
        with pytest.raises(RecsysError, match=r"checkpoint\.pt is damaged"):
            folder.load_checkpoint()
    (folder.path / "checkpoint.pt").unlink()
    with pytest.raises(RecsysError, match="nothing to resume"):
        folder.load_checkpoint()


@pytest.mark.parametrize("text", [b"abc", b"{}", b"[]", b"3", b'{"test": {"nd', b"\xff\xfe", b""])
def test_damaged_records(tmp_path, text):
    folder = make(tmp_path / "run")
    (folder.path / "metrics.json").write_bytes(text)
    with pytest.raises(RecsysError, match=r"metrics\.json is damaged .*; delete it and continue"):
        folder.metrics()
    (folder.path / "log.jsonl").write_bytes(b'{"epoch": 1}\n' + text + b'\n{"epoch": 3}\n')
    with pytest.raises(RecsysError, match=r"log\.jsonl is damaged .*; remove line 2"):
        folder.log()


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    folder = make(tmp_path / "run")

    def interrupted(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.save_checkpoint({"epoch": 4})
    assert folder.load_checkpoint()["epoch"] == 3
    assert leftovers(folder.path) == []


def test_log_forgets_later_epochs_and_a_cut_line(tmp_path):
    folder = make(tmp_path / "run")
    assert folder.log() == []
    for epoch in (1, 2, 3):
        folder.append_log({"epoch": epoch})
    with (folder.path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 4, "lo')
    folder.truncate_log(2)
    folder.append_log({"epoch": 3, "again": True})
    assert folder.log() == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3, "again": True}]


def fail_within(context, name=""):
    with context as temporary:
        (temporary / name if name else temporary).write_text("new")
        raise ZeroDivisionError


def test_replacing_and_new_folder_undo_on_error(tmp_path):
    (tmp_path / "f").write_text("old")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("old")
    with pytest.raises(ZeroDivisionError):
        fail_within(replacing(tmp_path / "f"))
    with pytest.raises(ZeroDivisionError):
        fail_within(new_folder(tmp_path / "d"), "x")
    assert (tmp_path / "f").read_text() == (tmp_path / "d" / "x").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["d", "f"]


def test_weights_are_as_readable_as_other_new_files(tmp_path):
    save_tensors({"w": torch.ones(2, 3).T}, tmp_path / "w.safetensors")
    (tmp_path / "other").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("w.safetensors", "other")}
    assert len(modes) == 1


def test_a_folder_that_is_being_written_is_left_alone(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with (
        folder.busy(),
        pytest.raises(RecsysError, match="is being written by another process"),
    ):
        RunFolder.check_free(tmp_path, overwrite=True)
    RunFolder.check_free(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
