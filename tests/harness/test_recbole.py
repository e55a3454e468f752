"""RecBole is not installed here: what it is given, what is made of its answer, and what is said when it fails."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from scipy.sparse import csr_array

from harness import epochs, recbole
from recsys.data import load
from recsys.errors import ConfigError, RecsysError

TINY = {"users": 40, "items": 30, "interactions": 300}


def read(path):
    header, *lines = path.read_text().splitlines()
    assert header == "user_id:token\titem_id:token"
    return np.array([line.split("\t") for line in lines], dtype=int)


def test_exported_files_are_the_split(tmp_path):
    data = load("synthetic", **TINY)
    place = recbole.export(data, tmp_path)
    for part, expected in (
        ("train", data.train),
        ("valid", data.validation.targets),
        ("test", data.test.targets),
    ):
        rows, columns = read(place / f"{place.name}.{part}.inter").T
        found = csr_array((np.ones(len(rows)), (rows, columns)), shape=expected.shape)
        assert (found != expected).nnz == 0


def test_held_out_users_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds users out"):
        recbole.export(load("synthetic", split="heldout", **TINY), tmp_path)


def stub(tmp_path, body):
    """A stand-in for RecBole's Python: gets the same arguments as that, and has RecBole if it is asked."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport json, sys\nif sys.argv[2] == '-c': sys.exit()\n{body}\n")
    script.chmod(0o755)
    return str(script)


ANSWER = {
    "version": "0", "torch": "0", "threads": 1, "best_epoch": 2, "validation": {"recall@10": 0.2},
    "test": {"recall@10": 0.1}, "train_seconds": [1.0, 3.0], "evaluate_seconds": [0.5],
}  # fmt: skip


def test_answer_becomes_a_page(tmp_path, monkeypatch):
    python = stub(
        tmp_path,
        "task = json.loads(sys.argv[3])\n"
        "assert task['settings']['benchmark_filename'] == ['train', 'valid', 'test']\n"
        "assert task['settings']['epochs'] == 3 and task['model'] == 'CDAE'\n"
        f"json.dump({ANSWER!r}, open(sys.argv[4], 'w'))",
    )
    monkeypatch.setattr(sys, "argv", ["recbole", "CDAE"])
    options = ["users=40", "items=30", "interactions=300"]
    recbole.main(
        "CDAE", python, "synthetic", tmp_path / "out", None, 0, 1, ["epochs=3", "loss_type=BCE"], options
    )
    page = (tmp_path / "out.md").read_text()
    assert "| test | 0.1000 |" in page
    assert "training 2.00 (least 1.00)" in page
    assert "loss_type = 'BCE'" in page
    assert json.loads((tmp_path / "out.json").read_text())["dataset"]["users"] == 40


def test_failures_are_told(tmp_path):
    place = recbole.export(load("synthetic", **TINY), tmp_path)
    with pytest.raises(RecsysError, match=r"exit code 3: no such thing"):
        recbole.run(
            stub(tmp_path, "print('no such thing', file=sys.stderr); sys.exit(3)"), "CDAE", place, {}, 1
        )
    with pytest.raises(RecsysError, match="cannot be run"):
        recbole.with_recbole(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        recbole._parsed(["epochs"])


def test_a_python_is_checked_and_found_from_anywhere(tmp_path, monkeypatch):
    python = stub(tmp_path, "pass")
    monkeypatch.chdir(tmp_path)
    assert recbole.with_recbole("./python") == python
    assert recbole.with_recbole(f"../{tmp_path.name}/python") == python
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert recbole.with_recbole("python") == "python"
    without = tmp_path / "without"
    without.symlink_to(sys.executable)
    monkeypatch.setattr(recbole, "export", None)  # nothing is exported for a Python without RecBole
    for main in (
        lambda: recbole.main("CDAE", "./without", "synthetic", tmp_path / "out"),
        lambda: epochs.main("./without", "synthetic"),
    ):
        with pytest.raises(RecsysError, match=r"--python \./without: has no RecBole"):
            main()


def test_epochs_are_kept_after_each_model(tmp_path, monkeypatch):
    python = stub(
        tmp_path,
        "if json.loads(sys.argv[3])['model'] == 'BPR': sys.exit(3)\n"
        f"json.dump({ANSWER!r}, open(sys.argv[4], 'w'))",
    )
    monkeypatch.setattr(sys, "argv", ["epochs"])
    monkeypatch.setattr(epochs, "load", lambda name, data_dir: load(name, **TINY))
    with pytest.raises(RecsysError, match="exit code 3"):
        epochs.main(python, "synthetic", tmp_path / "out", None, "cdae,bprmf", 1, 1)
    assert list(json.loads((tmp_path / "out.json").read_text())["seconds"]) == ["cdae"]
    assert "| CDAE |" in (tmp_path / "out.md").read_text()


def test_epochs_of_both_become_a_table(tmp_path, monkeypatch, capsys):
    python = stub(
        tmp_path,
        "task = json.loads(sys.argv[3])\n"
        "assert task['model'] == 'BPR' and task['settings']['epochs'] == 3\n"
        f"json.dump({ANSWER!r}, open(sys.argv[4], 'w'))",
    )
    monkeypatch.setattr(sys, "argv", ["epochs"])
    monkeypatch.setattr(epochs, "load", lambda name, data_dir: load(name, **TINY))
    epochs.main(python, "synthetic", tmp_path / "out", None, "bprmf", 1, 1)
    assert "| BPR | 3.000 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["seconds"]["bprmf"]["theirs"] == 3.0
    with pytest.raises(ConfigError, match="unknown model"):
        epochs.main(python, "synthetic", None, None, "nothing", 1, 1)
