"""Our metrics against trec_eval's (Buckley et al.), by way of pytrec_eval, on rankings without ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from recsys.data import EvalSet
from recsys.evaluation import draw_candidates, evaluate, rank_full, rank_sampled

pytrec_eval = pytest.importorskip("pytrec_eval")

KS = (1, 3, 10, 20)
MEASURES = {f"{name}.{','.join(map(str, KS))}" for name in ("recall", "ndcg_cut", "success", "map_cut")}


def problem(seed: int, users: int = 40, items: int = 50) -> tuple[EvalSet, torch.Tensor]:
    rng = np.random.default_rng(seed)
    part = rng.random((users, items)) * rng.choice(
        [1.0, 3.0], (users, 1)
    )  # few targets for some, many for others
    inputs, targets = (part < 0.1), (part >= 0.1) & (part < 0.4)
    targets[0, 0], inputs[0, 0] = True, False
    # Different scores, exact in float32: trec_eval reads floats.
    scores = torch.from_numpy(np.argsort(rng.random((users, items)), axis=1).astype(np.float32))
    sets = [csr_array(matrix.astype(np.float32)) for matrix in (inputs, targets)]
    return EvalSet(*sets, np.arange(users)), scores


def trec(eval_set: EvalSet, listed: dict[int, list[int]], scores: torch.Tensor) -> dict[str, list[float]]:
    """Per user, ours from theirs: they cut no reciprocal rank, and divide average precision by |T|, not min(K, |T|)."""
    wanted = {u: eval_set.targets[[u]].indices for u in listed}
    qrel = {str(u): {str(i): 1 for i in wanted[u]} for u in listed}
    run = {str(u): {str(i): float(scores[u, i]) for i in items} for u, items in listed.items()}
    found = pytrec_eval.RelevanceEvaluator(qrel, MEASURES | {"recip_rank"}).evaluate(run)
    values: dict[str, list[float]] = {}
    for u in listed:
        one = found[str(u)]
        for k in KS:
            first = one["recip_rank"]
            for name, value in (
                ("recall", one[f"recall_{k}"]),
                ("ndcg", one[f"ndcg_cut_{k}"]),
                ("hr", one[f"success_{k}"]),
                ("mrr", first if first >= 1 / k - 1e-9 else 0.0),
                ("map", one[f"map_cut_{k}"] * len(wanted[u]) / min(k, len(wanted[u]))),
            ):
                values.setdefault(f"{name}@{k}", []).append(value)
    return values


@pytest.mark.parametrize("seed", range(5))
def test_full_ranking(seed: int) -> None:
    eval_set, scores = problem(seed)
    listed = {
        int(u): sorted(set(range(50)) - set(eval_set.inputs[[u]].indices)) for u in eval_set.rows_with_targets
    }
    means, values = evaluate(lambda users, _: scores[users], eval_set, KS, per_user=True)
    for name, right in trec(eval_set, listed, scores).items():
        np.testing.assert_allclose(values[name], right, atol=1e-7, err_msg=name)
        assert means[name] == pytest.approx(np.mean(right), abs=1e-7)


@pytest.mark.parametrize("negatives", [1, 4])
def test_sampled_ranking(negatives: int) -> None:
    eval_set, scores = problem(7)
    drawn = draw_candidates(eval_set, negatives, seed=3)
    listed = {
        int(u): [*eval_set.targets[[u]].indices, *drawn.items[drawn.pointers[u] : drawn.pointers[u + 1]]]
        for u in eval_set.rows_with_targets
    }
    ranking = rank_sampled(lambda users, _, items: scores[users].gather(1, items), eval_set, drawn, KS)
    values = ranking.per_user(KS)
    for name, right in trec(eval_set, listed, scores).items():
        np.testing.assert_allclose(values[name], right, atol=1e-7, err_msg=name)


def test_recommended_items_are_the_best_of_those_left() -> None:
    eval_set, scores = problem(2)
    ranking = rank_full(lambda users, _: scores[users], eval_set, [60])
    assert ranking.recommended is not None
    for place, u in enumerate(ranking.rows):
        left = set(range(50)) - set(eval_set.inputs[[u]].indices)
        best = sorted(left, key=lambda i: -scores[u, i])
        assert ranking.recommended[place].tolist() == best + [-1] * (50 - len(best))
