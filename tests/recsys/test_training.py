"""The loop: every method learns, the same seed gives the same run, a resumed run is the same run."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch

import sparsecore
from recsys.config import Config
from recsys.data import load
from recsys.errors import ConfigError, DataError, OutputExistsError, RecsysError
from recsys.models import losses
from recsys.models.base import Interactions
from recsys.models.build import MODELS
from recsys.recommender import SavedRecommender
from recsys.training import session
from recsys.training.probe import StepProbe
from recsys.training.refit import refit
from recsys.training.run_folder import RunFolder
from recsys.training.trainer import Trainer
from sparsecore.backends.numba import memory

pytestmark = pytest.mark.feature("training, resuming")

TINY_DATA = {"users": 120, "items": 60, "interactions": 1800, "clusters": 6}
METHODS = ["dense", "masked", "static", "dsl"]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(make_config, tiny, method, model):
    config = make_config(method, model=model)
    trainer = Trainer(config, tiny)
    before = trainer.evaluate(tiny.test)["ndcg@20"]
    records = []
    metrics = session.fit(trainer, quiet=True, on_epoch=records.append)
    assert metrics["test"]["ndcg@20"] > 1.15 * before
    assert records[-1]["loss"] < records[0]["loss"]
    explorations = sum(record["explorations"] for record in records)
    expected = trainer.step // 5 if method in ("masked", "dsl") else 0
    assert explorations == expected
    nnz = [record["nnz"] for record in records]
    assert all(counts == nnz[0] for counts in nnz)
    assert metrics["nnz"] == nnz[0]


def test_an_offset_lets_sparse_ultragcn_learn_with_the_weights_of_its_paper(make_config, tiny):
    """Without it an item that shares no stored column with a user scores 0, ahead of the negative scores of others."""
    weights = ("model.negative_weight=100", "model.init_std=1e-4", "sparsity.density=0.25", "train.epochs=15")
    reached = {
        (offset, seed): session.train(
            make_config("static", *weights, f"model.offset={offset}", f"train.seed={seed}", model="ultragcn"),
            dataset=tiny,
            quiet=True,
        )["validation"]["ndcg@20"]
        for offset in ("none", "prior")
        for seed in (0, 1)
    }
    # Means of 0.26 and 0.15; dense has 0.35 without it.
    assert sum(reached["prior", seed] for seed in (0, 1)) > 1.3 * sum(
        reached["none", seed] for seed in (0, 1)
    )


@pytest.mark.parametrize("method", METHODS)
def test_nnz_is_the_density_of_every_weight(make_config, tiny, method):
    trainer = Trainer(make_config(method), tiny)
    nnz = session.nnz_per_tensor(trainer.model, trainer.explorer)
    for layer, size in (("input", 60 * 32), ("posterior", 32 * 16), ("decoder", 8 * 32), ("output", 32 * 60)):
        stored = [count for name, count in nnz.items() if name in (f"{layer}.weight", f"{layer}.values")]
        assert stored == [size if method == "dense" else round(0.4 * size)]


@pytest.mark.parametrize("method", ["masked", "static", "dsl"])
def test_chosen_weights_are_sparse_and_others_dense(make_config, tiny, method):
    config = make_config(method, 'sparsity.include=["output", "in*"]', 'sparsity.exclude=["input"]')
    nnz = session.nnz_per_tensor((trainer := Trainer(config, tiny)).model, trainer.explorer)
    stored = {name.rpartition(".")[0]: count for name, count in nnz.items() if "bias" not in name}
    sizes = {"input": 60 * 32, "posterior": 32 * 16, "decoder": 8 * 32, "output": round(0.4 * 32 * 60)}
    assert stored == sizes
    metrics = session.train(config, dataset=tiny, quiet=True)
    assert metrics["nnz"] == nnz


@pytest.mark.parametrize("method", ["masked", "static", "dsl"])
def test_weights_of_the_paper(make_config, tiny, method):
    trainer = Trainer(make_config(method, "sparsity.weights=paper"), tiny)
    nnz = session.nnz_per_tensor(trainer.model, trainer.explorer)
    assert len(nnz) == 8
    assert sum(nnz.values()) == pytest.approx(
        0.4 * sum(p.numel() for p in Trainer(make_config("dense"), tiny).model.parameters()), abs=4
    )


@pytest.mark.parametrize("weights", ["full", "paper"])
@pytest.mark.parametrize("model", MODELS)
def test_masked_is_dsl_simulated_from_the_same_beginning(make_config, tiny, model, weights):
    """Index sets are the same after an exploration, and losses but for rounding."""
    trainers = [
        Trainer(make_config(method, f"sparsity.weights={weights}", "train.epochs=2", model=model), tiny)
        for method in ("masked", "dsl")
    ]
    found = []
    for trainer in trainers:
        steps = iter(trainer.model.batches(tiny, trainer.config.train.batch_size, trainer.order))
        found.append([float(trainer.train_step(batch)) for batch, _ in zip(steps, range(6), strict=False)])
        assert trainer.explorer.steps > trainer.config.sparsity.interval
    masked, dsl = trainers
    np.testing.assert_allclose(*found, rtol=2e-4)
    expected = sparsecore.masks_of(dsl.model)
    assert expected.keys() == masked.explorer.masks.keys()
    for name, mask in masked.explorer.masks.items():
        differing = int((mask != expected[name]).sum())
        assert differing <= 0.002 * mask.numel(), name  # ties of gradients that rounding decides


def test_a_part_trained_on_another_split_is_refused(make_config, tiny, tmp_path):
    """It would have seen this run's validation and test."""
    session.train(
        make_config("dense", "train.epochs=1", "data.seed=2", model="bprmf"), tmp_path / "part", quiet=True
    )
    config = make_config("dense", f"train.pretrained.bprmf={tmp_path / 'part'}", model="convncf")
    with pytest.raises(ConfigError, match=r"interactions that are not in this run's training part"):
        Trainer(config, load("synthetic", seed=1, **TINY_DATA))


@pytest.mark.parametrize("model", ["bprmf", "sasrec"])
def test_held_out_users_are_refused_before_training(make_config, tmp_path, model):
    config = make_config("dense", "data.options.split=heldout", model=model)
    with pytest.raises(ConfigError, match="holds users out"):
        session.train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_given_test_users_without_training_interactions_are_counted(make_config, tmp_path):
    """A model with a row of each user ranks for them by a row that was never trained."""
    folder = tmp_path / "data" / "given"
    folder.mkdir(parents=True)
    rows = [f"{user},{item}" for user in range(9) for item in range(user % 3, 12, 2)]
    (folder / "train.csv").write_text("\n".join(["user,item", *rows]))
    (folder / "test.csv").write_text("user,item\n0,11\n1,0\n90,3\n91,4\n91,5")
    config = make_config(
        "dense", "data.name=given", f"data.dir={tmp_path / 'data'}", "data.options={}", "train.epochs=1"
    )
    metrics = session.train(config, quiet=True)
    expected = {"evaluated": 4, "all": 11, "without_train": 2, "fewer_candidates": 0}
    assert metrics["users"]["test"] == expected
    assert metrics["users"]["validation"]["without_train"] == 0
    (note,) = [note for note in metrics["dataset"]["notes"] if "no interaction in train" in note]
    assert note.startswith("test: 2 of 4 users with targets")


def test_nobody_to_test_is_found_before_training(make_config, tmp_path):
    with pytest.raises(DataError, match="no user has a test item"):
        session.train(make_config("dense", "data.options.test=0"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_there(make_config, tiny):
    with pytest.raises(ConfigError, match=r"sparsity.exclude: no weight of multvae matches 'outptu'.*output"):
        Trainer(make_config("dsl", 'sparsity.exclude=["outptu"]'), tiny)
    with pytest.raises(ConfigError, match=r"leave no weight of multvae to be sparse.*output"):
        Trainer(make_config("dsl", 'sparsity.exclude=["*"]'), tiny)


@pytest.mark.parametrize("method", METHODS)
def test_adagrad(make_config, tiny, method):
    metrics = session.train(
        make_config(method, "train.optimizer=adagrad", "train.lr=0.05"), dataset=tiny, quiet=True
    )
    assert metrics["test"]["ndcg@20"] > 0.15


def test_without_validation_users_the_last_epoch_is_taken(make_config, tiny, tmp_path):
    config = make_config("dsl", "data.options.validation=0", "train.epochs=3", "train.patience=1")
    metrics = session.train(config, tmp_path / "run", quiet=True)
    assert metrics["validation"] == {}
    assert metrics["best_epoch"] == metrics["epochs"] == 3
    assert session.evaluate_run(tmp_path / "run") == {"validation": {}, "test": metrics["test"]}


def test_methods_with_one_seed_see_the_same_batches(make_config, tiny):
    orders = {tuple(Trainer(make_config(m), tiny).order.get_state().tolist()) for m in METHODS}
    noises = {tuple(Trainer(make_config(m), tiny).model.noise.get_state().tolist()) for m in METHODS}
    assert len(orders) == len(noises) == 1


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_run_and_other_seed_another(make_config, tiny, method):
    runs = []
    for seed in (3, 3, 4):
        trainer = Trainer(make_config(method, f"train.seed={seed}", "train.epochs=3"), tiny)
        torch.manual_seed(len(runs))  # nothing may depend on torch's global generator
        torch.rand(len(runs))
        metrics = session.fit(trainer, quiet=True)
        runs.append((metrics["test"], metrics["validation"], weights(trainer)))
    assert runs[0][:2] == runs[1][:2]
    assert_same(runs[0][2], runs[1][2])
    assert not torch.equal(runs[0][2]["input_bias"], runs[2][2]["input_bias"])


@pytest.mark.parametrize(
    ("model", "kernels"),
    [
        ("bprmf", {"gather_dot", "scatter"}),
        ("lightgcn", {"graph", "table_rows"}),
        ("multvae", {"few_spmm", "panel_sddmm"}),
    ],
)
def test_same_seed_same_run_with_two_threads(make_config, tiny, two_threads, model, kernels):
    trainers = [Trainer(make_config("dsl", "train.epochs=1", model=model), tiny) for _ in range(2)]
    metrics = [session.fit(trainer, quiet=True)["test"] for trainer in trainers]
    assert kernels | {"index_set"} <= two_threads
    assert metrics[0] == metrics[1]
    assert_same(*map(weights, trainers))


@pytest.mark.parametrize("model", sorted({*MODELS} - {"bprmf", "lightgcn", "ultragcn"}))
@pytest.mark.parametrize("method", ["dense", "dsl"])
def test_bfloat16_products_train_float32_weights_as_well(make_config, tiny, method, model):
    trainers = []
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(make_config(method, f"train.precision={precision}", model=model), tiny)
        while not trainer.finished:
            trainer.run_epoch()
        trainers.append(trainer)
    exact, rounded = trainers
    assert rounded.best_value >= 0.9 * exact.best_value
    held = [*rounded.model.state_dict().values()]
    if rounded.optimizer is not None:
        held += [
            value for state in rounded.optimizer.state_dict()["state"].values() for value in state.values()
        ]
    assert not any(value.dtype == torch.bfloat16 for value in held if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("loss", ["bernoulli", "multinomial", "sampled"])
def test_losses_of_16_bit_logits_are_those_of_the_same_numbers_in_32(loss):
    torch.manual_seed(0)
    batch = Interactions(torch.tensor([0, 3, 5, 1]), torch.tensor([0, 3, 3, 4]))
    logits = 8 * torch.randn(3, 4000).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        given = logits.to(dtype, copy=True).requires_grad_()
        if loss == "sampled":
            value = losses.sampled_bernoulli_nll(given, batch, torch.tensor([0, 2]), torch.tensor([7, 9]))
        else:
            value = getattr(losses, f"{loss}_nll")(given, batch)
        value.backward()
        assert value.dtype == torch.float32
        assert given.grad.dtype == dtype
        results.append((value.detach(), given.grad.float()))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (7,), (3, 4), (2, 3, 4)])
def test_squared_norm(shape):
    x = torch.randn(shape, dtype=torch.float64).transpose(0, -1).requires_grad_()
    assert losses.squared_norm(x).item() == pytest.approx(x.detach().square().sum().item())
    assert torch.autograd.gradcheck(losses.squared_norm, x)


@pytest.mark.parametrize(
    ("schedule", "shape"), [("cosine", [0.853553, 0.5, 0.146447, 0.0]), ("linear", [0.75, 0.5, 0.25, 0.0])]
)
def test_the_rate_falls_to_zero_and_is_kept_in_checkpoints(make_config, tiny, schedule, shape):
    config = make_config("dsl", "train.epochs=4", f"train.lr_schedule={schedule}")
    trainer, resumed, rates = Trainer(config, tiny), Trainer(config, tiny), []
    for epoch in range(4):
        trainer.run_epoch()
        rates.append(trainer.optimizer.param_groups[0]["lr"] / config.train.lr)
        if epoch == 1:
            resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert rates == pytest.approx(shape, abs=1e-6)
    resumed.run_epoch()
    resumed.run_epoch()
    assert_same(weights(trainer), weights(resumed))


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_uninterrupted_run(make_config, tiny, tmp_path, method, model):
    config = make_config(method, "train.epochs=6", model=model)
    whole = session.train(config, tmp_path / "whole", dataset=tiny, quiet=True)

    def interrupt(record):
        if record["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.train(config, tmp_path / "cut", dataset=tiny, quiet=True, on_epoch=interrupt)
    folder = RunFolder.open(tmp_path / "cut")
    assert folder.load_checkpoint()["epoch"] == 3
    assert folder.metrics() is None
    resumed = session.resume(tmp_path / "cut", dataset=tiny, quiet=True)
    same = ("test", "validation", "best_epoch", "epochs", "steps", "nnz", "beyond_accuracy", "macs_per_step")
    for key in same:
        assert resumed[key] == whole[key], key
    states = [RunFolder(tmp_path / name).load_checkpoint() for name in ("whole", "cut")]
    assert_same(states[0]["model"], states[1]["model"])
    for one, other in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
        assert_same(one, other)
    assert_same(RunFolder(tmp_path / "whole").load_best(), folder.load_best())
    logs = [RunFolder(tmp_path / name).log() for name in ("whole", "cut")]
    for one, other in zip(*logs, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_interruption_in_the_middle_of_an_epoch(make_config, tiny, tmp_path, monkeypatch):
    config = make_config("dsl", "train.epochs=4")
    whole = session.train(config, tmp_path / "whole", dataset=tiny, quiet=True)
    original, calls = Trainer.train_step, []

    def interrupted(self, *args):
        calls.append(0)
        if len(calls) == 20:  # 8 steps an epoch: the third one
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.train(config, tmp_path / "cut", dataset=tiny, quiet=True)
    assert RunFolder(tmp_path / "cut").load_checkpoint()["epoch"] == 2
    assert session.resume(tmp_path / "cut", dataset=tiny, quiet=True)["test"] == whole["test"]


def test_interruption_before_the_first_epoch_can_be_resumed(make_config, tiny, tmp_path, monkeypatch):
    config = make_config("dsl", "train.epochs=2")

    def interrupt(self, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.train(config, tmp_path / "run", dataset=tiny, quiet=True)
    resumed = session.resume(tmp_path / "run", dataset=tiny, quiet=True)
    assert resumed["test"] == session.train(config, dataset=tiny, quiet=True)["test"]


def test_crash_between_best_weights_and_checkpoint(make_config, tiny, tmp_path, monkeypatch):
    config = make_config("dsl", "train.epochs=4")
    whole = session.train(config, tmp_path / "whole", dataset=tiny, quiet=True)
    original = RunFolder.save_checkpoint

    def crash(self, state):
        if state["epoch"] == 2:
            raise KeyboardInterrupt
        original(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", crash)
        with pytest.raises(KeyboardInterrupt):
            session.train(config, tmp_path / "cut", dataset=tiny, quiet=True)
    folder = RunFolder(tmp_path / "cut")
    assert [record["epoch"] for record in folder.log()] == [1, 2]
    assert session.resume(tmp_path / "cut", dataset=tiny, quiet=True)["test"] == whole["test"]
    assert [record["epoch"] for record in folder.log()] == [1, 2, 3, 4]


def test_checkpoint_of_other_settings_is_refused(make_config, tiny):
    state = Trainer(make_config("dsl"), tiny).state_dict()
    with pytest.raises(RecsysError, match="other settings"):
        Trainer(make_config("dsl", "train.lr=0.5"), tiny).load_state_dict(state)


def test_early_stopping_and_the_best_epoch(make_config, tiny, monkeypatch):
    trainer = Trainer(make_config("dense", "train.patience=2", "train.epochs=20"), tiny)
    values = iter([0.1, 0.3, 0.2, 0.3, 0.9])

    def scripted(self, eval_set):
        return {"ndcg@20": next(values) if eval_set is tiny.validation else math.nan}

    kept = []
    monkeypatch.setattr(Trainer, "evaluate", scripted)
    metrics = session.fit(trainer, quiet=True, on_epoch=lambda record: kept.append(weights(trainer)))
    assert (metrics["best_epoch"], metrics["epochs"]) == (2, 4)
    assert metrics["validation"] == {"ndcg@20": 0.3}
    assert_same(weights(trainer), kept[1])


def test_patience_counts_from_evaluation_to_evaluation(make_config, tiny, monkeypatch):
    """An epoch that was not evaluated has not failed to improve."""
    values = iter([0.1, 0.3, 0.2, 0.2, 0.2])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, eval_set: {"ndcg@20": next(values)})
    config = make_config("dense", "train.patience=3", "train.evaluate_every=4", "train.epochs=20")
    trainer, evaluated = Trainer(config, tiny), []
    while not trainer.finished:
        evaluated.append("validation" in trainer.run_epoch())
    assert (trainer.best_epoch, trainer.epoch) == (8, 12)
    assert evaluated[-1]


def test_data_that_has_changed_is_refused(make_config, tmp_path):
    """A row less in the file is another split: what was validation is trained on then."""
    rows = [f"{user},{item}" for user in range(30) for item in range(user % 3, 20, 2)]
    file = tmp_path / "own.csv"
    file.write_text("\n".join(["user,item", *rows]))
    data = (f"data.name={file}", "data.options={}", "train.epochs=2")
    config = make_config("dense", *data, model="bprmf")
    session.train(config, tmp_path / "done", quiet=True)
    with pytest.raises(KeyboardInterrupt):
        session.train(config, tmp_path / "cut", quiet=True, on_epoch=_stop_at(1))
    with pytest.raises(KeyboardInterrupt):
        session.train(config, tmp_path / "old", quiet=True, on_epoch=_stop_at(1))
    old = RunFolder(tmp_path / "old")
    old.save_checkpoint({k: v for k, v in old.load_checkpoint().items() if k != "split"})
    file.write_text("\n".join(["user,item", *rows[:-1]]))
    for call in (session.resume, session.evaluate_run):
        with pytest.raises(DataError, match=r"no longer the data that .* was begun with"):
            call(tmp_path / "cut")
    with pytest.raises(DataError, match="no longer the data"):
        session.evaluate_run(tmp_path / "done")
    with pytest.raises(DataError, match="no longer the data"):
        refit(tmp_path / "done", tmp_path / "again")
    session.resume(tmp_path / "old", quiet=True)
    file.write_text("\n".join(["user,item", *rows]))
    session.resume(tmp_path / "cut", quiet=True)


def test_an_evaluation_leaves_no_memory_of_its_scores(make_config, tiny, monkeypatch):
    """They would count as bytes of training from then on."""
    monkeypatch.setattr(memory, "_LARGE", 1)
    trainer = Trainer(make_config("static"), tiny)
    with torch.no_grad():
        trainer.model.score(np.arange(tiny.train.shape[0]), tiny.train)
    by_numba = sparsecore.backends.backend_name(torch.device("cpu")) == "numba"
    assert (sparsecore.resident_bytes(trainer.model).results > 0) == by_numba
    trainer.evaluate(tiny.validation)
    assert sparsecore.resident_bytes(trainer.model).results == 0


def test_evaluate_every_and_last_epoch(make_config, tiny):
    records = []
    config = make_config("dense", "train.evaluate_every=2", "train.epochs=5")
    session.fit(Trainer(config, tiny), quiet=True, on_epoch=records.append)
    assert [record["epoch"] for record in records if "validation" in record] == [2, 4, 5]


def test_test_users_are_scored_once_and_after_training(make_config, monkeypatch):
    """Held-out users, so that a user scored can be told by their history: validation chooses, test is seen once."""
    config = make_config("dsl", "train.epochs=3", "data.options.split=heldout", "evaluation.batch_size=7")
    data = session.load_dataset(config)
    trainer = Trainer(config, data)

    def histories(eval_set):
        rows = eval_set.inputs[eval_set.rows_with_targets].toarray()
        return [tuple(row.nonzero()[0].tolist()) for row in rows]

    validation, test = histories(data.validation), histories(data.test)
    assert not set(validation) & set(test)
    original, seen = trainer.model.score, []

    def watched(users, inputs):
        seen.extend((trainer.epoch, tuple(row.nonzero()[0].tolist())) for row in inputs.toarray())
        return original(users, inputs)

    monkeypatch.setattr(trainer.model, "score", watched)
    best = []
    metrics = session.fit(
        trainer, quiet=True, on_epoch=lambda record: best.append(record["validation"]["ndcg@20"])
    )
    expected = [(epoch, row) for epoch in (1, 2, 3) for row in validation] + [(3, row) for row in test]
    assert seen == expected
    assert metrics["best_epoch"] == 1 + best.index(max(best))


def test_divergence_is_reported(make_config, tiny, tmp_path):
    for method in ("dense", "masked", "static", "dsl"):
        config = make_config(method, "train.lr=1e30", "sparsity.interval=1")
        with pytest.raises(RecsysError, match=r"in epoch 1: training has diverged.*train\.lr"):
            session.train(config, tmp_path / method, dataset=tiny, quiet=True)


def test_an_overwritten_run_is_served_until_the_new_one_is_ready(make_config, tiny, tmp_path):
    place = tmp_path / "live"
    session.train(make_config("dsl", "train.epochs=1"), place, dataset=tiny, quiet=True)
    before = SavedRecommender.load(place).recommend("u0001")
    with pytest.raises(RecsysError, match="diverged"):
        session.train(make_config("dense", "train.lr=1e30"), place, dataset=tiny, quiet=True, overwrite=True)
    assert RunFolder(place).metrics() is None
    assert SavedRecommender.load(place).recommend("u0001") == before
    session.train(make_config("dense", "train.epochs=2"), place, dataset=tiny, quiet=True, overwrite=True)
    assert SavedRecommender.load(place).recommend("u0001") != before


def test_run_folder_contents(make_config, tiny, tmp_path):
    config = make_config("dsl", "train.epochs=2")
    returned = session.train(config, tmp_path / "run", dataset=tiny, quiet=True)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "config.toml",
        "log.jsonl",
        "checkpoint.pt",
        "best.safetensors",
        "metrics.json",
        "per_user.npz",
        "recommender",
    }
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics == returned
    assert metrics["config_hash"] == config.hash
    assert metrics["versions"]["torch"] == torch.__version__
    sizes = metrics["resident_bytes"]
    assert sizes["total"] == sum(size for name, size in sizes.items() if name != "total")
    assert sizes["gradients"] > 0
    assert sizes["optimizer_state"] >= 2 * sizes["gradients"]
    assert metrics["protocol"] == {"validation": {"ranking": "full"}, "test": {"ranking": "full"}}
    assert metrics["users"]["test"] == {
        "evaluated": len(tiny.test.rows_with_targets),
        "all": len(tiny.test),
        "without_train": 0,
        "fewer_candidates": 0,
    }
    assert metrics["split"] == tiny.fingerprint
    assert all(metrics["macs_per_step"][name] > 0 for name in ("forward", "backward", "exploration"))
    assert {"coverage@20", "novelty@20", "gini@20", "recall_tail@20"} <= metrics["beyond_accuracy"].keys()
    ids, values = RunFolder(tmp_path / "run").per_user()
    assert ids.tolist() == tiny.test.user_ids[tiny.test.rows_with_targets].tolist()
    assert {name: array.mean() for name, array in values.items()} == pytest.approx(metrics["test"])
    record = RunFolder(tmp_path / "run").log()[-1]
    for key in ("epoch", "loss", "validation", "nnz", "drop_fraction", "ever_active", "seconds"):
        assert key in record
    assert 0.4 <= record["ever_active"] <= 1
    assert session.resume(tmp_path / "run", dataset=tiny) == returned
    evaluated = session.evaluate_run(tmp_path / "run")
    assert evaluated == {"validation": metrics["validation"], "test": metrics["test"]}


def test_resident_bytes_rank_as_they_should(make_config, tiny):
    totals = {}
    for method in METHODS:
        trainer = Trainer(make_config(method, "train.epochs=1"), tiny)
        totals[method] = session.fit(trainer, quiet=True)["resident_bytes"]["total"]
    # DSL keeps a bit for every position that was ever active.
    assert totals["masked"] > totals["dense"] > totals["dsl"] > totals["static"]


def test_existing_output_is_refused_before_anything_is_loaded(make_config, tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("x")
    monkeypatch.setattr(session, "load", lambda *a, **k: pytest.fail("data was loaded"))
    with pytest.raises(OutputExistsError):
        session.train(make_config(), tmp_path, quiet=True)


def test_nothing_is_written_for_bad_data_or_density(make_config, tmp_path):
    with pytest.raises(RecsysError, match="nearest"):
        session.train(make_config("dsl", "data.options={itms=3}"), tmp_path / "run", quiet=True)
    with pytest.raises(sparsecore.SparsecoreError, match="density"):
        session.train(make_config("dsl", "sparsity.density=1e-9"), tmp_path / "run", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_density_one_needs_no_explorer(make_config, tiny):
    trainer = Trainer(make_config("dsl", "sparsity.density=1", "train.epochs=1"), tiny)
    assert trainer.explorer is None
    session.fit(trainer, quiet=True)


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("method", METHODS)
def test_counting_multiply_adds_changes_nothing(make_config, tiny, monkeypatch, method, model):
    config = make_config(method, "train.epochs=2", "train.evaluate_every=2", model=model)
    counted = Trainer(config, tiny)
    counted.run_epoch()
    plain = Trainer(config, tiny)
    monkeypatch.setattr(Trainer, "_counted_step", Trainer.train_step)
    plain.run_epoch()
    assert_same(weights(counted), weights(plain))
    assert plain.macs == {}
    probe = StepProbe(config, tiny)
    expected = {"forward", "backward"} | ({"exploration"} if counted.explorer is not None else set())
    assert counted.macs.keys() == expected
    # Another batch: about the same work.
    for name, macs in probe.macs().items():
        assert counted.macs.get(name, 0.0) == pytest.approx(macs, rel=0.2)


def test_sampled_protocol_of_a_run(make_config, tiny, tmp_path):
    settings = (
        "evaluation.protocol=sampled",
        "evaluation.negatives=9",
        "evaluation.seed=4",
        "train.epochs=2",
    )
    config = make_config("dsl", *settings, model="bprmf")
    metrics = session.train(config, tmp_path / "run", dataset=tiny, quiet=True)
    drawn = {"ranking": "sampled", "negatives": 9, "candidates": "drawn", "seed": 4}
    assert metrics["protocol"] == {"validation": drawn, "test": drawn}
    assert "coverage@20" not in metrics["beyond_accuracy"]
    assert "recall_tail@20" in metrics["beyond_accuracy"]
    again = session.evaluate_run(tmp_path / "run")
    assert again == {"validation": metrics["validation"], "test": metrics["test"]}
    full = make_config("dsl", "train.epochs=2", model="bprmf")
    assert session.train(full, dataset=tiny, quiet=True)["test"]["hr@20"] < metrics["test"]["hr@20"]


@pytest.mark.parametrize("size", [1000, 100 << 20])
def test_large_checkpoints_are_written_less_often(size, tmp_path, monkeypatch):
    now, written = 0.0, []
    monkeypatch.setattr(session.time, "monotonic", lambda: now)
    file = tmp_path / "checkpoint.pt"
    with file.open("wb") as sparse:
        sparse.truncate(size)
    pace = session._Pace(file)
    for epoch in range(30):
        now += 1.0
        with pace.writing(epoch == 29) as due:
            if due:
                now += 2.0
                written.append(epoch)
    assert written == (list(range(30)) if size == 1000 else [0, 18, 29])


def test_a_run_with_large_checkpoints_goes_on_from_one_and_keeps_its_best(
    make_config, tiny, tmp_path, monkeypatch
):
    config = make_config("dsl", "train.epochs=6")
    whole = session.train(config, tmp_path / "whole", dataset=tiny, quiet=True)
    monkeypatch.setattr(session, "_LARGE", 0)
    monkeypatch.setattr(session._Pace, "writing", _every_fourth())
    with pytest.raises(KeyboardInterrupt):
        session.train(config, tmp_path / "cut", dataset=tiny, quiet=True, on_epoch=_stop_at(4))
    assert RunFolder(tmp_path / "cut").load_checkpoint()["epoch"] == 1
    assert len(RunFolder(tmp_path / "cut").log()) == 4
    resumed = session.resume(tmp_path / "cut", dataset=tiny, quiet=True)
    assert resumed["test"] == whole["test"]
    assert resumed["best_epoch"] == whole["best_epoch"]
    assert [r["epoch"] for r in RunFolder(tmp_path / "cut").log()] == [1, 2, 3, 4, 5, 6]


def _every_fourth():
    epochs = itertools.count()

    @contextlib.contextmanager
    def writing(self, always):
        yield always or next(epochs) % 4 == 0

    return writing


def _stop_at(epoch):
    def listener(record):
        if record["epoch"] == epoch:
            raise KeyboardInterrupt

    return listener


def test_data_options_that_are_settings_of_their_own_are_named():
    config = Config.model_validate({"data": {"name": "synthetic", "options": {"seed": 3}}})
    with pytest.raises(
        ConfigError, match=r"data\.options\.seed is no option of a data set; did you mean data\.seed"
    ):
        session.load_dataset(config)
