"""MultVAE: a variational autoencoder of users' interaction lists with a multinomial likelihood."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

import sparsecore
from recsys.models.base import Interactions, Recommender
from recsys.models.devices import in_graph, moved, sent
from recsys.models.layers import Density, Layers, add_bias
from recsys.models.losses import gaussian_kl, multinomial_nll, widened

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from recsys.data import Dataset

__all__ = ["MultVAE"]


class MultVAE(Recommender):
    """Liang, Krishnan, Hoffman, Jebara (2018), "Variational autoencoders for collaborative filtering".

    encoder: n_items -> hidden -> (mean, log variance) of `latent` Gaussians; decoder: latent -> hidden ->
        n_items; tanh between. The input of a user with n items is 1/sqrt(n) at them (L2 norm 1), with
        dropout. It is never
    written as a dense vector: the first layer sums rows of an embedding table, one row per item.

    loss = multinomial negative log-likelihood + beta * KL, beta = min(beta_cap, step / anneal_steps).

    Args:
        n_items: size of the catalogue.
        hidden, latent: widths.
        dropout: probability that an entry of the input is left out while training; the others are scaled up.
        beta_cap, anneal_steps: see above; steps are updates.
        density: of the weights, in (0, 1]: ``input``, ``posterior``, ``decoder``, ``output`` and their biases.
        generator: all initial values, index sets and later dropout and sampling noise follow from it.
    """

    paper = ("*", "*bias")
    noise: torch.Generator

    def __init__(
        self,
        n_items: int,
        hidden: int = 600,
        latent: int = 200,
        dropout: float = 0.5,
        beta_cap: float = 0.2,
        anneal_steps: int = 200_000,
        *,
        density: float | Density = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.n_items = n_items
        self.hidden, self.latent = hidden, latent
        self.dropout, self.beta_cap, self.anneal_steps = dropout, beta_cap, anneal_steps
        # Drawn before anything whose amount depends on the density: dense, masked and sparse share their
        # noise.
        noise_seed = torch.randint(2**62, (), generator=generator)
        self.noise = torch.Generator().manual_seed(int(noise_seed))

        layers = Layers(density, generator)
        self.input = layers.embedding_bag("input", n_items, hidden)
        self.input_bias = layers.bias("input_bias", hidden)
        self.posterior = layers.linear("posterior", hidden, 2 * latent)
        self.decoder = layers.linear("decoder", latent, hidden)
        self.output = layers.linear("output", hidden, n_items)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all values anew: weights N(0, 2 / (in + out)), biases N(0, .001^2); index sets stay."""
        shapes = {
            self.input: (self.n_items, self.hidden),
            self.posterior: (self.hidden, 2 * self.latent),
            self.decoder: (self.latent, self.hidden),
            self.output: (self.hidden, self.n_items),
        }
        with torch.no_grad():
            for layer, (fan_in, fan_out) in shapes.items():
                std = (2 / (fan_in + fan_out)) ** 0.5
                sparsecore.weight_parameter(layer).normal_(0, std, generator=generator)
            for name, parameter in self.named_parameters():
                if name.removesuffix(".values").endswith("bias"):
                    parameter.normal_(0, 0.001, generator=generator)

    def encode(self, batch: Interactions) -> tuple[Tensor, Tensor]:
        """Mean and log variance, (B, latent) each, of the users' latent variables."""
        counts = batch.counts
        scale = counts.clamp(min=1).to(sparsecore.weight_parameter(self.input).dtype).rsqrt()
        weights = scale.repeat_interleave(counts, output_size=batch.items.numel())
        if self.training and self.dropout > 0:
            weights = weights / (1 - self.dropout)
            if in_graph():  # which knows no number of entries that chance decides
                weights = weights * (torch.rand_like(weights) >= self.dropout)
            else:
                kept = torch.rand(batch.items.numel(), generator=self.noise) >= self.dropout
                batch, thinned = batch.thinned(kept, weights)
                assert thinned is not None
                weights = thinned
        summed = self.input(batch.items, batch.pointers[:-1], per_sample_weights=weights)
        hidden = torch.tanh(add_bias(summed, self.input_bias))
        mean, log_variance = widened(self.posterior(hidden)).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latent: Tensor) -> Tensor:
        """(B, n_items) logits of the latent variables (B, latent)."""
        return self.output(torch.tanh(self.decoder(latent)))

    @classmethod
    def from_train(cls, train: csr_array, **options: Any) -> Self:
        return cls(train.shape[1], **options)

    def batches(
        self, dataset: Dataset, batch_size: int, generator: torch.Generator
    ) -> Iterator[Interactions]:
        """Users in random order, `batch_size` at a time; users without interactions are kept, as the authors
        do.
        """
        order = torch.randperm(dataset.train.shape[0], generator=generator).numpy()
        for start in range(0, len(order), batch_size):
            yield Interactions.from_scipy(dataset.train[order[start : start + batch_size]])

    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        return -(-dataset.train.shape[0] // batch_size)

    def beta(self, step: int) -> float:
        """Weight of the KL term at an update."""
        return min(self.beta_cap, step / self.anneal_steps)

    def loss(self, batch: Interactions, step: int) -> Tensor:
        mean, log_variance = self.encode(batch)
        latent = mean
        if self.training:
            if in_graph():
                noise = torch.randn_like(mean)
            else:
                noise = torch.empty(mean.shape, dtype=mean.dtype).normal_(generator=self.noise)
                noise = sent(noise, mean.device)
            latent = mean + noise * torch.exp(0.5 * log_variance)
        return multinomial_nll(self.decode(latent), batch) + self.beta(step) * gaussian_kl(mean, log_variance)

    @torch.no_grad()
    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        """Logits at the posterior mean. `users` is not read: who a user is, is what the user has chosen."""
        mean, _ = self.encode(moved(Interactions.from_scipy(inputs), self.device))
        return self.decode(mean)
