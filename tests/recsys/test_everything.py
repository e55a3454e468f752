"""Training on everything: validation and test put into train, for a model that is to serve."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from typer.testing import CliRunner

from recsys import quickstart
from recsys.cli import app
from recsys.compare import compare_runs
from recsys.data import Dataset, EvalSet, load
from recsys.data.everything import everything
from recsys.data.prepare import prepare
from recsys.errors import ConfigError, DataError, RecsysError
from recsys.recommender import SavedRecommender
from recsys.sweep.engine import Plan
from recsys.sweep.grid import Cell
from recsys.training import session
from recsys.training.refit import refit
from recsys.training.run_folder import RunFolder

LINES = ["user,item,timestamp"] + [
    f"u{user},{item},{(7 * item + user) % 23}"
    for user in range(12)
    for item in range(user % 3, 18, 1 + user % 4)
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("\n".join(LINES) + "\n")
    return path


def raw_pairs(dataset: Dataset) -> Counter:
    rows, columns = dataset.train.nonzero()
    return Counter(zip(dataset.user_ids[rows].tolist(), dataset.item_ids[columns].tolist(), strict=True))


def written() -> Counter:
    fields = [line.split(",") for line in LINES[1:]]
    return Counter((user, int(item)) for user, item, _ in fields)


@pytest.mark.parametrize("split", ["ratio", "loo", "heldout"])
def test_no_interaction_is_lost_or_added(file, split):
    parted = load(str(file), split=split, seed=3)
    whole = everything(parted)
    assert sum(raw_pairs(parted).values()) < len(LINES) - 1
    assert raw_pairs(whole) == written()
    assert whole.user_ids[: parted.n_users].tolist() == parted.user_ids.tolist()  # rows stay where they are
    for part in (whole.validation, whole.test):
        assert not len(part.rows_with_targets)
    assert "everything" in whole.notes[-1]


@pytest.mark.parametrize("prepared", [False, True])
def test_what_a_temporal_split_leaves_out_is_trained_on(tmp_path, prepared):
    """Users and items that are new after the first cut: those a service needs most."""
    lines = [
        f"{'new' if time > 85 and time % 3 == 0 else 'u'}{time % 10},{91 if time > 96 else time % 7},{time}"
        for time in range(100)
    ]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(["user,item,timestamp", *lines]) + "\n")
    if prepared:
        prepare(path, tmp_path / "mine", split="temporal")
        parted = load("mine", data_dir=tmp_path)
    else:
        parted = load(str(path), split="temporal")
    assert not [user for user in parted.user_ids if user.startswith("new")]
    assert 91 not in parted.item_ids
    whole = everything(parted)
    written = {tuple(line.split(",")[:2]) for line in lines}
    assert {(user, str(item)) for user, item in raw_pairs(whole)} == written
    assert max(raw_pairs(whole).values()) == 1
    assert whole.user_ids[: parted.n_users].tolist() == parted.user_ids.tolist()
    assert whole.item_ids[: parted.n_items].tolist() == parted.item_ids.tolist()
    assert everything(whole).train.nnz == whole.train.nnz
    if prepared:  # divided anew, they are there as well
        assert everything(load("mine", data_dir=tmp_path, split="ratio")).train.nnz == whole.train.nnz


def test_the_order_of_histories_survives_leave_one_out(file):
    whole, given = (
        everything(load(str(file), split="loo")),
        load(str(file), split="loo", validation=0, test=0),
    )
    assert (whole.train != given.train).nnz == 0
    assert whole.order is not None
    assert np.array_equal(whole.order, given.order)
    prepare(file, file.parent / "prepared", split="loo")
    again = everything(load(str(file.parent / "prepared")))
    assert (again.train != given.train).nnz == 0
    assert again.order is not None
    assert np.array_equal(again.order, given.order)
    short = file.parent / "short.csv"  # one target each, as by leave-one-out, but drawn
    short.write_text("user,item,timestamp\n" + "".join(f"{u},{i},{-i}\n" for u in range(4) for i in range(6)))
    assert everything(load(str(short))).order is None
    # Where targets are drawn at random, or users were held out, it is not known.
    for split in ("ratio", "heldout"):
        parted = load(str(file), split=split)
        assert parted.order is not None
        assert everything(parted).order is None


def test_held_out_users_without_ids_are_refused(file):
    parted = load(str(file), split="heldout")
    test = parted.test
    nameless = EvalSet(test.inputs, test.targets, test.users)
    with pytest.raises(DataError, match="have no raw ids"):
        everything(Dataset("x", parted.train, parted.validation, nameless, parted.user_ids, parted.item_ids))


def call(*arguments):
    return CliRunner(env={"COLUMNS": "400", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("split", ["ratio", "heldout"])
def test_what_is_saved_knows_everybody_and_all_they_have_chosen(make_config, file, tmp_path, split):
    config = make_config("dsl", "data.options={}", "train.epochs=3").replace(
        data={"name": str(file), "options": {"split": split}}
    )
    first = session.train(config, tmp_path / "run", quiet=True)
    done = call("train", "--refit", tmp_path / "run", "--everything", "-o", tmp_path / "served", "--quiet")
    assert done.exit_code == 0, done.output
    assert f"trained on everything for {first['best_epoch']} epoch" in done.output
    metrics = RunFolder(tmp_path / "served").metrics()
    assert metrics["test"] == metrics["validation"] == metrics["beyond_accuracy"] == metrics["protocol"] == {}
    assert metrics["dataset"]["train_interactions"] == len(LINES) - 1
    saved = SavedRecommender.load(tmp_path / "served")
    pairs = written()
    for user in {user for user, _ in pairs}:
        chosen = {item for one, item in pairs if one == user}
        offered = [item for item, _ in saved.recommend(user, k=18)]
        assert len(offered) == 18 - len(chosen)
        assert not chosen & set(offered)
    # There is nothing to measure any more, and who tries is told so.
    with pytest.raises(RecsysError, match="nobody left to evaluate"):
        session.evaluate_run(tmp_path / "served")
    with pytest.raises(RecsysError, match="no test metrics to compare"):
        compare_runs([tmp_path / "run", tmp_path / "served"])
    with pytest.raises(RecsysError, match="trained on all there is"):
        refit(tmp_path / "served", tmp_path / "again", everything=True)
    with pytest.raises(RecsysError, match="trained on all there is"):
        refit(tmp_path / "served", tmp_path / "again")


def test_a_run_on_everything_goes_on_after_an_interruption(make_config, file, tmp_path, monkeypatch):
    config = make_config("dsl", "data.options={}", "train.epochs=3", "data.everything=true").replace(
        data={"name": str(file)}
    )
    whole = session.train(config, tmp_path / "whole", quiet=True)

    def interrupt(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.train(config, tmp_path / "run", quiet=True, on_epoch=interrupt)
    again = session.resume(tmp_path / "run", quiet=True)
    assert (again["nnz"], again["steps"]) == (whole["nnz"], whole["steps"])
    one, other = (RunFolder(tmp_path / name).load_best() for name in ("whole", "run"))
    assert all(bool((one[name] == other[name]).all()) for name in one)


def test_commands_that_measure_refuse_it(make_config, tmp_path):
    config = make_config("dsl", "data.everything=true")
    with pytest.raises(ConfigError, match="measures on test"):
        quickstart.run(config, quiet=True)
    with pytest.raises(ConfigError, match="measures on test"):
        Plan.of([Cell("a", {}, config)], tmp_path)
    refused = call("train", "--everything", "-o", tmp_path / "run")
    assert refused.exit_code == 2
    assert "expected --refit RUN" in refused.stderr
