"""UltraGCN: two tables, trained so that they approach what infinitely many hops of a graph convolution would give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

import sparsecore
from recsys.models.base import Triples
from recsys.models.factors import Factors, pair_scores
from recsys.models.layers import Density
from recsys.models.losses import squared_norm
from recsys.models.neighbors import ones, top_neighbors

if TYPE_CHECKING:
    from recsys.data import Dataset

__all__ = ["UltraGCN", "item_neighbors"]


class UltraGCN(Factors):
    """Mao, Zhu, Xiao, Lu, Wang, He (2021), "UltraGCN: ultra simplification of graph convolutional networks for
    recommendation".

    With s = U_u . V_i + c, d the degrees in the training data and beta_ui = sqrt(d_u + 1) / (d_u sqrt(d_i + 1)), the
    loss of a batch of interactions (u, i), each with N items j drawn uniformly (not: items not chosen), is their sum of

        (w1 + w2 beta_ui) softplus(-s_ui)
        + negative_weight * mean over j of (w3 + w4 beta_uj) softplus(s_uj)
        + item_weight * sum over the neighbors k of i of omega_ik softplus(-s_uk)

    and of regularization / 2 * (|U|^2 + |V|^2), over all weights that are stored. omega: see `item_neighbors`.
    Exploration of sparse tables ranks the weights that it has just pruned without the gradient of this last term
    (masked training has it there).

    c is 0 in the paper. Negatives outweigh, so scores have to be far below 0 on average, and the tables learn that
    first. Sparse ones cannot well: two rows that store no column in common score just c, ahead of nearly everything,
    and other scores vary with the number of columns that two rows share. With offset="prior", c is the score that
    would make the first two terms smallest were it that of all pairs, the log odds of their weights:

        c = log (sum of w1 + w2 beta_ui) - log (negative_weight * sum of the mean over all j of w3 + w4 beta_uj)

    with sums over all interactions (u, i). The tables then have the rest to learn: they fit sooner, and want a larger
    regularization. `score` leaves c out, which is the same for all items.

    Args:
        train: (n_users, n_items) interactions: degrees and similar items.
        dim: width of both tables.
        negatives: N.
        negative_weight, item_weight, regularization, w1, w2, w3, w4: see above.
        neighbors: similar items of each.
        init_std: initial values are N(0, init_std^2).
        offset: "none", c = 0, or "prior"; see above.
        density: of ``users`` and ``items``, in (0, 1].
        generator: initial values and index sets follow from it.
    """

    user_beta: Tensor
    item_beta: Tensor
    similar: Tensor | None
    omega: Tensor

    def __init__(
        self,
        train: csr_array,
        dim: int = 64,
        negatives: int = 800,
        negative_weight: float = 300.0,
        item_weight: float = 5e-4,
        regularization: float = 1e-4,
        w1: float = 1e-8,
        w2: float = 1.0,
        w3: float = 1e-8,
        w4: float = 1.0,
        neighbors: int = 10,
        init_std: float = 1e-4,
        offset: Literal["none", "prior"] = "none",
        *,
        density: float | Density = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(train.shape, dim, init_std, density=density, generator=generator)
        self.negatives, self.negative_weight, self.item_weight = negatives, negative_weight, item_weight
        self.regularization, self.weights = regularization, (w1, w2, w3, w4)
        chosen = ones(train)
        user_beta, item_beta = _beta(chosen.sum(axis=1), chosen.sum(axis=0))
        # Functions of the training data, as the graph of LightGCN: not part of the state dict.
        for name, tensor in (("user_beta", user_beta), ("item_beta", item_beta)):
            self.register_buffer(name, torch.from_numpy(tensor.astype(np.float32)), persistent=False)
        self._chosen, self._neighbors = chosen, neighbors
        self.offset = self._prior(user_beta, item_beta) if offset == "prior" else 0.0
        self.register_buffer("similar", None, persistent=False)
        self.register_buffer("omega", None, persistent=False)

    def batches(self, dataset: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[Triples]:
        """Every interaction once, in random order, with negatives drawn uniformly from all items."""
        train = dataset.train
        users = torch.from_numpy(np.repeat(np.arange(train.shape[0]), np.diff(train.indptr)))
        items = torch.from_numpy(train.indices.astype(np.int64))
        for part in torch.randperm(len(users), generator=generator).split(batch_size):
            drawn = torch.randint(self.n_items, (len(part), self.negatives), generator=generator)
            yield Triples(users[part], items[part], drawn)

    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        return -(-dataset.train.nnz // batch_size)

    def similar_items(self) -> tuple[Tensor, Tensor]:
        """(n_items, neighbors) items and omega, made at the first step: a model that only serves needs none."""
        if self.similar is None:
            similar, omega = item_neighbors(self._chosen, self._neighbors)
            self.similar = torch.from_numpy(similar).to(self.user_beta.device)
            self.omega = torch.from_numpy(omega).to(self.user_beta)
        return self.similar, self.omega

    def _prior(self, user_beta: np.ndarray, item_beta: np.ndarray) -> float:
        """c of offset="prior"; 0 where all weights of one side are 0, and no score would be the best."""
        w1, w2, w3, w4 = self.weights
        count = self._chosen.nnz
        together = float(user_beta @ (self._chosen @ item_beta))  # sum of beta over the interactions
        apart = float(user_beta @ self._chosen.sum(axis=1)) * float(item_beta.sum()) / self.n_items
        positive, negative = w1 * count + w2 * together, self.negative_weight * (w3 * count + w4 * apart)
        return math.log(positive / negative) if min(positive, negative) > 0 else 0.0

    def loss(self, batch: Triples, step: int) -> Tensor:
        w1, w2, w3, w4 = self.weights
        similar, omega = (of_items[batch.positives] for of_items in self.similar_items())
        items = torch.cat((batch.positives.unsqueeze(1), batch.negatives, similar), dim=1)
        scores = pair_scores(self.users, batch.users, self.items, items)
        if self.offset:
            scores = scores + self.offset
        positive, negative, neighbor = scores.split((1, self.negatives, similar.shape[1]), dim=1)
        beta = self.user_beta[batch.users].unsqueeze(1)
        chosen = (w1 + w2 * beta * self.item_beta[batch.positives].unsqueeze(1)) * F.softplus(-positive)
        drawn = (w3 + w4 * beta * self.item_beta[batch.negatives]) * F.softplus(negative)
        alike = omega * F.softplus(-neighbor)
        tables = (sparsecore.weight_parameter(table) for table in (self.users, self.items))
        return (
            chosen.sum()
            + self.negative_weight * drawn.mean(dim=1).sum()
            + self.item_weight * alike.sum()
            + self.regularization / 2 * sum(squared_norm(values) for values in tables)
        )


def item_neighbors(train: csr_array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The most similar items of each, itself included, by omega.

    With the co-occurrences A = R^T R and their sums D = A 1: omega_ik = A_ik sqrt(D_i + 1) / (D_i sqrt(D_k + 1)).

    Args:
        train: R, (n_users, n_items).
        count: neighbors of an item. One that has fewer is its own neighbor again, with omega 0.

    Returns:
        (n_items, count) int64 items and (n_items, count) float64 omega, the largest first.
    """
    chosen = ones(train)
    total = np.asarray(chosen.T @ chosen.sum(axis=1))
    own, other = _beta(total, total)
    return top_neighbors(chosen, count, lambda items, others, together: together * own[items] * other[others])


def _beta(own: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(d + 1) / d of the one side (0 where d is 0) and 1 / sqrt(d + 1) of the other."""
    own, other = np.asarray(own, np.float64), np.asarray(other, np.float64)
    return np.divide(np.sqrt(own + 1), own, out=np.zeros_like(own), where=own > 0), 1 / np.sqrt(other + 1)
