"""TensorBoard: the figures of the log as curves, each epoch once even if a run was interrupted."""

from __future__ import annotations

import importlib.util

import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.errors import RecsysError
from recsys.training import session
from recsys.training.run_folder import RunFolder
from recsys.training.tensorboard import TensorBoardLog


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_curves_are_those_of_the_log(make_config, tmp_path):
    config = make_config("dsl", "train.epochs=4", "train.tensorboard=true", "train.evaluate_every=2")
    metrics = session.train(config, tmp_path / "run", quiet=True)
    log = RunFolder(tmp_path / "run").log()
    found = curves(tmp_path / "run")
    assert found["train/loss"] == [(r["epoch"], pytest.approx(r["loss"])) for r in log]
    assert found["train/seconds"] == [(r["epoch"], pytest.approx(r["seconds"])) for r in log]
    for name in ("drop_fraction", "ever_active"):
        assert found[f"sparsity/{name}"] == [(r["epoch"], pytest.approx(r[name])) for r in log]
    assert found["validation/ndcg@20"] == [
        (r["epoch"], pytest.approx(r["validation"]["ndcg@20"])) for r in log if "validation" in r
    ]
    assert [step for step, _ in found["validation/ndcg@20"]] == [2, 4]
    # The log changes nothing: neither what comes out, nor what a run is called.
    plain = make_config("dsl", "train.epochs=4", "train.evaluate_every=2")
    assert plain.hash == config.hash
    assert session.train(plain, quiet=True)["test"] == metrics["test"]


def test_a_resumed_run_has_every_epoch_once(make_config, tmp_path, monkeypatch):
    config = make_config("dense", "train.epochs=6", "train.tensorboard=true")
    original = RunFolder.save_checkpoint

    def crash(self, state):
        if state["epoch"] == 4:
            # The worst case: the curves are ahead of the checkpoint.
            with TensorBoardLog(self.tensorboard, 3) as curves:
                curves.write({"epoch": 4, "loss": 99.0, "seconds": 0.1})
            raise KeyboardInterrupt
        original(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", crash)
        with pytest.raises(KeyboardInterrupt):
            session.train(config, tmp_path / "run", quiet=True)
    session.resume(tmp_path / "run", quiet=True)
    log = RunFolder(tmp_path / "run").log()
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 3
    assert curves(tmp_path / "run")["train/loss"] == [(r["epoch"], pytest.approx(r["loss"])) for r in log]
    assert [r["epoch"] for r in log] == [1, 2, 3, 4, 5, 6]


def test_from_the_command_line(tmp_path):
    command = ["train", "--tensorboard", "--epochs", "1", "--method", "dense", "--quiet"]
    command += ["--set", "data.options={users=120, items=60, interactions=1800, clusters=6}"]
    command += ["--set", "model.hidden=32", "--set", "model.latent=8", "-o", str(tmp_path / "run")]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert [step for step, _ in curves(tmp_path / "run")["train/loss"]] == [1]


def test_nothing_is_written_unless_asked_for(make_config, tmp_path):
    session.train(make_config("dense", "train.epochs=1"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_without_tensorboard(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = make_config("dense", "train.epochs=1", "train.tensorboard=true")
    with pytest.raises(RecsysError, match=r"sparsecore\[tensorboard\]"):
        session.train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_fitted_has_no_loss_to_draw(make_config, tmp_path):
    config = make_config("dense", "train.tensorboard=true", model="ease")
    session.train(config, tmp_path / "run", quiet=True)
    assert "train/loss" not in curves(tmp_path / "run")
    assert len(curves(tmp_path / "run")["validation/ndcg@20"]) == 1
