"""Sampled ranking: what is drawn, how it is ranked, and that training neither sees nor moves it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from recsys.data import EvalSet, load
from recsys.errors import RecsysError
from recsys.evaluation import (
    Candidates,
    draw_candidates,
    evaluate,
    evaluate_sampled,
    published_candidates,
)
from recsys.models.triples import TripleSampler
from recsys.training import session
from recsys.training.trainer import Trainer


def random_set(users: int, items: int, seed: int = 0, candidates: np.ndarray | None = None) -> EvalSet:
    kind = np.random.default_rng(seed).integers(0, 5, (users, items))
    kind[0, 0] = 1
    sets = [csr_array((kind == number).astype(np.float32)) for number in (0, 1)]
    return EvalSet(*sets, np.arange(users), candidates=candidates)


def of_row(candidates: Candidates, row: int) -> list[int]:
    return candidates.items[candidates.pointers[row] : candidates.pointers[row + 1]].tolist()


@given(
    users=st.integers(1, 6), items=st.integers(9, 20), negatives=st.integers(1, 8), seed=st.integers(0, 99)
)
def test_candidates_are_different_and_not_chosen(users: int, items: int, negatives: int, seed: int) -> None:
    eval_set = random_set(users, items, seed)
    drawn = draw_candidates(eval_set, negatives, seed)
    assert drawn.source == "drawn"
    for row in range(users):
        chosen = {*eval_set.inputs[[row]].indices, *eval_set.targets[[row]].indices}
        found = of_row(drawn, row)
        assert (
            len(found) == len(set(found)) == min(negatives * eval_set.targets[[row]].nnz, items - len(chosen))
        )
        assert not chosen & set(found)
    again = draw_candidates(eval_set, negatives, seed)
    assert np.array_equal(again.items, drawn.items)


def test_every_item_not_chosen_is_drawn_alike() -> None:
    eval_set = random_set(3, 12, seed=4)
    counts = np.zeros((3, 12))
    for seed in range(3000):
        drawn = draw_candidates(eval_set, 1, seed)
        counts[np.repeat(np.arange(3), np.diff(drawn.pointers)), drawn.items] += 1
    for row in range(3):
        left = np.setdiff1d(
            np.arange(12), [*eval_set.inputs[[row]].indices, *eval_set.targets[[row]].indices]
        )
        share = counts[row, left] / 3000
        np.testing.assert_allclose(share, min(1, eval_set.targets[[row]].nnz / len(left)), atol=0.05)


@given(
    n_items=st.integers(7, 14),
    levels=st.integers(1, 9),
    negatives=st.integers(1, 6),
    batch=st.integers(1, 5),
    k=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_agrees_with_full_ranking_of_the_candidates_alone(
    n_items: int, levels: int, negatives: int, batch: int, k: int, seed: int
) -> None:
    """Whatever is not listed goes into the history: full ranking, ties included, is then the same."""
    eval_set = random_set(5, n_items, seed)
    scores = torch.from_numpy(
        np.random.default_rng(seed).integers(0, levels, (5, n_items)).astype(np.float64)
    )
    drawn = draw_candidates(eval_set, negatives, seed)
    listed = eval_set.targets.toarray()
    listed[np.repeat(np.arange(5), np.diff(drawn.pointers)), drawn.items] = 1
    narrowed = EvalSet(csr_array(1 - listed), eval_set.targets, eval_set.users)

    def score_items(users: np.ndarray, inputs: csr_array, items: torch.Tensor) -> torch.Tensor:
        assert inputs.shape == (len(users), n_items)
        return scores[users].gather(1, items)

    got = evaluate_sampled(score_items, eval_set, drawn, (k,), batch_size=batch)
    assert got == pytest.approx(evaluate(lambda users, _: scores[users], narrowed, (k,)))


def test_published_candidates_are_taken_without_targets_inputs_and_repetitions() -> None:
    targets = csr_array(np.eye(2, 6, dtype=np.float32))
    inputs = csr_array((np.ones(1, np.float32), ([0], [5])), shape=(2, 6))
    given_items = np.array([[3, 0, 3, 5], [4, 2, 0, 3]])  # for user 0 a target, an input and one twice
    eval_set = EvalSet(inputs, targets, np.arange(2), candidates=given_items)
    found = published_candidates(eval_set)
    assert (found.source, of_row(found, 0), of_row(found, 1)) == ("published", [3], [0, 2, 3, 4])
    with pytest.raises(RecsysError, match="without published"):
        published_candidates(random_set(2, 6))


def test_trainer_takes_published_candidates_of_the_right_width(make_config, tiny) -> None:
    rows = len(tiny.test)
    public = np.tile(np.arange(10, dtype=np.int64), (rows, 1))
    test = EvalSet(
        tiny.test.inputs, tiny.test.targets, tiny.test.users, tiny.test.user_ids, candidates=public
    )
    sampled = "evaluation.protocol=sampled"
    for negatives, source in ((10, "published"), (9, "drawn")):
        config = make_config("dense", sampled, f"evaluation.negatives={negatives}", model="bprmf")
        trainer = Trainer(config, tiny)
        assert (
            trainer.evaluator.candidates(test).source
            == trainer.evaluator.describe(test)["candidates"]
            == source
        )


@pytest.mark.real
def test_negatives_of_ncf(real_data) -> None:
    """The published 99 negatives of each user of ml-1m: 156 are the user's own target, and some are there twice."""
    data = load("ml-1m/ncf_loo", data_dir=real_data, validation=0)
    with np.load(real_data / "ml-1m" / "ncf_loo" / "test_negatives.npz", allow_pickle=False) as file:
        negatives = file["negatives"].astype(np.int64)
    targets = data.test.targets.indices
    assert (negatives == targets[:, None]).sum() == 156
    test = EvalSet(data.test.inputs, data.test.targets, data.test.users, candidates=negatives)
    found = published_candidates(test)
    different = [
        len({*row} - {target}) for row, target in zip(negatives.tolist(), targets.tolist(), strict=True)
    ]
    assert np.diff(found.pointers).tolist() == different
    popularity = torch.from_numpy(np.bincount(data.train.indices, minlength=data.n_items)).float()
    metrics = evaluate_sampled(lambda users, inputs, items: popularity[items], test, found, (10,))
    above = (popularity[torch.from_numpy(negatives)] >= popularity[targets.astype(np.int64)][:, None]).numpy()
    above &= negatives != targets[:, None]
    first = [len({*row[higher]}) < 10 for row, higher in zip(negatives, above, strict=True)]
    assert metrics["hr@10"] == pytest.approx(np.mean(first))


def test_bad_arguments() -> None:
    eval_set = random_set(2, 6)
    drawn = draw_candidates(eval_set, 2, 0)

    def scores(users: np.ndarray, inputs: csr_array, items: torch.Tensor) -> torch.Tensor:
        return torch.zeros(items.shape)

    for negatives in (0, 6):
        with pytest.raises(RecsysError, match="negatives"):
            draw_candidates(eval_set, negatives, 0)
    with pytest.raises(RecsysError, match="made for 2 users, but this set has 3"):
        evaluate_sampled(scores, random_set(3, 6), drawn)
    with pytest.raises(RecsysError, match="cut-offs"):
        evaluate_sampled(scores, eval_set, drawn, ())
    with pytest.raises(RecsysError, match="expected shape"):
        evaluate_sampled(lambda *_: torch.zeros(2, 1), eval_set, drawn)
    with pytest.raises(RecsysError, match="NaN or infinite"):
        evaluate_sampled(lambda u, x, i: scores(u, x, i) + torch.nan, eval_set, drawn)


def test_too_many_negatives_are_refused_before_training(make_config, tmp_path) -> None:
    options = ("evaluation.protocol=sampled", "evaluation.negatives=60", "data.options.validation=0")
    config = make_config("dense", *options, model="bprmf")
    with pytest.raises(RecsysError, match="fewer than the 60 items"):
        session.train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    whole = session.train(config.replace(data={"everything": True}), quiet=True)  # measures nothing
    assert whole["test"] == {}


# ---- The leak of the DSL authors' NeuMF: it is trained on the very negatives that it is evaluated on.


def test_candidates_do_not_depend_on_training(make_config, tiny) -> None:
    found = []
    for seed in (0, 1):
        config = make_config(
            "dsl",
            "evaluation.protocol=sampled",
            "evaluation.negatives=5",
            f"train.seed={seed}",
            model="bprmf",
        )
        trainer = Trainer(config, tiny)
        before = trainer.order.get_state()
        trainer.evaluate(tiny.test)
        assert torch.equal(trainer.order.get_state(), before)  # nor training on evaluation
        first = {name: trainer.evaluator.candidates(getattr(tiny, name)) for name in ("validation", "test")}
        trainer.run_epoch()
        assert all(trainer.evaluator.candidates(getattr(tiny, name)) is first[name] for name in first)
        late = Trainer(config, tiny)
        late.run_epoch()  # draws them in the middle of a run
        found += [first, {name: late.evaluator.candidates(getattr(tiny, name)) for name in first}]
    for other in found[1:]:
        for name, candidates in found[0].items():
            assert np.array_equal(candidates.items, other[name].items)
    assert not np.array_equal(found[0]["validation"].items, found[0]["test"].items)


def test_training_negatives_are_fresh_and_not_the_candidates(make_config, tiny) -> None:
    config = make_config("dsl", "evaluation.protocol=sampled", "evaluation.negatives=3", model="bprmf")
    candidates = Trainer(config, tiny).evaluator.candidates(tiny.test)
    owner = tiny.test.users[np.repeat(np.arange(len(tiny.test)), np.diff(candidates.pointers))]
    evaluated = set(zip(owner.tolist(), candidates.items.tolist(), strict=True))
    generator, sampler = torch.Generator().manual_seed(0), TripleSampler(tiny.train)
    epochs = []
    for _ in range(2):
        drawn = sampler.draw(20_000, generator)
        epochs.append(list(zip(drawn.users.tolist(), drawn.negatives.tolist(), strict=True)))
    assert epochs[0] != epochs[1]
    # A user's negatives are uniform over all items that are not in train, whether they are candidates or not.
    chosen = tiny.train.toarray() > 0
    users = {user for user, _ in evaluated}
    seen = [pair for epoch in epochs for pair in epoch if pair[0] in users]
    weights = {user: 1 / (~chosen[user]).sum() for user in users}
    per_user = np.bincount([user for user, _ in seen], minlength=tiny.n_users)
    expected = sum(weights[user] * per_user[user] for user, _ in evaluated)
    assert sum(pair in evaluated for pair in seen) == pytest.approx(expected, rel=0.05)
    everything = {(user, item) for user in users for item in np.flatnonzero(~chosen[user]).tolist()}
    assert len(set(seen) & everything) > 0.95 * len(everything)
