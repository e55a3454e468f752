"""Models that are fitted at once, against their formulas written out; a run and a saved one of each."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from typer.testing import CliRunner

from recsys.cli import app
from recsys.config import load_config
from recsys.errors import ConfigError, RecsysError
from recsys.models.build import FITTED, build_model
from recsys.models.fitted import EASE, ItemKNN, Popularity
from recsys.recommender import SavedRecommender
from recsys.training import session
from recsys.training.run_folder import RunFolder
from recsys.training.trainer import Trainer

NOBODY = np.full(4, -1)


def random_matrix(users=40, items=12, density=0.3, seed=0):
    """Nobody has chosen the last item; the first user has chosen nothing."""
    dense = np.random.default_rng(seed).random((users, items)) < density
    dense[0], dense[:, -1] = False, False
    return csr_array(dense.astype(np.float32))


def fitted(kind, train, **options):
    model = kind(train.shape[1], **options)
    model.fit(train)
    return model


# ---- the formulas


def test_popularity_is_the_number_of_users():
    train = random_matrix()
    scores = fitted(Popularity, train).score(NOBODY, train[:4])
    assert scores.tolist() == [train.toarray().sum(0).tolist()] * 4


def test_popularity_scores_are_the_callers_own():
    model = fitted(Popularity, random_matrix())
    before = model.degrees.clone()
    model.score(NOBODY[:1], random_matrix()[:1])[0, 2] = -torch.inf
    assert torch.equal(model.degrees, before)


@pytest.mark.parametrize("products", [1, 50, 1 << 24])
@pytest.mark.parametrize("neighbors", [1, 4, 12, 100])
@pytest.mark.parametrize("shrinkage", [0.0, 3.0])
def test_itemknn_is_the_dense_cosine_of_the_nearest(products, neighbors, shrinkage, monkeypatch):
    monkeypatch.setattr("recsys.models.neighbors._PRODUCTS", products)
    train = random_matrix()
    x = train.toarray().astype(np.float64)
    together = x.T @ x
    norms = np.sqrt(np.diag(together))
    similarity = together / np.maximum(np.outer(norms, norms) + shrinkage, 1e-12)
    np.fill_diagonal(similarity, 0)
    nearest = np.zeros_like(similarity)
    for item, row in enumerate(similarity):
        order = np.argsort(-row, kind="stable")[:neighbors]
        nearest[item, order] = row[order]
    scores = fitted(ItemKNN, train, neighbors=neighbors, shrinkage=shrinkage).score(NOBODY, train[:4])
    torch.testing.assert_close(scores, torch.from_numpy(x[:4] @ nearest.T).float(), rtol=1e-6, atol=1e-7)
    assert not scores[0].any()


@pytest.mark.parametrize("block", [1, 40, 1 << 24])
@pytest.mark.parametrize("regularization", [0.5, 30.0])
def test_ease_is_the_direct_inverse(block, regularization, monkeypatch):
    monkeypatch.setattr("recsys.models.fitted._BLOCK", block)
    train = random_matrix()
    x = train.toarray().astype(np.float64)
    p = np.linalg.inv(x.T @ x + regularization * np.eye(12))
    b = np.eye(12) - p / np.diag(p)
    np.fill_diagonal(b, 0)
    model = fitted(EASE, train, regularization=regularization)
    torch.testing.assert_close(model.weights, torch.from_numpy(b).float(), rtol=1e-5, atol=1e-6)
    scores = model.score(NOBODY, train[:4])
    torch.testing.assert_close(scores, torch.from_numpy(x[:4] @ b).float(), rtol=1e-5, atol=1e-6)
    assert not scores[0].any()


def test_ease_is_the_best_matrix_without_a_diagonal():
    """The gradient of its objective is zero off the diagonal."""
    train = random_matrix()
    x, b = torch.from_numpy(train.toarray()).double(), fitted(EASE, train, regularization=2.0).weights
    b = b.double().requires_grad_()
    ((x - x @ b).square().sum() + 2 * b.square().sum()).backward()
    assert b.grad[~torch.eye(12, dtype=torch.bool)].abs().max() < 1e-5


def test_ease_refuses_a_catalogue_that_is_too_large():
    with pytest.raises(ConfigError, match=r"40,981 x 40,981 items, which takes 20\.2 GB, .* use itemknn"):
        EASE(40_981)
    with pytest.raises(ConfigError, match="max_items is 5"):
        EASE(6, max_items=5)


def test_ease_of_a_singular_matrix():
    train = csr_array(np.ones((3, 4), dtype=np.float32))
    with pytest.raises(RecsysError, match=r"raise model\.regularization"):
        fitted(EASE, train, regularization=1e-300)


def test_fitting_again_forgets_what_was_fitted():
    first, second = random_matrix(seed=1), random_matrix(seed=2)
    for kind in FITTED.values():
        model, other = fitted(kind, first), fitted(kind, second)
        model.fit(second)
        torch.testing.assert_close(model.score(NOBODY, second[:4]), other.score(NOBODY, second[:4]))


@pytest.mark.parametrize("model", sorted(FITTED))
def test_values_are_not_read_and_repeated_pairs_are_one(model):
    train = random_matrix()
    doubled = csr_array(
        (np.full(2 * train.nnz, 7.0), np.repeat(train.indices, 2), train.indptr * 2), train.shape
    )
    models = [build_model({"name": model}, matrix) for matrix in (train, doubled)]
    for one, matrix in zip(models, (train, doubled), strict=True):
        one.fit(matrix)
    states = [one.state_dict() for one in models]
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name])


# ---- runs


@pytest.mark.parametrize("model", sorted(FITTED))
def test_a_run(make_config, tiny, tmp_path, model):
    records = []
    config = make_config("dense", model=model)
    metrics = session.train(config, tmp_path / "run", dataset=tiny, quiet=True, on_epoch=records.append)
    assert (metrics["epochs"], metrics["best_epoch"], metrics["steps"]) == (1, 1, 0)
    assert metrics["parameters_stored"] > 0
    sizes = metrics["resident_bytes"]
    assert sizes["other"] == sizes["total"] > 0
    assert metrics["test"]["ndcg@20"] > 0.15
    assert [record["validation"] for record in records] == [metrics["validation"]]
    assert "loss" not in records[0]
    folder = RunFolder.open(tmp_path / "run")
    assert folder.log() == records
    assert session.resume(tmp_path / "run", dataset=tiny) == metrics
    assert session.evaluate_run(tmp_path / "run") == {k: metrics[k] for k in ("validation", "test")}
    (tmp_path / "run" / "metrics.json").unlink()
    assert session.resume(tmp_path / "run", dataset=tiny)["test"] == metrics["test"]


def test_a_run_that_was_cut_off_before_the_fit(make_config, tiny, tmp_path, monkeypatch):
    def interrupt(self, train):
        raise KeyboardInterrupt

    config = make_config("dense", model="ease")
    with monkeypatch.context() as patch:
        patch.setattr(EASE, "fit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.train(config, tmp_path / "run", dataset=tiny, quiet=True)
    assert session.resume(tmp_path / "run", dataset=tiny, quiet=True)["test"]["ndcg@20"] > 0.15


def test_a_run_without_validation_users(make_config, tmp_path):
    config = make_config("dense", "data.options.validation=0", model="itemknn")
    metrics = session.train(config, tmp_path / "run", quiet=True)
    assert metrics["validation"] == {}
    assert metrics["best_epoch"] == 1


@pytest.mark.parametrize("model", sorted(FITTED))
@pytest.mark.parametrize("method", ["masked", "static", "dsl"])
def test_other_methods_are_refused(make_config, tiny, tmp_path, model, method):
    for density in (0.4, 1):
        config = make_config(method, f"sparsity.density={density}", model=model)
        with pytest.raises(ConfigError, match=rf"{model} has no weights .* got '{method}'"):
            session.train(config, tmp_path / "run", dataset=tiny, quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_method_is_dense_where_none_is_given():
    config = load_config(options={"model.name": "ease"})
    assert config.sparsity.method == "dense"
    assert load_config(options={"model.name": "ease", "sparsity.method": "dsl"}).sparsity.method == "dsl"
    assert load_config(options={"model.name": "cdae"}).sparsity.method == "dsl"
    assert config.replace(train={"seed": 3}).sparsity.method == "dense"


def test_there_is_no_loss(tiny):
    model = build_model({"name": "popularity"}, tiny.train)
    assert list(model.batches(tiny, 8, torch.Generator())) == []
    with pytest.raises(RecsysError, match="Popularity has no loss"):
        model.loss(None, 0)


# ---- saved


@pytest.mark.parametrize("model", sorted(FITTED))
def test_saved_recommender_is_loaded_without_a_fit(make_config, tiny, tmp_path, model, monkeypatch):
    trainer = Trainer(make_config("dense", model=model), tiny)
    session.fit(trainer, quiet=True)
    session.saved_recommender(trainer).save(tmp_path / "saved")
    monkeypatch.setattr(FITTED[model], "fit", None)
    saved = SavedRecommender.load(tmp_path / "saved")
    seen = tiny.train[[17]]
    scores = trainer.model.score(np.array([17]), seen)[0].numpy()
    scores[seen.indices] = -np.inf
    best = np.argsort(-scores, kind="stable")[:5]
    ours = saved.recommend(str(tiny.user_ids[17]), k=5)
    assert [score for _, score in ours] == pytest.approx(scores[best].tolist())
    folded = saved.recommend(items=tiny.item_ids[seen.indices].tolist(), k=5)
    assert folded == ours
    assert len(saved.recommend(items=[], k=3)) == 3


@pytest.mark.parametrize("model", sorted(FITTED))
def test_commands(tmp_path, model):
    def call(*arguments):
        result = CliRunner(env={"COLUMNS": "400"}).invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    data = "data.options={users=120, items=60, interactions=1800, clusters=6}"
    output = call("train", "--model", model, "--set", data, "-o", tmp_path / "run")
    assert "epoch    1  recall@20" in output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"{metrics['test']['ndcg@20']:.4f}" in call("evaluate", tmp_path / "run")
    assert len(call("recommend", tmp_path / "run", "--user", "u0007", "-k", 3).splitlines()) == 3
    assert len(call("recommend", tmp_path / "run", "--item", "i0007", "-k", 3).splitlines()) == 3
