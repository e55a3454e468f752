"""A saved recommender alone: raw ids in, raw ids out, the same ranking as the model's scores."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from recsys.cli import app
from recsys.errors import DataError, OutputExistsError, RecsysError
from recsys.models.build import MODELS
from recsys.recommender import SavedRecommender
from recsys.training import session
from recsys.training.trainer import Trainer

pytestmark = pytest.mark.feature("saved recommenders")


@pytest.fixture
def trained(make_config, tiny):
    """A trainer of a model after two epochs."""

    def make(method="dsl", model="multvae"):
        trainer = Trainer(make_config(method, "train.epochs=2", model=model), tiny)
        session.fit(trainer, quiet=True)
        return trainer

    return make


def expected(trainer, row, exclude_seen=True):
    """Raw ids by plain argsort of the model's scores."""
    seen = trainer.dataset.train[[row]]
    scores = trainer.model.score(np.array([row]), seen)[0].numpy().copy()
    if exclude_seen:
        scores[seen.indices] = -np.inf
    order = np.argsort(-scores, kind="stable")
    return [(str(trainer.dataset.item_ids[i]), float(scores[i])) for i in order if np.isfinite(scores[i])]


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("method", ["dense", "masked", "static", "dsl"])
def test_loaded_recommender_ranks_as_the_model(trained, tmp_path, method, model):
    trainer = trained(method, model)
    session.saved_recommender(trainer).save(tmp_path / "saved")
    saved = SavedRecommender.load(tmp_path / "saved")
    for row in (0, 17, 119):
        user = str(trainer.dataset.user_ids[row])
        for exclude_seen in (True, False):
            ours = saved.recommend(user, k=8, exclude_seen=exclude_seen)
            plain = expected(trainer, row, exclude_seen)
            assert [score for _, score in ours] == pytest.approx([score for _, score in plain[:8]], rel=1e-5)
            # The order of equal scores is nobody's promise; sparse rows without a common column score 0.
            assert dict(ours) == pytest.approx({item: dict(plain)[item] for item, _ in ours}, rel=1e-5)
            assert len(dict(ours)) == 8


def test_loaded_model_is_stored_as_it_was_trained(trained, tmp_path):
    trainer = trained("dsl")
    session.saved_recommender(trainer).save(tmp_path / "saved")
    loaded = SavedRecommender.load(tmp_path / "saved").model
    ours, theirs = loaded.state_dict(), trainer.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"recommender.json", "model.safetensors", "history.npz", "ids.npz"}


def test_loading_needs_neither_data_nor_training_code(trained, tmp_path):
    session.saved_recommender(trained("dsl", "lightgcn")).save(tmp_path / "saved")
    program = (
        "import sys\n"
        "from recsys.recommender import SavedRecommender\n"
        f"print(len(SavedRecommender.load({str(tmp_path / 'saved')!r}).recommend('u0003', k=4)))\n"
        "foreign = ('recsys.training', 'recsys.data', 'recsys.config')\n"
        "assert not [m for m in sys.modules if m.startswith(foreign)]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() == "4"


def test_k_beyond_the_catalogue_gives_what_is_left(trained, tiny):
    saved = session.saved_recommender(trained())
    seen = tiny.train[[5]].nnz
    assert len(saved.recommend(str(tiny.user_ids[5]), k=1000)) == tiny.n_items - seen
    assert len(saved.recommend(str(tiny.user_ids[5]), k=1000, exclude_seen=False)) == tiny.n_items


def test_fold_in_of_a_users_own_items_is_that_user(trained, tiny):
    saved = session.saved_recommender(trained())
    items = tiny.item_ids[tiny.train[[7]].indices].tolist()
    by_items = saved.recommend(items=[*reversed(items), items[0]], k=5)
    by_id = saved.recommend(str(tiny.user_ids[7]), k=5)
    assert [item for item, _ in by_items] == [item for item, _ in by_id]
    assert not set(items) & {item for item, _ in by_items}


def test_fold_in_of_nothing_recommends_something(trained):
    assert len(session.saved_recommender(trained()).recommend(items=[], k=3)) == 3


def test_fold_in_into_lightgcn_is_refused(trained):
    with pytest.raises(DataError, match="multvae"):
        session.saved_recommender(trained("dsl", "lightgcn")).recommend(items=["i0001"])


def test_unknown_ids_and_bad_requests(trained):
    saved = session.saved_recommender(trained())
    with pytest.raises(DataError, match=r"user 'u00170' is unknown.*nearest is u0"):
        saved.recommend("u00170")
    with pytest.raises(DataError, match=r"item 'i01' is unknown.*nearest is i0"):
        saved.recommend(items=["i0001", "i01"])
    with pytest.raises(RecsysError, match="at least 1, got 0"):
        saved.recommend("u0001", k=0)
    for items in ("i0001", 1, {"i0001"}):  # a text is no list of its letters, a set has no order
        with pytest.raises(RecsysError, match="items: expected a list of raw ids"):
            saved.recommend(items=items)
    for arguments in ({}, {"user_id": "u0001", "items": ["i0001"]}):
        with pytest.raises(RecsysError, match="either"):
            saved.recommend(**arguments)


def test_an_unknown_id_among_many_is_not_compared_with_all(trained, monkeypatch):
    saved = session.saved_recommender(trained())
    monkeypatch.setattr("recsys.places._FEW", 3)
    with pytest.raises(DataError, match=r"user 'u00170' is unknown.*they are such as u0"):
        saved.recommend("u00170")


def test_numeric_ids_are_accepted_as_text_and_the_nearest_is_numeric(trained, tiny):
    trainer = trained()
    saved = SavedRecommender(
        trainer.model,
        settings=trainer.config.model.model_dump(),
        density=0.4,
        history=tiny.train,
        user_ids=np.arange(tiny.n_users) * 10,
        item_ids=np.arange(tiny.n_items) + 1000,
    )
    assert saved.recommend("30", k=3) == saved.recommend(30, k=3)
    assert all(isinstance(item, int) for item, _ in saved.recommend(30))
    with pytest.raises(DataError, match="nearest is 30"):
        saved.recommend(32)
    with pytest.raises(DataError, match="whole numbers"):
        saved.recommend("u0003")


def test_save_does_not_overwrite(trained, tmp_path):
    saved = session.saved_recommender(trained())
    saved.save(tmp_path / "saved")
    with pytest.raises(OutputExistsError):
        saved.save(tmp_path / "saved")
    saved.save(tmp_path / "saved", overwrite=True)


def test_missing_and_damaged_files(trained, tmp_path):
    good = tmp_path / "good"
    session.saved_recommender(trained()).save(good)
    with pytest.raises(RecsysError, match=r"recommender\.json is missing"):
        SavedRecommender.load(tmp_path)
    for name in ("recommender.json", "model.safetensors", "history.npz", "ids.npz"):
        data = (good / name).read_bytes()
        for content in (data[: len(data) // 2], b"", None):
            bad = tmp_path / "bad"
            shutil.copytree(good, bad)
            if content is None:
                (bad / name).unlink()
            else:
                (bad / name).write_bytes(content)
            with pytest.raises(RecsysError, match="missing" if content is None else "damaged"):
                SavedRecommender.load(bad)
            shutil.rmtree(bad)
    description = json.loads((good / "recommender.json").read_text())
    (good / "recommender.json").write_text(json.dumps({**description, "format": 99}))
    with pytest.raises(RecsysError, match="format 99"):
        SavedRecommender.load(good)
    (good / "recommender.json").write_text(json.dumps({**description, "density": 0.9}))
    with pytest.raises(RecsysError, match="damaged"):
        SavedRecommender.load(good)


@pytest.mark.parametrize("numeric", [True, False])
def test_ids_and_counts_that_cannot_be(trained, numeric):
    """Not rounded, and not read as Python reads numbers."""
    saved = session.saved_recommender(trained("dense"))
    if numeric:
        ids = np.arange(len(saved.user_ids)), np.arange(len(saved.item_ids))
        saved = SavedRecommender(
            saved.model,
            settings=saved.settings,
            density=saved.density,
            history=saved.history,
            user_ids=ids[0],
            item_ids=ids[1],
        )
        assert saved.recommend("10") == saved.recommend(10) == saved.recommend(np.int64(10))
    for user in (1.9, "1_0", " 1", "9" * 400, True, None if numeric else "u9999999"):
        items = ["1_0"] if user is None else None
        with pytest.raises(DataError, match="is unknown"):
            saved.recommend(user, items=items)
    for k in (2.5, "3", 0, True, None):
        with pytest.raises(RecsysError, match="k: expected a whole number of at least 1"):
            saved.recommend(saved.user_ids[0].item(), k=k)


@pytest.mark.parametrize("model", ["multvae", "lightgcn"])
def test_many_users_get_what_each_gets(trained, tiny, monkeypatch, model):
    saved = session.saved_recommender(trained("dsl", model))
    monkeypatch.setattr("recsys.recommender._TOGETHER", 7)
    users = [str(raw) for raw in tiny.user_ids[5:25]]
    for exclude_seen in (True, False):
        found = saved.recommend_many(users, k=tiny.n_items, exclude_seen=exclude_seen)
        assert list(found) == users
        for user in users:
            alone = saved.recommend(user, k=tiny.n_items, exclude_seen=exclude_seen)
            assert dict(found[user]).keys() == dict(alone).keys()
            assert [score for _, score in found[user]] == pytest.approx(
                [score for _, score in alone], rel=1e-4, abs=1e-5
            )
    assert saved.recommend_many([]) == {}
    whole = saved.recommend_many(users)
    monkeypatch.setattr("recsys.models.base._MOST_SCORES", 1)  # of a large catalogue fewer users at a time
    assert [[item for item, _ in best] for best in saved.recommend_many(users).values()] == [
        [item for item, _ in best] for best in whole.values()
    ]
    with pytest.raises(DataError, match=r"nobody.*unknown"):
        saved.recommend_many([users[0], "nobody"])
    assert list(saved.recommend_many([users[0], "nobody"], skip_unknown=True)) == users[:1]
    for arguments, why in ((("u0001",), "expected a list"), ((users, 0), "at least 1")):
        with pytest.raises(RecsysError, match=why):
            saved.recommend_many(*arguments)


def test_many_users_by_the_command(trained, tiny, tmp_path):
    saved = session.saved_recommender(trained())
    saved.save(tmp_path / "saved")
    users = [str(raw) for raw in tiny.user_ids[:3]]
    file = tmp_path / "users.txt"
    file.write_text("\n".join([users[0], f"{users[1]} ", *users[2:], "nobody", users[0], ""]))

    def call(*arguments, **more):
        return CliRunner().invoke(app, ["recommend", str(tmp_path / "saved"), *map(str, arguments)], **more)

    for result in (call("--users", file, "-k", 2), call("--users", "-", "-k", 2, input=file.read_text())):
        assert result.exit_code == 0, result.output
        rows = list(csv.DictReader(result.stdout.splitlines()))
        assert [(row["user"], row["rank"]) for row in rows] == [(u, r) for u in users for r in "12"]
        assert rows[0]["item"] == saved.recommend(users[0])[0][0]
        assert "1 of 4 users are unknown, or have chosen nothing, such as nobody" in result.stderr
    for arguments, why in (
        (["--users", file, "--user", "x"], "one of --user"),
        (["--users", tmp_path], "one a line"),
    ):
        refused = call(*arguments)
        assert refused.exit_code == 2
        assert why in refused.stderr
