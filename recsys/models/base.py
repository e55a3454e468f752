"""What every recommender is: batches, a loss, a score."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from recsys.csr import entry_rows
from recsys.errors import ConfigError, DataError
from recsys.models.devices import sent

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from recsys.data import Dataset

__all__ = [
    "Batch",
    "Interactions",
    "Recommender",
    "Triples",
    "known_users",
]


class Batch(Protocol):
    """What a model's `batches` yields and its `loss` takes; of whatever kind the model chooses."""

    @property
    def size(self) -> int:
        """Number of examples, B."""


@dataclass(frozen=True)
class Interactions:
    """The items of each user of a batch, as a CSR structure.

    items: (nnz,) int64, the items of user 0, then of user 1, ...
    pointers: (B + 1,) int64; user b owns `items[pointers[b]:pointers[b + 1]]`, which may be empty.
    users: (B,) int64 rows of the users in the training matrix, for models that know them.
    """

    items: Tensor
    pointers: Tensor
    users: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of users, B."""
        return self.pointers.numel() - 1

    @property
    def counts(self) -> Tensor:
        """(B,) int64, interactions of each user."""
        return self.pointers.diff()

    @property
    def rows(self) -> Tensor:
        """(nnz,) int64, the user (0..B-1) of every interaction."""
        users = torch.arange(self.size, device=self.items.device)
        return users.repeat_interleave(self.counts, output_size=self.items.numel())

    def only(self, kept: Tensor) -> Interactions:
        """These users with those interactions alone that ``kept``, (nnz,) bool, says."""
        ends = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
        return Interactions(self.items[kept], ends[self.pointers], self.users)

    def thinned(self, kept: Tensor, weights: Tensor | None) -> tuple[Interactions, Tensor | None]:
        """What dropout leaves: ``kept`` is (nnz,) bool on the CPU, the weights, (nnz,) or None for ones, go along.

        On a CPU those interactions are gone: fewer rows to read and to send gradients to. On a GPU, which would have
        to say how many are left before it could go on, they stay with the weight 0.
        """
        if self.items.device.type == "cpu":
            return self.only(kept), None if weights is None else weights[kept]
        kept = sent(kept, self.items.device)
        return self, kept.to(torch.get_default_dtype()) if weights is None else weights * kept

    @classmethod
    def from_scipy(cls, matrix: csr_array, users: np.ndarray | None = None) -> Interactions:
        """The rows of a CSR matrix; its values are not read: an entry is an interaction."""
        return cls(
            torch.from_numpy(matrix.indices.astype(np.int64)),
            torch.from_numpy(matrix.indptr.astype(np.int64)),
            None if users is None else torch.from_numpy(users.astype(np.int64)),
        )


@dataclass(frozen=True)
class Triples:
    """(B,) int64 each: users, an item each of them has chosen, an item each of them has not; or (B, N) of the last."""

    users: Tensor
    positives: Tensor
    negatives: Tensor

    @property
    def size(self) -> int:
        """Number of triples, B."""
        return self.users.numel()


_MOST_SCORES = 1 << 24  # that exist at a time


class Recommender(nn.Module, ABC):
    """A model that can be trained on a data set and that scores whole catalogues.

    Its layers come from `recsys.models.layers.Layers`: constructed with `density=1.0` it consists of `nn.Linear`,
    `nn.Embedding` and `nn.EmbeddingBag`; with less, of sparsecore's layers of that density. The rest of the code
    does not tell the difference.

    Attributes:
        n_items: size of the catalogue.
        paper: names (patterns of `Density`) of the weights that the DSL authors prune in this model.
        knows_users: it has something of its own for every user, and scores nobody else (held-out users).
        ordered: whether the model reads in which order users have chosen; `from_train` then takes `Dataset.order`
            as the keyword argument `order`, and the model's state dict holds it.
    """

    paper: ClassVar[tuple[str, ...]] = ("*",)
    knows_users: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    n_items: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @classmethod
    def from_train(cls, train: csr_array, **options: Any) -> Self:
        """A model for these interactions, (n_users, n_items), with keyword arguments of the class.

        For a class whose first argument is not the interactions themselves, this says what it is made from.
        """
        return cls(train, **options)

    @abstractmethod
    def batches(self, dataset: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[Any]:
        """One epoch of batches, in an order drawn from `generator`. The incomplete last batch is kept."""

    @abstractmethod
    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        """How many batches `batches` yields."""

    @abstractmethod
    def loss(self, batch: Any, step: int) -> Tensor:
        """Scalar training loss of a batch, its mean or its sum; `step` is the number of updates made before it."""

    @abstractmethod
    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        """(B, n_items) scores of every item, without gradient: the higher, the sooner recommended.

        users: (B,) rows of the training matrix, or -1 for somebody who is not in it.
        inputs: (B, n_items) what these users have chosen so far. Items in it are scored like any other.
        """

    def score_items(self, users: np.ndarray, inputs: csr_array, items: Tensor) -> Tensor:
        """(B, C) scores of some items of each user, (B, C) int64; users and inputs as in `score`.

        A model that computes every score by itself (and not by one product with the catalogue) overrides this.
        """
        scores = self.score(users, inputs)
        return scores.gather(1, items.to(scores.device))

    @torch.no_grad()
    def best(
        self, users: np.ndarray, inputs: csr_array, k: int, exclude: csr_array | None = None
    ) -> tuple[Tensor, Tensor]:
        """The items with the highest scores of each user, best first: scores and items, both (B, min(k, n_items)).

        users, inputs: as in `score`. exclude: (B, n_items), what is left out; where fewer are left, the last scores
        are -inf. A model whose scores need not all exist for that overrides this.
        """
        height, count = max(1, _MOST_SCORES // self.n_items), min(k, self.n_items)
        parts = []
        for start in range(0, len(users), height):
            part = slice(start, start + height)
            scores = self.score(users[part], inputs[part])
            if exclude is not None:
                left_out = exclude[part]
                rows, items = entry_rows(left_out), left_out.indices.astype(np.int64)
                scores[
                    sent(torch.from_numpy(rows), scores.device), sent(torch.from_numpy(items), scores.device)
                ] = -torch.inf
            parts.append(scores.topk(count))
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    def tune(self) -> None:
        """Called once on a model that was just made and is to be trained: whatever makes that faster."""

    def initialize_from(self, parts: Mapping[str, Recommender]) -> None:
        """Take initial values from models that were trained before, on the same data; called once, before training.

        Args:
            parts: these models, by the names of the parts that they are to this one (`train.pretrained`).

        Raises:
            ConfigError: this model takes no such part, or it does not fit.
        """
        raise ConfigError(
            f"train.pretrained: {type(self).__name__} takes no pre-trained parts, got {', '.join(parts)}"
        )


def known_users(model: Recommender, users: np.ndarray, n_users: int) -> Tensor:
    """Users as a tensor (B,) int64, where the model is.

    Raises:
        DataError: for a user who is not among the model's (-1).
    """
    rows = torch.as_tensor(users, dtype=torch.int64)
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= n_users):
        raise DataError(
            f"{type(model).__name__} scores the {n_users} users of its training data only, but another was asked "
            "for; multvae, sasrec, ease, itemknn and popularity score users who are not in the training data"
        )
    return sent(rows, model.device)
