"""How good a ranking is: of the whole catalogue, or by name of sampled candidates.

For a user with target set T, and hits h_1..h_K (h_r = 1 if the item at rank r is in T):

    recall@K            = sum_r h_r / |T|
    truncated_recall@K  = sum_r h_r / min(K, |T|)            (Liang et al., WWW 2018)
    hr@K                = 1 if any h_r else 0
    ndcg@K              = sum_r h_r / log2(r + 1)  /  sum_{r <= min(K, |T|)} 1 / log2(r + 1)
    mrr@K               = 1 / r of the first hit, 0 without one
    map@K               = sum_r h_r (h_1 + ... + h_r) / r  /  min(K, |T|)

Each is averaged over the users that have a target. Ties count against the model: of items with equal scores, those that
are targets come last. (Sparse tables give many equal scores: two rows without a common column score 0.)

Full ranking, `evaluate`, is the default: every item that is not in a user's history is ranked. Sampled ranking,
`evaluate_sampled`, ranks targets among few items drawn at random. It is what some publications report and what is
affordable where every score is a network of its own, but its values are not those of full ranking and may even order
two models differently (Krichene and Rendle, KDD 2020).
"""

from recsys.evaluation.beyond import beyond_accuracy
from recsys.evaluation.full import Score, evaluate, evaluate_oracle, rank_full
from recsys.evaluation.ranking import METRICS, Ranking
from recsys.evaluation.sampled import (
    Candidates,
    ScoreItems,
    draw_candidates,
    evaluate_sampled,
    published_candidates,
    rank_sampled,
)

__all__ = [
    "METRICS",
    "Candidates",
    "Ranking",
    "Score",
    "ScoreItems",
    "beyond_accuracy",
    "draw_candidates",
    "evaluate",
    "evaluate_oracle",
    "evaluate_sampled",
    "published_candidates",
    "rank_full",
    "rank_sampled",
]
