"""Synthetic interactions whose true preferences are known, at any size from 1k to 10M interactions.

The model. Each item has a home cluster and a weight w_i = 1 / rank within it (Zipf, so few items take most of
the interest). Cluster c draws 90 % of its interest from its own items and 10 % from all of them, by weight:

    phi_ci = 0.9 * [home(i) = c] * w_i / sum_{home(j) = c} w_j  +  0.1 * w_i / sum_j w_j.

A user's taste is a Dirichlet mixture over clusters, theta_u, and

    P(i | u) = sum_c theta_uc phi_ci.

User u has n_u distinct items (log-normal, at least 5), drawn one after another from P(. | u) without
replacement. Given that, and a split that takes no notice of the items, an item is the likelier to be a target
the larger P(i | u) is, so ranking by P(i | u) cannot be beaten on average: this is the `oracle`.

The order. A user has his items in sessions of at most 5 items of one cluster, and sessions come in random order.
Each cluster's items are a series, numbered at random: a user has them in that order, within a session and from one
session of the cluster to the next. So what comes next is likely of the same cluster and further on in its series.
The order is drawn apart from the rest and takes no part in a split at random; a split by order would need another
oracle.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recsys.data.dataset import Dataset, EvalSet, Oracle, binary_csr
from recsys.data.split import SplitOptions, split_dataset
from recsys.errors import ConfigError, DataError

__all__ = ["synthetic"]

MIN_ACTIVITY = 5
SHARED_INTEREST = 0.1
TASTE_CONCENTRATION = 3.0  # of the whole Dirichlet: a user has a handful of clusters, not one and not all
ACTIVITY_SIGMA = 0.9  # of the log-normal: the most active tenth has about a third of the interactions
REJECTION_ROUNDS = 16
SESSION_LENGTH = 5
BLOCK = 1 << 22  # elements of the largest temporary matrix


def synthetic(
    n_users: int | None = None,
    n_items: int | None = None,
    n_interactions: int = 100_000,
    n_clusters: int = 20,
    seed: int = 0,
    split: Literal["ratio", "heldout"] = "ratio",
    validation: float = 0.1,
    test: float = 0.1,
    fold_in: float = 0.8,
) -> Dataset:
    """Draw a dataset from the model of this module's docstring and split it.

    Args:
        n_users: users; None takes 2000 * (n_interactions / 100,000) ** 0.75.
        n_items: items; None as for users.
        n_interactions: exact number of distinct user-item pairs.
        n_clusters: taste clusters, at most n_items.
        seed: the same arguments and seed give the same dataset.
        split, validation, test, fold_in: see `SplitOptions`.

    Returns:
        Dataset "synthetic" with an order and an oracle. Raw ids are strings such as "u0001" and "i0042". Memory is
        O(n_interactions + n_clusters * (n_users + n_items)).

    Raises:
        ConfigError: a size is no positive whole number, or the interactions do not fit: every user needs at least 5 and
            may have at most half of the items.
    """
    given = {"users": n_users, "items": n_items, "interactions": n_interactions, "clusters": n_clusters}
    for what, size in given.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer | None):
            raise ConfigError(f"synthetic {what}: expected a whole number, got {size!r}")
    sizes = {"interactions": n_interactions, "clusters": n_clusters}
    default = round(2000 * (max(n_interactions, 1) / 100_000) ** 0.75)
    n_users = sizes["users"] = default if n_users is None else n_users
    n_items = sizes["items"] = max(default, 2 * MIN_ACTIVITY) if n_items is None else n_items
    for what, size in sizes.items():
        if size < 1:
            raise ConfigError(f"synthetic {what}: expected at least 1, got {size}")
    if n_clusters > n_items:
        raise ConfigError(f"synthetic clusters: at most one per item ({n_items}), got {n_clusters}")
    if not MIN_ACTIVITY * n_users <= n_interactions <= n_users * (n_items // 2):
        raise ConfigError(
            f"synthetic: {n_interactions} interactions do not fit {n_users} users and {n_items} items; "
            f"each user needs at least {MIN_ACTIVITY} and may have half of the items: "
            f"{MIN_ACTIVITY * n_users}..{n_users * (n_items // 2)}"
        )
    options = SplitOptions(split, validation, test, fold_in)
    rng = np.random.default_rng(seed)
    theta = rng.dirichlet(np.full(n_clusters, TASTE_CONCENTRATION / n_clusters), size=n_users)
    phi = _interest(n_items, n_clusters, rng)
    counts = _activity(n_users, n_items // 2, n_interactions, rng)
    pairs = _draw(theta, phi, counts, rng)
    matrix, _ = binary_csr(pairs // n_items, pairs % n_items, (n_users, n_items))
    user_ids, item_ids = _raw_ids("u", n_users), _raw_ids("i", n_items)
    oracle = _oracle(theta, phi, user_ids)
    order = _order(pairs, n_items, phi.argmax(axis=0), np.random.default_rng([seed, 1]))
    return split_dataset("synthetic", matrix, user_ids, item_ids, options, seed, oracle, order=order)


def _raw_ids(prefix: str, size: int) -> NDArray[np.str_]:
    width = max(4, len(str(size - 1)))
    return np.char.add(prefix, np.char.zfill(np.arange(size).astype(str), width))


def _interest(n_items: int, n_clusters: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """phi, (n_clusters, n_items): rows sum to 1, every entry is above 0."""
    # Item order[k] has home k % n_clusters and rank k // n_clusters + 1 there.
    order = rng.permutation(n_items)
    place = np.empty(n_items, dtype=np.int64)
    place[order] = np.arange(n_items)
    weight = 1.0 / (place // n_clusters + 1)
    phi = np.tile(SHARED_INTEREST * weight / weight.sum(), (n_clusters, 1))
    home = place % n_clusters
    phi[home, np.arange(n_items)] += (1 - SHARED_INTEREST) * weight / np.bincount(home, weight)[home]
    return phi


def _activity(n_users: int, most: int, total: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Interactions of each user: log-normal, in MIN_ACTIVITY..most, summing to `total` exactly."""
    weight = rng.lognormal(sigma=ACTIVITY_SIGMA, size=n_users)
    room = float(most - MIN_ACTIVITY)
    left = total - MIN_ACTIVITY * n_users
    extra = np.zeros(n_users)
    # What the cap cuts off is shared out again among the others, until nothing is cut off.
    open_users = np.ones(n_users, dtype=bool)
    while left > 0:
        share = left * weight / weight[open_users].sum()
        full = open_users & (share >= room)
        if not full.any():
            extra[open_users] = share[open_users]
            break
        extra[full] = room
        left -= int(room) * int(full.sum())
        open_users &= ~full
    counts = np.floor(extra).astype(np.int64)
    # Largest remainders take the interactions that rounding down left over, round after round.
    missing = total - MIN_ACTIVITY * n_users - int(counts.sum())
    while missing > 0:
        able = np.flatnonzero(counts < room)
        able = able[np.argsort(counts[able] - extra[able], kind="stable")][:missing]
        counts[able] += 1
        missing -= len(able)
    return counts + MIN_ACTIVITY


def _row_cdf(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row-wise CDF, the last entry of row r being exactly r + 1 and the row lying in (r, r + 1], flattened.

    One searchsorted over the whole then draws for many rows at once.
    """
    cdf = np.cumsum(probabilities, axis=1)
    cdf /= cdf[:, -1:]
    cdf += np.arange(len(cdf))[:, None]
    return cdf.ravel()


def _draw(
    theta: NDArray[np.float64],
    phi: NDArray[np.float64],
    counts: NDArray[np.int64],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """counts[u] distinct items for each user, in order of P(i | u), as sorted keys u * n_items + i.

    Drawing with replacement and keeping the first occurrences is drawing one after another without
    replacement. Each round draws just what a user still lacks, so it never draws beyond the last one kept.
    """
    n_clusters, n_items = phi.shape
    taste, interest = _row_cdf(theta), _row_cdf(phi)
    keys = np.empty(0, dtype=np.int64)
    missing = counts.copy()
    for _ in range(REJECTION_ROUNDS):
        users = np.repeat(np.arange(len(counts)), missing)
        if not len(users):
            return keys
        new = np.empty(len(users), dtype=np.int64)
        for start in range(0, len(users), BLOCK):
            user = users[start : start + BLOCK]
            slot = np.searchsorted(taste, user + rng.random(len(user)), side="right")
            cluster = np.clip(slot - user * n_clusters, 0, n_clusters - 1)
            slot = np.searchsorted(interest, cluster + rng.random(len(user)), side="right")
            new[start : start + BLOCK] = user * n_items + np.clip(slot - cluster * n_items, 0, n_items - 1)
        # Timsort merges the two sorted runs in linear time.
        keys = np.concatenate([keys, np.sort(new)])
        keys.sort(kind="stable")
        keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])]
        missing = counts - np.bincount(keys // n_items, minlength=len(counts))
    return np.sort(np.concatenate([keys, _finish(theta, phi, keys, missing, rng)]))


def _finish(
    theta: NDArray[np.float64],
    phi: NDArray[np.float64],
    keys: NDArray[np.int64],
    missing: NDArray[np.int64],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Draw what is still missing exactly, for the few users who have nearly all that they are likely to draw.

    An exponential race (Gumbel top-k) over the items not yet drawn has the same distribution as drawing one
    after another, and never rejects; its cost is a row of n_items per user.
    """
    n_items = phi.shape[1]
    found = []
    waiting = np.flatnonzero(missing)
    block = max(1, BLOCK // n_items)
    for start in range(0, len(waiting), block):
        users = waiting[start : start + block]
        finish = rng.exponential(size=(len(users), n_items)) / (theta[users] @ phi)
        # Keys are sorted: those of users[k] are one run.
        first, last = np.searchsorted(keys, users * n_items), np.searchsorted(keys, (users + 1) * n_items)
        runs = np.repeat(first - np.cumsum(last - first) + (last - first), last - first)
        taken = keys[np.arange(int((last - first).sum())) + runs]
        finish[np.searchsorted(users, taken // n_items), taken % n_items] = np.inf
        order = np.argsort(finish, axis=1)[:, : int(missing[users].max())]
        row, rank = np.nonzero(np.arange(order.shape[1]) < missing[users][:, None])
        found.append(users[row] * n_items + order[row, rank])
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _order(
    pairs: NDArray[np.int64], n_items: int, home: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Place of every pair u * n_items + i (ascending) in the history of u; `home` is the cluster of every item."""
    user, item = np.divmod(pairs, n_items)
    series = rng.permutation(n_items)
    by_cluster = np.lexsort((series[item], home[item], user))
    group = user[by_cluster] * n_items + home[item[by_cluster]]
    within = np.arange(len(pairs)) - np.searchsorted(group, group)
    session = np.cumsum(within % SESSION_LENGTH == 0) - 1
    time = rng.random(session[-1] + 1)
    # A cluster's sessions share out their times, so that its series goes on from one to the next.
    of_group = group[within % SESSION_LENGTH == 0]
    time = time[np.lexsort((time, of_group))]
    ordered = by_cluster[np.lexsort((within, time[session], user[by_cluster]))]
    place = np.empty(len(pairs), dtype=np.int64)
    place[ordered] = np.arange(len(pairs)) - np.searchsorted(user, user)
    return place


def _oracle(theta: NDArray[np.float64], phi: NDArray[np.float64], user_ids: NDArray[np.str_]) -> Oracle:
    def oracle(eval_set: EvalSet, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """P(i | u) of the users in `rows` of `eval_set`: (len(rows), n_items) float32."""
        if eval_set.user_ids is None:
            raise DataError("the oracle knows users by raw id; this EvalSet has no user_ids")
        wanted = eval_set.user_ids[rows]
        # Zero-padded ids ascend as strings, too.
        users = np.minimum(np.searchsorted(user_ids, wanted), len(user_ids) - 1)
        if not np.array_equal(user_ids[users], wanted):
            raise DataError("the oracle was asked for a user that is not of its dataset")
        return (theta[users] @ phi).astype(np.float32)

    return oracle
