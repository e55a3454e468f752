"""How the users of a run are evaluated: by full ranking, or among sampled candidates that are drawn once."""

from __future__ import annotations

from typing import Any

import numpy as np

import sparsecore
from recsys.config import Config
from recsys.data import Dataset, EvalSet
from recsys.evaluation import (
    Candidates,
    Ranking,
    draw_candidates,
    published_candidates,
    rank_full,
    rank_sampled,
)
from recsys.evaluation.sampled import check_negatives
from recsys.models.base import Recommender

__all__ = ["Evaluator"]


class Evaluator:
    """The protocol of `config.evaluation` on the users of a data set; independent of training and its seed."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.settings, self.ks, self.test = config.evaluation, config.train.ks, dataset.test
        self._candidates: dict[EvalSet, Candidates] = {}
        if self.settings.protocol == "sampled" and not config.data.everything:  # now, not after training
            check_negatives(self.settings.negatives, dataset.n_items)

    def rank(self, model: Recommender, eval_set: EvalSet) -> Ranking:
        """The ranks of all targets by a model, which is in evaluation mode. Nothing of it stays in memory."""
        try:
            return self._rank(model, eval_set)
        finally:
            sparsecore.release_results(model)

    def _rank(self, model: Recommender, eval_set: EvalSet) -> Ranking:
        if self.settings.protocol == "full":
            return rank_full(model.score, eval_set, self.ks, self.settings.batch_size)
        candidates = self.candidates(eval_set)
        return rank_sampled(model.score_items, eval_set, candidates, self.ks, self.settings.batch_size)

    def candidates(self, eval_set: EvalSet) -> Candidates:
        """What sampled ranking ranks the targets of the validation or the test users among: made once."""
        if eval_set not in self._candidates:
            negatives, given = self.settings.negatives, eval_set.candidates
            if given is not None and given.shape[1] == negatives:
                self._candidates[eval_set] = published_candidates(eval_set)
            else:
                # Other draws for test than for validation, which chooses the epoch.
                seed = np.random.SeedSequence([self.settings.seed, int(eval_set is self.test)])
                self._candidates[eval_set] = draw_candidates(eval_set, negatives, seed)
        return self._candidates[eval_set]

    def describe(self, eval_set: EvalSet) -> dict[str, Any]:
        """How the users of an EvalSet are evaluated, in plain values."""
        if self.settings.protocol == "full":
            return {"ranking": "full"}
        source = self.candidates(eval_set).source
        seed = {"seed": self.settings.seed} if source == "drawn" else {}
        return {"ranking": "sampled", "negatives": self.settings.negatives, "candidates": source, **seed}

    def with_fewer(self, eval_set: EvalSet) -> int:
        """How many users are ranked for among fewer items than was asked for; none in full ranking."""
        if self.settings.protocol == "full" or not len(eval_set.rows_with_targets):
            return 0
        return self.candidates(eval_set).with_fewer(eval_set, self.settings.negatives)
