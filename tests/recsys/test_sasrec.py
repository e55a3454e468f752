"""SASRec written out with dense matrices and one sequence at a time; what the explorer sees of it; orders of items."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

import sparsecore
from recsys.config import load_config
from recsys.data import load
from recsys.errors import ConfigError, DataError
from recsys.models.base import Interactions
from recsys.models.build import build_model
from recsys.models.sasrec import SASRec, Steps
from recsys.recommender import SavedRecommender
from recsys.training import session
from recsys.training.densities import parameter_densities
from recsys.training.trainer import Trainer
from sparsecore.nn.base import SparseModule

N_ITEMS, LENGTH = 12, 6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def a_model(density=1.0, seed=0, n_items=N_ITEMS, **options):
    settings = {"hidden": 8, "blocks": 2, "heads": 2, "max_length": LENGTH, "dropout": 0.0, **options}
    train = csr_array(np.ones((1, n_items), np.float32))
    model = SASRec(train, np.arange(n_items), **settings, density=density, generator=generator(seed))
    with torch.no_grad():  # zeros and ones hide mistakes
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(9)))
    return model.double()


def sequences(*lists):
    pointers = np.cumsum([0, *map(len, lists)])
    items = torch.tensor([item for one in lists for item in one], dtype=torch.int64)
    return Interactions(items, torch.from_numpy(pointers))


def plain_weights(model):
    """Every parameter as a dense leaf, by its dense name."""
    found = {}
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseModule)}
    for name, module in sparse.items():
        found[f"{name}.weight"] = module.pattern.to_dense(module.values.detach())
    for name, parameter in model.named_parameters():
        if not name.endswith("values"):
            found[name] = parameter.detach().clone()
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def plain_states(weights, items, heads=2, blocks=2):
    """h of one sequence (a list of items), from the formulas of the class' docstring."""
    m, d = len(items), weights["items.weight"].shape[1]

    def norm(x, name):
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = d**0.5 * weights["items.weight"][items] + weights["positions.weight"][-m:]
    for k in range(blocks):
        part = {name.removeprefix(f"blocks.{k}."): w for name, w in weights.items()}
        normed = norm(x, f"blocks.{k}.attention_norm")
        q, key, value = (normed @ part[f"{name}.weight"].T for name in ("query", "key", "value"))
        attended = []
        for columns in torch.arange(d).chunk(heads):
            logits = q[:, columns] @ key[:, columns].T / len(columns) ** 0.5
            logits = logits + torch.full((m, m), -torch.inf, dtype=x.dtype).triu(1)
            attended.append(logits.softmax(1) @ value[:, columns])
        x = x + torch.cat(attended, 1) @ part["out.weight"].T
        inner = torch.relu(norm(x, f"blocks.{k}.forward_norm") @ part["inner.weight"].T + part["inner.bias"])
        x = x + inner @ part["outer.weight"].T + part["outer.bias"]
    return norm(x, "norm")


LISTS = ([3, 1, 4, 1, 5], [2], [7, 2, 8, 0, 10, 3], [6, 6])


def a_batch():
    count = sum(map(len, LISTS))
    draws = [torch.randint(N_ITEMS, (count,), generator=generator(seed)) for seed in (1, 2)]
    return Steps(sequences(*LISTS), *draws)


def plain_loss(weights, batch):
    states = torch.cat([plain_states(weights, list(items)) for items in LISTS])
    table = weights["items.weight"]
    positive, negative = (
        (states * table[ids]).sum(1).sigmoid() for ids in (batch.positives, batch.negatives)
    )
    return -(positive.log() + (1 - negative).log()).mean()


# ---- the formulas


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_loss_and_gradients_equal_the_model_written_out(density, backend):
    with sparsecore.backend(backend):
        model, batch = a_model(density), a_batch()
        weights = plain_weights(model)
        loss, plain = model.loss(batch, 0), plain_loss(weights, batch)
        torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
        loss.backward()
        plain.backward()
    for name, parameter in model.named_parameters():
        right = weights[name.replace("values", "weight")].grad
        if name.endswith("values"):
            right = right[model.get_submodule(name.removesuffix(".values")).pattern.to_mask()]
        torch.testing.assert_close(parameter.grad, right, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_the_explorer_sees_the_whole_gradient(backend):
    """Also at positions that are not stored, and of the item table from both of its uses."""
    with sparsecore.backend(backend):
        model, batch = a_model(0.4), a_batch()
        weights = plain_weights(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        explorer = sparsecore.DynamicSparsity(model, optimizer, interval=1, total_steps=2)
        model.loss(batch, 0).backward()
        plain_loss(weights, batch).backward()
        assert len(model.items._recorder.uses) == 2
        assert len(explorer.modules) == 2 + 2 * 6
        for name, module in explorer.modules.items():
            right, recorder = weights[f"{name}.weight"].grad, module._recorder
            rows = recorder.rows()
            seen = torch.zeros_like(right)
            if rows is None:
                seen = recorder.block(slice(0, len(right)))
            else:
                seen[rows] = recorder.block(rows)
            torch.testing.assert_close(seen, right, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_scores_are_those_of_the_model_written_out(density):
    model = a_model(density).eval()
    inputs = csr_array(np.array([[0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]] * 2, np.float32))
    scores = model.score(np.array([-1, 0]), inputs)
    weights = plain_weights(model)
    state = plain_states(weights, [1, 3, 4])[-1]
    torch.testing.assert_close(scores, (weights["items.weight"] @ state).detach().expand(2, -1))


@given(st.lists(st.lists(st.integers(0, N_ITEMS - 1), max_size=LENGTH), min_size=1, max_size=5))
def test_padding_changes_nothing(lists):
    model = a_model(0.5).eval()
    with torch.no_grad():
        together = model.encode(sequences(*lists)) if any(lists) else torch.empty(0, 8)
        alone = [model.encode(sequences(one)) for one in lists if one]
    torch.testing.assert_close(together, torch.cat([*alone, torch.empty(0, 8)]).to(together.dtype))


def test_a_later_item_does_not_change_earlier_states():
    model = a_model().eval()
    # Positions count from the end, so both are of one length.
    with torch.no_grad():
        one, other = (model.encode(sequences([3, 1, 4, 1, last, 2])) for last in (5, 9))
    torch.testing.assert_close(one[:4], other[:4], rtol=0, atol=0)
    assert ((one[4:] - other[4:]).abs().max(dim=1).values > 1e-6).all()


def test_dropout_is_the_same_for_every_density_and_keeps_the_mean():
    noises = [a_model(density, dropout=0.3).noise.get_state() for density in (1.0, 0.5, 0.1)]
    assert torch.equal(noises[0], noises[1])
    assert torch.equal(noises[0], noises[2])
    model = a_model(dropout=0.3)
    dropped = model._drop(torch.ones(400, 100))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7], rel=1e-4)  # probabilities are to 2^-16
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(model.eval()._drop(torch.ones(3)), torch.ones(3))


def test_initial_values():
    for density in (1.0, 0.5):
        train = csr_array(np.ones((1, 900), np.float32))
        model = SASRec(train, np.arange(900), hidden=100, density=density, generator=generator())
        stds = {"items": (2 / 1000) ** 0.5, "positions": (2 / 150) ** 0.5, "blocks.1.outer": 0.1}
        for name, std in stds.items():
            values = sparsecore.weight_parameter(model.get_submodule(name))
            assert float(values.detach().std()) == pytest.approx(std, rel=0.05)
        assert not any(p.detach().any() for name, p in model.named_parameters() if name.endswith("bias"))


# ---- sequences


def test_batches_hold_every_user_once_with_the_last_of_the_history(tiny):
    model = SASRec(tiny.train, tiny.order, 8, max_length=7)
    batches = list(model.batches(tiny, 50, generator(3)))
    assert [batch.size for batch in batches] == [50, 50, 20]
    assert len(batches) == model.steps_per_epoch(tiny, 50)
    assert sorted(torch.cat([batch.sequences.users for batch in batches]).tolist()) == list(range(120))
    for batch in batches:
        counts = batch.sequences.counts.tolist()
        parts = (x.split(counts) for x in (batch.sequences.items, batch.positives, batch.negatives))
        for user, before, after, never in zip(batch.sequences.users.tolist(), *parts, strict=True):
            row = slice(*tiny.train.indptr[user : user + 2])
            chosen = tiny.train.indices[row]
            history = chosen[np.argsort(tiny.order[row])].tolist()
            assert before.tolist() == history[:-1][-7:]
            assert after.tolist() == history[1:][-7:]
            assert not set(never.tolist()) & set(chosen.tolist())
    again = list(model.batches(tiny, 50, generator(3)))
    for one, other in zip(batches, again, strict=True):
        assert torch.equal(one.sequences.items, other.sequences.items)
        assert torch.equal(one.negatives, other.negatives)


def test_sequence_is_the_train_order_and_then_the_rest():
    train = csr_array(np.array([[1, 1, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]], np.float32))
    order = np.array([30, 10, 40, 20, 1, 0])  # any numbers that ascend
    model = SASRec(train, order, 4, max_length=5)
    inputs = train.toarray()[[0, 1, 0, 0]]
    inputs[0, [6, 2]] = 1  # validation items
    inputs[2] = 0
    rows = Interactions.from_scipy(csr_array(inputs), np.array([0, 1, 0, -1]))
    ordered = model._in_order(rows)
    parts = [part.tolist() for part in ordered.items.split(ordered.counts.tolist())]
    assert parts == [[1, 4, 0, 3, 2, 6], [4, 3], [], [0, 1, 3, 4]]
    last = model._last(ordered)
    parts = [part.tolist() for part in last.items.split(last.counts.tolist())]
    assert parts == [[4, 0, 3, 2, 6], [4, 3], [], [0, 1, 3, 4]]


def test_without_input_every_score_is_zero():
    model = a_model().eval()
    inputs = csr_array((2, N_ITEMS), dtype=np.float32)
    assert not model.score(np.array([0, -1]), inputs).any()
    mixed = csr_array(np.eye(2, N_ITEMS, dtype=np.float32) * [[1], [0]])
    mixed.eliminate_zeros()
    assert model.score(np.array([0, -1]), mixed).any(dim=1).tolist() == [True, False]


def test_data_that_cannot_be_used(tiny):
    with pytest.raises(DataError, match="in which order"):
        build_model({"name": "sasrec"}, tiny.train)
    single = csr_array(np.eye(3, 4, dtype=np.float32))
    with pytest.raises(DataError, match="two interactions"):
        SASRec(single, np.zeros(3)).steps_per_epoch(type("D", (), {"train": single}), 4)
    with pytest.raises(ConfigError, match=r"hidden = 50 cannot be divided among heads = 3"):
        load_config(options={"model.name": "sasrec", "model.heads": 3})


# ---- in the application


def test_masked_and_sparse_prune_the_same_weights(make_config, tiny):
    """Scales of LayerNorm are named "weight", too, but are no layer's."""
    config = make_config("masked", model="sasrec")
    masked = Trainer(config, tiny)
    sparse = Trainer(config.replace(sparsity={"method": "dsl"}), tiny)
    names = {f"{name}.weight" for name in sparse.explorer.modules}
    assert set(parameter_densities(masked.model, masked.density)) == names == set(masked.explorer.masks)
    assert not any("norm" in name for name in names)
    with pytest.raises(ConfigError, match="no weight of sasrec matches"):
        Trainer(config.replace(sparsity={"include": ["norm", "*_norm"]}), tiny)


def test_saved_recommender_knows_the_order(make_config, tiny, tmp_path):
    config = make_config("dsl", "train.epochs=2", model="sasrec")
    session.train(config, tmp_path / "run", dataset=tiny, quiet=True)
    saved = SavedRecommender.load(tmp_path / "run")
    ranks = np.concatenate(
        [np.argsort(np.argsort(part)) for part in np.split(tiny.order, tiny.train.indptr[1:-1])]
    )
    assert saved.model.order.tolist() == ranks.tolist()
    user = str(tiny.user_ids[3])
    assert len(saved.recommend(user, k=5)) == 5
    row = slice(*tiny.train.indptr[3:5])
    history = tiny.item_ids[tiny.train.indices[row][np.argsort(tiny.order[row])]].tolist()
    assert saved.recommend(items=[*history, history[0]], k=5) == saved.recommend(user, k=5)
    assert saved.recommend(items=history[::-1], k=5) != saved.recommend(user, k=5)


def test_order_is_what_the_model_learns_from():
    """The next item of a series, in sessions: a model that is told another order does not find it."""
    data = load("synthetic", seed=2, users=200, items=60, interactions=3000, clusters=6)
    options = {"model.name": "sasrec", "model.hidden": 24, "model.max_length": 20, "model.dropout": 0.2}
    options |= {
        "sparsity.method": "dense",
        "train.epochs": 25,
        "train.batch_size": 32,
        "train.lr": 1e-2,
        "data.options.validation": 0,
    }
    losses = []
    shuffled = np.random.default_rng(0).permutation(data.train.nnz)
    for order in (data.order, shuffled):
        trainer = Trainer(load_config(options=options), type(data)(**{**vars(data), "order": order}))
        records = []
        session.fit(trainer, quiet=True, on_epoch=records.append)
        losses.append(np.mean([record["loss"] for record in records[-3:]]))
    assert losses[0] < 0.9 * losses[1]
