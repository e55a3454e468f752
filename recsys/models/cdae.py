"""CDAE: a denoising autoencoder of users' interaction lists with a vector of its own for every user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

import sparsecore
from recsys.models.base import Interactions, Recommender, known_users
from recsys.models.devices import moved, sent
from recsys.models.layers import Density, Layers, add_bias
from recsys.models.losses import (
    bernoulli_nll,
    multinomial_nll,
    sampled_bernoulli_nll,
    sampled_squares,
    squared_norm,
)
from recsys.models.negatives import NegativeSampler

if TYPE_CHECKING:
    from recsys.data import Dataset

__all__ = ["CDAE"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda mixed: mixed,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_SAMPLED = {"sampled": sampled_bernoulli_nll, "squared": sampled_squares}


class CDAE(Recommender):
    """Wu, DuBois, Zheng, Ester (2016), "Collaborative denoising auto-encoders for top-N recommender systems".

    hidden = activation(W^T x + V_u + b), logits = W' hidden + b'

    where x is 1 at the items that user u has chosen; while training each of them is left out with probability
    `dropout`. x is never written as a dense vector: the first layer sums rows of W, one row per item. W and W' are two
    tables; the authors' other form, W' = W, is not offered, as its one index set would have to serve both products.

    loss, summed over items, the mean over the users of a batch, plus regularization / 2 * (|W|^2 + |W'|^2 + |V|^2):

        "bce": binary cross-entropy with all items.
        "sampled": the same with the items chosen and `negatives` items for each of them, drawn with replacement from
            those that the user has not chosen, as the authors do. All logits are computed all the same.
        "squared": half the squared differences of the logits to 1 and 0, of the same sample: the authors' other loss.
        "multinomial": the multinomial likelihood of MultVAE.

    Biases are not penalised, unlike the authors'. Exploration of sparse weights ranks those that it has just pruned
    without the gradient of the penalty (masked training has it there).

    Args:
        shape: (n_users, n_items).
        hidden: width.
        activation: "sigmoid", "relu", "tanh" or "identity".
        dropout: see above.
        rescale: divide what is left of the input by 1 - dropout.
        loss, negatives, regularization: see above.
        density: of the weights, in (0, 1]: ``input``, ``users``, ``output`` and the biases ``input_bias`` and
            ``output.bias``.
        generator: all initial values, index sets and later dropout and negatives follow from it.
    """

    knows_users = True
    paper = ("*", "*bias")
    noise: torch.Generator

    def __init__(
        self,
        shape: tuple[int, int],
        hidden: int = 64,
        activation: Literal["sigmoid", "relu", "tanh", "identity"] = "relu",
        dropout: float = 0.5,
        rescale: bool = True,
        loss: Literal["bce", "sampled", "squared", "multinomial"] = "bce",
        negatives: int = 5,
        regularization: float = 0.0,
        *,
        density: float | Density = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.n_users, self.n_items = shape
        self.hidden, self.activation = hidden, activation
        self.dropout, self.rescale = dropout, rescale
        self.objective, self.negatives, self.regularization = loss, negatives, regularization
        # Drawn before anything whose amount depends on the density: dense, masked and sparse share their noise.
        noise_seed = torch.randint(2**62, (), generator=generator)
        self.noise = torch.Generator().manual_seed(int(noise_seed))

        layers = Layers(density, generator)
        self.input = layers.embedding_bag("input", self.n_items, hidden)
        self.users = layers.embedding("users", self.n_users, hidden)
        self.input_bias = layers.bias("input_bias", hidden)
        self.output = layers.linear("output", hidden, self.n_items)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, N(0, 2 / (rows + columns)), biases 0; index sets stay."""
        rows = {self.input: self.n_items, self.users: self.n_users, self.output: self.n_items}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.removesuffix(".values").endswith("bias"):
                    parameter.zero_()
            for layer, count in rows.items():
                std = (2 / (count + self.hidden)) ** 0.5
                sparsecore.weight_parameter(layer).normal_(0, std, generator=generator)

    def encode(self, batch: Interactions, scale: float = 1.0, weights: Tensor | None = None) -> Tensor:
        """(B, hidden) of users and what is left of their interactions, W^T x multiplied by `scale`.

        weights: (nnz,) of the interactions; 1 each if None.
        """
        assert batch.users is not None
        summed = self.input(batch.items, batch.pointers[:-1], per_sample_weights=weights)
        mixed = add_bias(
            (summed if scale == 1 else summed * scale) + self.users(batch.users), self.input_bias
        )
        return _ACTIVATIONS[self.activation](mixed)

    @classmethod
    def from_train(cls, train: csr_array, **options: Any) -> Self:
        return cls(train.shape, **options)

    def batches(
        self, dataset: Dataset, batch_size: int, generator: torch.Generator
    ) -> Iterator[Interactions]:
        """Users with an interaction in random order, `batch_size` at a time."""
        rows = np.flatnonzero(np.diff(dataset.train.indptr))
        rows = rows[torch.randperm(len(rows), generator=generator).numpy()]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            yield Interactions.from_scipy(dataset.train[part], part)

    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        return -(-int(np.count_nonzero(np.diff(dataset.train.indptr))) // batch_size)

    def loss(self, batch: Interactions, step: int) -> Tensor:
        shown, scale, weights = batch, 1.0, None
        if self.training and self.dropout > 0:
            kept = torch.rand(batch.items.numel(), generator=self.noise) >= self.dropout
            shown, weights = batch.thinned(kept, None)
            scale = 1 / (1 - self.dropout) if self.rescale else 1.0
        logits = self.output(self.encode(shown, scale, weights))
        if self.objective == "bce":
            total = bernoulli_nll(logits, batch)
        elif self.objective == "multinomial":
            total = multinomial_nll(logits, batch)
        else:
            total = _SAMPLED[self.objective](logits, batch, *self.draw_negatives(batch))
        if self.regularization:
            tables = (self.input, self.users, self.output)
            squares = sum(squared_norm(sparsecore.weight_parameter(table)) for table in tables)
            total = total + self.regularization / 2 * squares
        return total

    def draw_negatives(self, batch: Interactions) -> tuple[Tensor, Tensor]:
        """Users (0..B-1) and items, for the losses of samples; nothing for a user who has chosen every item."""
        device, batch = batch.items.device, moved(batch, torch.device("cpu"))
        chosen = (np.ones(len(batch.items), np.float32), batch.items.numpy(), batch.pointers.numpy())
        sampler = NegativeSampler(csr_array(chosen, shape=(batch.size, self.n_items)))
        rows = batch.rows[sampler.drawable[batch.rows]]
        drawn = sampler.draw(rows, self.negatives, self.noise)
        return sent(rows.repeat_interleave(self.negatives), device), sent(drawn.view(-1), device)

    @torch.no_grad()
    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        """Logits of users of the training data by their vectors and by all of `inputs`."""
        known_users(self, users, self.n_users)
        shown = Interactions.from_scipy(inputs, users)
        return self.output(self.encode(moved(shown, self.device)))
