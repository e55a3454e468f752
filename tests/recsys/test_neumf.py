"""NeuMF against its formulas written out with plain tensors; what its batches may know; its pre-trained parts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array

from recsys.data import load
from recsys.errors import ConfigError, DataError, RecsysError
from recsys.models import neumf
from recsys.models.base import Triples
from recsys.models.bprmf import BPRMF
from recsys.models.layers import Density, dropout
from recsys.models.neumf import NeuMF
from recsys.models.transfer import _carried_mask, dense_weight
from recsys.training import session
from recsys.training.trainer import Trainer
from sparsecore.nn.base import SparseModule

pytestmark = pytest.mark.feature("models")

TRAIN = csr_array((np.random.default_rng(0).random((9, 14)) < 0.4).astype(np.float32))
WIDTHS = {"factors": 4, "layers": [12, 10, 6, 5]}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(density=1.0, seed=0, **options):
    options = {**WIDTHS, "init_std": 0.7, **options}
    return NeuMF(TRAIN.shape, **options, density=density, generator=generator(seed)).double()


def plain_weights(model):
    """Every weight as a plain dense tensor that takes a gradient, by name."""
    weights = {name: dense_weight(model.get_submodule(name)) for name in model.matrices}
    biases = {name: p.detach() for name, p in model.named_parameters() if name.endswith("bias")}
    return {name: tensor.clone().requires_grad_() for name, tensor in {**weights, **biases}.items()}


def plain_scores(w, users, items, parts="both"):
    """(B, M) logits by the formula of He et al., with the concatenations written out."""
    users = users.unsqueeze(1).expand_as(items)
    features, output = [], []
    if parts != "mlp":
        features.append(w["gmf_users"][users] * w["gmf_items"][items])
        output.append(w["output_gmf"])
    if parts != "gmf":
        hidden = torch.cat((w["mlp_users"][users], w["mlp_items"][items]), dim=-1)
        matrix = torch.cat((w["hidden_user"], w["hidden_item"]), dim=1)
        hidden = torch.relu(hidden @ matrix.T + w["hidden_user.bias"])
        for k in range(2):
            hidden = torch.relu(hidden @ w[f"hidden.{k}"].T + w[f"hidden.{k}.bias"])
        features.append(hidden)
        output.append(w["output_mlp"])
    return torch.cat(features, dim=-1) @ torch.cat(output, dim=1)[0] + w["output_bias"]


def assert_gradients(model, weights):
    for name, expected in weights.items():
        layer = model.get_submodule(name) if name in model.matrices else None
        if isinstance(layer, SparseModule):
            torch.testing.assert_close(layer.values.grad, expected.grad[layer.pattern.to_mask()])
        else:
            ours = model.get_parameter(name if layer is None else f"{name}.weight")
            torch.testing.assert_close(ours.grad, expected.grad)


BATCH = Triples(
    torch.tensor([0, 3, 3, 8]),
    torch.tensor([1, 13, 2, 2]),
    torch.randint(14, (4, 3), generator=generator(5)),
)


@pytest.mark.parametrize("density", [1.0, 0.5, Density(0.5, NeuMF.paper)])
@pytest.mark.parametrize("parts", ["both", "gmf", "mlp"])
@pytest.mark.parametrize("catalogue", [False, True])
def test_loss_and_gradients_are_those_written_out(density, parts, catalogue):
    """`catalogue`: more items in the batch than there are, so that the first layer is made once for each."""
    model = make(density, parts=parts)
    batch = BATCH
    if catalogue:
        batch = Triples(BATCH.users, BATCH.positives, BATCH.negatives.repeat(1, 3))
    weights = plain_weights(model)
    scores = plain_scores(
        weights, batch.users, torch.cat((batch.positives[:, None], batch.negatives), 1), parts
    )
    truth = torch.zeros_like(scores)
    truth[:, 0] = 1
    expected = F.binary_cross_entropy_with_logits(scores, truth)
    loss = model.loss(batch, 0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_gradients(model, weights)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_loss_of_means_with_regularization(density):
    model = make(density, loss="means", regularization=0.3)
    w = plain_weights(model)
    items = torch.cat((BATCH.positives[:, None], BATCH.negatives), 1)
    scores = plain_scores(w, BATCH.users, items)
    expected = F.softplus(-scores[:, 0]).mean() + F.softplus(scores[:, 1:]).mean()
    for part in ("gmf", "mlp"):
        expected = expected + 0.15 * w[f"{part}_users"][BATCH.users].square().sum() / 4
        expected = expected + 0.15 * w[f"{part}_items"][items].square().sum() / 16
    loss = model.loss(BATCH, 0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_gradients(model, w)


@pytest.mark.parametrize("density", [1.0, 0.5, Density(0.5, NeuMF.paper)])
@pytest.mark.parametrize("parts", ["both", "gmf", "mlp"])
@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_scores_of_the_catalogue_and_of_some_items(density, parts, block, monkeypatch):
    monkeypatch.setattr(neumf, "_BLOCK", block)
    model = make(density, parts=parts, dropout=0.5).eval()
    users = np.array([8, 0, 0])
    everything = torch.arange(14).expand(3, 14)
    with torch.no_grad():
        expected = plain_scores(plain_weights(model), torch.from_numpy(users), everything, parts)
    for _ in range(2):  # the second time from what was kept
        torch.testing.assert_close(model.score(users, TRAIN[users]), expected)
    items = torch.randint(14, (3, 5), generator=generator(3))
    torch.testing.assert_close(model.score_items(users, TRAIN[users], items), expected.gather(1, items))
    with pytest.raises(DataError, match="9 users"):
        model.score(np.array([-1]), TRAIN[[0]])


def test_scores_are_refreshed_after_training_and_loading():
    model, other = make().eval(), make(seed=4).eval()
    first = model.score(np.array([0]), TRAIN[[0]])
    model.train()
    with torch.no_grad():
        model.mlp_items.weight.mul_(-1)
    assert not torch.equal(model.eval().score(np.array([0]), TRAIN[[0]]), first)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.score(np.array([0]), TRAIN[[0]]), other.score(np.array([0]), TRAIN[[0]]))


def test_initial_values():
    model = NeuMF((300, 400), factors=16, density=0.5, generator=generator())
    for name in ("gmf_users", "gmf_items", "mlp_users", "mlp_items"):
        assert float(model.get_submodule(name).values.detach().std()) == pytest.approx(0.01, rel=0.05)
    bound = (6 / (64 + 32)) ** 0.5  # of the whole first layer, not of its halves
    for name in ("hidden_user", "hidden_item"):
        assert float(model.get_submodule(name).values.detach().abs().max()) == pytest.approx(bound, rel=0.02)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_paper_prunes_the_tables_of_the_perceptron_and_full_everything():
    stored = {
        scope: {name.rpartition(".")[0] for name, _ in make(d).named_parameters() if name.endswith("values")}
        for scope, d in (("paper", Density(0.5, NeuMF.paper)), ("full", Density(0.5)))
    }
    assert stored["paper"] == {"mlp_users", "mlp_items"}
    assert stored["full"] == set(make().matrices)


def test_the_authors_of_dsl_have_their_widths():
    model = NeuMF(TRAIN.shape, factors=16, layers=[32, 32, 16, 8], dropout=0.2, negatives=100, loss="means")
    shapes = [tuple(layer.weight.shape) for layer in (model.gmf_users, model.mlp_items, *model.hidden)]
    assert shapes == [(9, 16), (14, 16), (16, 32), (8, 16)]
    assert model.output_gmf.in_features + model.output_mlp.in_features == 24


@pytest.mark.parametrize("layers", [[8], [9, 4]])
def test_impossible_layers(layers):
    with pytest.raises(ConfigError, match=r"model\.layers: expected an even width"):
        NeuMF(TRAIN.shape, layers=layers)


# ---- dropout


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.93])
def test_dropout_zeroes_the_share_and_keeps_the_mean(probability):
    out = dropout(torch.ones(333, 601), probability, generator())
    kept = out[out != 0]
    assert float((out == 0).float().mean()) == pytest.approx(probability, abs=4e-3)
    assert float(kept.max()) == float(kept.min()) == pytest.approx(1 / (1 - probability), rel=1e-3)
    # No place of the four that share a draw is different.
    assert (out.reshape(-1)[: 4 * 50_000].view(-1, 4) == 0).float().mean(0).numpy() == pytest.approx(
        probability, abs=0.01
    )
    assert torch.equal(out, dropout(torch.ones(333, 601), probability, generator()))


def test_dropout_is_the_same_for_every_density_and_only_in_training():
    states = [make(d, dropout=0.3).noise.get_state() for d in (1.0, 0.5, 0.2)]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
    model = make(dropout=0.5)
    losses = {float(model.loss(BATCH, 0).detach()) for _ in range(4)}
    assert len(losses) == 4
    torch.testing.assert_close(model.eval().loss(BATCH, 0), make().loss(BATCH, 0))


# ---- what training may know


def negatives_of(dataset, epochs, count=4):
    """{(user, positive): negatives} of every epoch of one run."""
    model, order = NeuMF(dataset.train.shape, negatives=count), generator(3)
    found = []
    for _ in range(epochs):
        batches = list(model.batches(dataset, 50, order))
        assert len(batches) == model.steps_per_epoch(dataset, 50)
        found.append(
            {
                (u, p): tuple(n)
                for b in batches
                for u, p, n in zip(b.users.tolist(), b.positives.tolist(), b.negatives.tolist(), strict=True)
            }
        )
    return found


def test_negatives_are_redrawn_each_epoch(tiny):
    """The DSL authors' loader gives every epoch the same 100 negatives of each user, those of their evaluation."""
    first, second = negatives_of(tiny, 2)
    assert first.keys() == second.keys()
    assert len(first) == tiny.n_interactions
    assert np.mean([first[pair] == second[pair] for pair in first]) < 0.01


def test_negatives_come_from_all_items_not_chosen(tiny):
    seen = np.zeros(tiny.train.shape, dtype=bool)
    for epoch in negatives_of(tiny, 30):
        for (user, _), drawn in epoch.items():
            seen[user, list(drawn)] = True
    free = tiny.train.toarray() == 0
    assert not seen[~free].any()
    active = np.diff(tiny.train.indptr) >= 5
    assert seen[active][free[active]].mean() > 0.99


def test_training_never_looks_at_what_evaluation_ranks(tiny):
    """Batches are the same whatever validation and test hold."""
    alone = negatives_of(tiny, 2)
    candidates = np.random.default_rng(0).integers(0, tiny.n_items, (len(tiny.test), 10))
    test = dataclasses.replace(tiny.test, candidates=candidates)
    validation = dataclasses.replace(
        tiny.validation, targets=csr_array(tiny.validation.targets.shape, dtype=np.float32)
    )
    assert negatives_of(dataclasses.replace(tiny, test=test, validation=validation), 2) == alone
    # Held-out items are not spared either: that would tell the model which they are.
    row = int(tiny.test.rows_with_targets[0])
    user, held_out = int(tiny.test.users[row]), set(tiny.test.targets[[row]].indices.tolist())
    drawn = {
        item
        for epoch in negatives_of(tiny, 30)
        for pair, items in epoch.items()
        if pair[0] == user
        for item in items
    }
    assert held_out & drawn


# ---- pre-trained parts


@pytest.mark.parametrize(("ours", "theirs"), [(1.0, 1.0), (0.5, 0.5), (1.0, 0.5)])
def test_score_begins_as_the_mean_of_the_parts(ours, theirs):
    parts = {name: make(theirs, seed=k + 1, parts=name).eval() for k, name in enumerate(("gmf", "mlp"))}
    with torch.no_grad():
        for k, part in enumerate(parts.values()):
            part.output_bias.fill_(k + 1.0)
    model = make(ours)
    model.initialize_from(parts)
    users = np.arange(9)
    scores = model.eval().score(users, TRAIN)
    torch.testing.assert_close(scores, sum(part.score(users, TRAIN) for part in parts.values()) / 2)
    for module in model.modules():
        if isinstance(module, SparseModule):
            module.check_invariants()


def test_one_part_alone_and_a_sparse_model_of_dense_parts():
    part = make(parts="mlp", seed=1)
    model = make(0.5)
    before = model.gmf_users.values.clone()
    model.initialize_from({"mlp": part})
    assert torch.equal(model.gmf_users.values, before)
    mask = model.mlp_users.pattern.to_mask()
    assert torch.equal(model.mlp_users.values, part.mlp_users.weight[mask])
    mask = model.output_mlp.pattern.to_mask()
    assert torch.equal(model.output_mlp.values, 0.5 * part.output_mlp.weight[mask])
    alone = make(parts="mlp")
    alone.initialize_from({"mlp": part})
    users = np.arange(9)
    assert torch.equal(alone.eval().score(users, TRAIN), part.eval().score(users, TRAIN))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"mf": lambda: make(parts="gmf")}, "takes gmf and mlp, not 'mf'"),
        ({"gmf": lambda: make(parts="mlp")}, r"model\.parts = 'gmf'.*got one with 'mlp'"),
        ({"gmf": lambda: BPRMF((9, 14), 4)}, "expected a run of NeuMF, got BPRMF"),
        (
            {"gmf": lambda: make(parts="gmf", factors=3)},
            r"'gmf_users' has shape \(9, 3\), this model needs \(9, 4\)",
        ),
        ({"mlp": lambda: make(parts="mlp", layers=[12, 10, 5])}, r"model\.layers = \[12, 10, 5\]"),
        ({"gmf": lambda: make(0.25, parts="gmf")}, r"'gmf_users' stores 9 values, this model 18"),
    ],
)
def test_parts_that_do_not_fit(part, message):
    with pytest.raises(ConfigError, match=message):
        make(0.5).initialize_from({name: build() for name, build in part.items()})


def test_other_models_take_no_parts():
    with pytest.raises(ConfigError, match="BPRMF takes no pre-trained parts, got gmf"):
        BPRMF((9, 14), 4).initialize_from({"gmf": make(parts="gmf")})


@pytest.mark.parametrize("method", ["dense", "masked", "dsl"])
def test_run_that_begins_with_two_others(make_config, tiny, tmp_path, method):
    def config(*overrides):
        return make_config(method, "train.epochs=2", *overrides, model="neumf")

    for part in ("gmf", "mlp"):
        session.train(config(f"model.parts={part}"), tmp_path / part, dataset=tiny, quiet=True)
    folders = [f"train.pretrained.{part}={tmp_path / part}" for part in ("gmf", "mlp")]
    trainer = Trainer(config(*folders), tiny)
    saved = session.SavedRecommender.load(tmp_path / "gmf").model
    expected, ours = dense_weight(saved.gmf_items), dense_weight(trainer.model.gmf_items)
    assert torch.equal(ours, expected)

    whole = session.train(config(*folders), dataset=tiny, quiet=True)

    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.train(config(*folders), tmp_path / "cut", dataset=tiny, quiet=True, on_epoch=interrupt)
    for part in ("gmf", "mlp"):
        (tmp_path / part / "recommender").rename(tmp_path / f"{part}-gone")
    assert session.resume(tmp_path / "cut", dataset=tiny, quiet=True)["test"] == whole["test"]
    with pytest.raises(RecsysError, match="no saved recommender"):
        Trainer(config(*folders), tiny)


@pytest.fixture(scope="module")
def gmf_runs(tmp_path_factory):
    """method -> folder of a run of the GMF part, long enough that masks have moved."""
    from recsys.config import load_config

    folder = tmp_path_factory.mktemp("gmf")
    data = load("synthetic", seed=1, users=120, items=60, interactions=1800, clusters=6)
    for method in ("dense", "masked", "static", "dsl"):
        config = load_config(
            options={
                "model": {"name": "neumf", "factors": 8, "layers": [16, 16, 8], "parts": "gmf"},
                "sparsity": {"method": method, "density": 0.4, "interval": 5},
                "train": {"epochs": 2, "lr": 0.02, "batch_size": 64},
            }
        )
        session.train(config, folder / method, dataset=data, quiet=True)
    return folder


@pytest.mark.parametrize("before", ["dense", "masked", "static", "dsl"])
@pytest.mark.parametrize("after", ["masked", "static", "dsl"])
def test_density_of_a_pretrained_run_is_what_was_asked_for(make_config, tiny, gmf_runs, before, after):
    """Masks drawn anew on a masked part would leave f^2 of its weights."""
    path = f"train.pretrained.gmf={gmf_runs / before}"
    trainer = Trainer(make_config(after, path, "model.parts=gmf", model="neumf"), tiny)
    theirs = dense_weight(session.SavedRecommender.load(gmf_runs / before).model.gmf_items)
    ours = dense_weight(trainer.model.gmf_items)
    nnz = next(
        count
        for name, count in session.nnz_per_tensor(trainer.model, trainer.explorer).items()
        if name.startswith("gmf_items.")
    )
    assert nnz == round(0.4 * ours.numel())
    if before == "dense":
        assert int((ours != 0).sum()) == nnz
        assert torch.equal(ours[ours != 0], theirs[ours != 0])
    else:
        assert torch.equal(ours, theirs)
    trainer.run_epoch()


def test_masked_parts_of_a_higher_density_are_refused(make_config, tiny, gmf_runs):
    for before, after in (("dsl", "masked"), ("masked", "masked"), ("masked", "dsl")):
        path = f"train.pretrained.gmf={gmf_runs / before}"
        config = make_config(after, path, "sparsity.density=0.3", "model.parts=gmf", model="neumf")
        with pytest.raises(ConfigError, match="take parts of the same density, or dense ones"):
            Trainer(config, tiny)


def test_weights_just_grown_are_zero_and_kept_a_place():
    values, drawn = torch.zeros(40, 5), torch.zeros(40, 5, dtype=torch.bool)
    values[:10], drawn[:, ::2] = 1.0, True
    mask = _carried_mask("w", values, drawn)
    assert mask.sum() == drawn.sum()
    assert mask[:10].all()
    assert not (mask[10:] & ~drawn[10:]).any()
    assert mask[-2:].any()
    assert _carried_mask("w", torch.ones(40, 5), drawn) is drawn


def test_run_of_other_data_is_refused(make_config, tiny, tmp_path):
    other = dataclasses.replace(tiny, item_ids=tiny.item_ids[::-1].copy())
    config = make_config("dense", "train.epochs=1", "model.parts=gmf", model="neumf")
    session.train(config, tmp_path / "gmf", dataset=other, quiet=True)
    with pytest.raises(ConfigError, match="trained for other items"):
        Trainer(make_config("dense", f"train.pretrained.gmf={tmp_path / 'gmf'}", model="neumf"), tiny)
