"""Refit: train and validation together, for as long as validation had found best, with the schedules of that run."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy.sparse import csr_array, save_npz
from typer.testing import CliRunner

from recsys.cli import app
from recsys.config import load_config
from recsys.data import load
from recsys.data.prepare import prepare
from recsys.errors import ConfigError, DataError, RecsysError
from recsys.training import session
from recsys.training.refit import refit, refit_config
from recsys.training.run_folder import RunFolder
from recsys.training.trainer import Trainer


@pytest.fixture
def published(tiny, tmp_path):
    """A folder of data sets with a published split, without and with a validation part."""
    root = tmp_path / "data"
    train = csr_array(tiny.train + tiny.validation.targets)
    for name in ("split", "whole"):
        (root / name).mkdir(parents=True)
        save_npz(root / name / "test.npz", tiny.test.targets)
    save_npz(root / "split" / "train.npz", train)
    save_npz(root / "whole" / "train.npz", tiny.train)
    save_npz(root / "whole" / "valid.npz", tiny.validation.targets)
    return root


def config_on(make_config, root, name, *overrides):
    config = make_config("dsl", "data.options={}", "train.epochs=6", *overrides)
    return config.replace(data={"name": name, "dir": str(root), "options": {}})


def test_refit(make_config, published, tmp_path, monkeypatch):
    config = config_on(make_config, published, "split")
    first = session.train(config, tmp_path / "run", quiet=True)
    assert 0 < first["best_epoch"] <= 6
    original, tested = Trainer.rank, []

    def watched(self, eval_set):
        tested.append(eval_set)
        return original(self, eval_set)

    monkeypatch.setattr(Trainer, "rank", watched)
    again = refit(tmp_path / "run", tmp_path / "again", quiet=True)
    assert len(tested) == 1  # on test, once
    assert again["epochs"] == again["best_epoch"] == first["best_epoch"]
    assert again["validation"] == {}
    assert again["dataset"]["train_interactions"] == (
        first["dataset"]["train_interactions"] + first["dataset"]["validation_targets"]
    )
    assert again["dataset"]["test_targets"] == first["dataset"]["test_targets"]
    made = RunFolder.open(tmp_path / "again").config()
    assert made.train.stop_epoch == first["best_epoch"]
    assert made.train.epochs == config.train.epochs
    assert made.data.options == {"validation": 0}
    assert made.hash != config.hash
    # The schedule is that of the first run: MultVAE has the same number of updates in an epoch.
    logs = [RunFolder(tmp_path / name).log() for name in ("run", "again")]
    for one, other in zip(*logs, strict=False):
        assert one["drop_fraction"] == other["drop_fraction"]


def test_a_shorter_run_without_its_own_schedule_differs(make_config, tiny):
    """Why there is stop_epoch: `epochs` moves the schedule."""
    fractions = {}
    for name, overrides in {
        "whole": ["train.epochs=6"],
        "stopped": ["train.epochs=6", "train.stop_epoch=3"],
        "short": ["train.epochs=3"],
    }.items():
        records = []
        trainer = Trainer(make_config("dsl", *overrides), tiny)
        metrics = session.fit(trainer, quiet=True, on_epoch=records.append)
        fractions[name] = [record["drop_fraction"] for record in records]
        assert metrics["epochs"] == (6 if name == "whole" else 3)
        assert "validation" in records[-1]
    assert fractions["stopped"] == fractions["whole"][:3]
    assert fractions["short"][2] < fractions["whole"][2]


def test_stop_epoch_is_within_epochs():
    assert load_config(overrides=["train.epochs=5", "train.stop_epoch=5"]).train.stop_epoch == 5
    with pytest.raises(ConfigError, match="stop_epoch 6 comes after the last of 5 epochs"):
        load_config(overrides=["train.epochs=5", "train.stop_epoch=6"])


def test_a_split_by_ratio_can_be_refitted(make_config, tmp_path):
    session.train(make_config("dense", "train.epochs=2"), tmp_path / "run", quiet=True)
    metrics = refit(tmp_path / "run", tmp_path / "again", quiet=True)
    before = session.load_dataset(RunFolder(tmp_path / "run").config())
    assert metrics["dataset"]["train_interactions"] == before.train.nnz + before.validation.targets.nnz


def test_a_test_part_that_would_change_is_refused(make_config, tmp_path):
    # So large a test part leaves it more of short histories if validation takes none.
    options = "data.options={interactions=1000, users=120, items=60, test=0.8, validation=0.19}"
    session.train(make_config("dense", options, "train.epochs=1"), tmp_path / "run", quiet=True)
    with pytest.raises(DataError, match="cannot be put back"):
        refit(tmp_path / "run", tmp_path / "again", quiet=True)


def test_a_validation_part_of_its_own_is_put_back(make_config, published, tmp_path, tiny):
    session.train(config_on(make_config, published, "whole", "train.epochs=1"), tmp_path / "a", quiet=True)
    metrics = refit(tmp_path / "a", tmp_path / "again", quiet=True)
    assert metrics["dataset"]["train_interactions"] == tiny.train.nnz + tiny.validation.targets.nnz
    assert metrics["dataset"]["test_targets"] == tiny.test.targets.nnz
    assert metrics["validation"] == {}
    again = session.load_dataset(RunFolder(tmp_path / "again").config())
    assert np.array_equal(again.train.toarray(), (tiny.train + tiny.validation.targets).toarray())
    assert np.array_equal(again.test.inputs.toarray(), again.train.toarray())


def test_held_out_users_are_not_put_back(make_config, tmp_path):
    heldout = make_config("dense", "data.options.split=heldout", "train.epochs=1")
    session.train(heldout, tmp_path / "b", quiet=True)
    with pytest.raises(DataError, match="held-out users"):
        refit(tmp_path / "b", tmp_path / "again", quiet=True)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("split", ["ratio", "loo", "temporal"])
def test_prepared_data_can_be_refitted(make_config, tmp_path, split):
    """With the order of the interactions, where the split tells where validation pairs belong."""
    rows = [f"u{user},i{(user * 7 + place * place) % 23},{place}" for user in range(40) for place in range(8)]
    (tmp_path / "rows.csv").write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    prepared = prepare(tmp_path / "rows.csv", tmp_path / "data" / "mine", split=split)
    config = config_on(make_config, tmp_path / "data", "mine", "train.epochs=1")
    session.train(config, tmp_path / "run", quiet=True)
    metrics = refit(tmp_path / "run", tmp_path / "again", quiet=True)
    assert metrics["dataset"]["train_interactions"] == prepared.train.nnz + prepared.validation.targets.nnz
    whole = load("mine", tmp_path / "data", validation=0)
    if split != "loo":
        assert whole.order is None
        return
    assert whole.order is not None
    # The order is that of a split that never had a validation part.
    without = prepare(tmp_path / "rows.csv", tmp_path / "data" / "without", split=split, validation=0)
    assert np.array_equal(whole.train.toarray(), without.train.toarray())
    assert np.array_equal(whole.order, without.order)


def test_runs_that_cannot_be_refitted(make_config, tmp_path):
    config = make_config("dense", "train.epochs=2", "data.options.validation=0")
    session.train(config, tmp_path / "all", quiet=True)
    with pytest.raises(RecsysError, match="no validation users"):
        refit_config(tmp_path / "all")

    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.train(make_config("dense"), tmp_path / "cut", quiet=True, on_epoch=interrupt)
    with pytest.raises(RecsysError, match="has not ended"):
        refit_config(tmp_path / "cut")
    with pytest.raises(RecsysError, match="not the folder of a run"):
        refit_config(tmp_path / "nowhere")


def test_from_the_command_line(make_config, published, tmp_path):
    def call(*arguments):
        return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["train", *map(str, arguments)])

    session.train(config_on(make_config, published, "split"), tmp_path / "run", quiet=True)
    done = call("--refit", tmp_path / "run", "-o", tmp_path / "again", "--quiet")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "again" / "recommender").is_dir()
    assert re.search(r"^\W*test\W", done.output, re.MULTILINE)
    assert not re.search(r"^\W*validation\W", done.output, re.MULTILINE)
    assert call("--refit", tmp_path / "run", "-o", tmp_path / "again").exit_code == 2  # exists
    for wrong in (["--epochs", 3], ["--resume"], ["--tensorboard"]):
        refused = call("--refit", tmp_path / "run", "-o", tmp_path / "other", *wrong)
        assert refused.exit_code == 2
        assert "--refit takes the settings" in refused.stderr
    assert "--output" in call("--refit", tmp_path / "run").stderr


@pytest.mark.real
def test_gowalla_has_all_of_train(real_data):
    config = load_config(
        "lightgcn-gowalla", options={"data.dir": str(real_data), "data.options.validation": 0}
    )
    dataset = session.load_dataset(config)
    assert dataset.n_interactions == 810_128
    assert np.diff(dataset.validation.targets.indptr).sum() == 0


def test_a_file_that_has_moved_is_found_in_data_dir(make_config, tmp_path):
    (tmp_path / "here").mkdir()
    file = tmp_path / "here" / "own.csv"
    file.write_text("\n".join(["user,item", *(f"{u},{i}" for u in range(30) for i in range(u % 3, 20, 2))]))
    config = make_config("dense", f"data.name={file}", "data.options={}", "train.epochs=2", model="bprmf")
    session.train(config, tmp_path / "run", quiet=True)

    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.train(config, tmp_path / "cut", quiet=True, on_epoch=interrupt)
    moved = (tmp_path / "here").rename(tmp_path / "there")

    def call(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments), "--data-dir", str(moved)])

    for command in (
        ["evaluate", tmp_path / "run"],
        ["train", "--quiet", "--resume", "-o", tmp_path / "cut"],
        ["train", "--quiet", "--refit", tmp_path / "run", "-o", tmp_path / "again"],
    ):
        result = call(*command)
        assert result.exit_code == 0, result.output
    assert RunFolder(tmp_path / "again").config().data.dir == str(moved)
    with pytest.raises(RecsysError, match="no such file"):
        session.evaluate_run(tmp_path / "run")
    # What lies at the old path today is not what was asked for.
    file.parent.mkdir()
    file.write_text("user,item\n1,2\n1,3\n")
    assert call("evaluate", tmp_path / "run").exit_code == 0
    with pytest.raises(DataError, match="no longer the data"):
        session.evaluate_run(tmp_path / "run")
    for folder, why in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "run", "has no own.csv")):
        with pytest.raises(DataError, match=why):
            session.evaluate_run(tmp_path / "run", str(folder))


def test_a_run_is_not_replaced_by_its_own_refit(make_config, tmp_path):
    session.train(make_config("dense", "train.epochs=1"), tmp_path / "run", quiet=True)
    with pytest.raises(RecsysError, match="is the run itself"):
        refit(tmp_path / "run", tmp_path / "x" / ".." / "run", overwrite=True, quiet=True)
    assert RunFolder(tmp_path / "run").metrics() is not None


def test_a_run_goes_on_after_its_data_has_moved(make_config, published, tmp_path):
    config = config_on(make_config, published, "split")

    def interrupt(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.train(config, tmp_path / "run", quiet=True, on_epoch=interrupt)
    moved = published.rename(tmp_path / "elsewhere")
    with pytest.raises(RecsysError, match="does not exist"):
        session.resume(tmp_path / "run", quiet=True)
    command = ["train", "--resume", "--output", str(tmp_path / "run"), "--data-dir", str(moved), "--quiet"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert RunFolder(tmp_path / "run").metrics()["epochs"] == 6
