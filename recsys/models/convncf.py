"""ConvNCF: a convolutional network over the outer product of a user's and an item's embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecore
from recsys.errors import ConfigError
from recsys.models.base import Recommender, Triples, known_users
from recsys.models.bprmf import BPRMF
from recsys.models.layers import Density, Layers, add_bias, dropout
from recsys.models.losses import squared_norm, widened
from recsys.models.negatives import NegativeSampler, negative_batches
from recsys.models.transfer import check_parts, copy_layer

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from recsys.data import Dataset

__all__ = ["ConvNCF"]

# Pairs that go through the network at a time: as many as have 2 MiB of first layer's output, but not so few that the
# calls take longer than what they do. Larger blocks are mapped afresh by glibc every time: 512 triples of 64
# dimensions at once spend half their time on page faults.
_BLOCK_BYTES, _FEWEST_PAIRS = 2 << 20, 64


class ConvNCF(Recommender):
    """He, Du, Wang, Tian, Tang, Chua (2018), "Outer product-based neural collaborative filtering", IJCAI.

    s(u, i) = w . h_L, h_l = relu(conv_l(h_{l-1})), h_0 = U_u V_i^T, a map of (dim, dim) with one channel; every
        layer's kernel is as wide as its stride, so that the windows tile the map, and the last map is one number
    per channel. (For 2 x 2 windows on maps of even size that is TensorFlow's "SAME", as the authors have it.)

    loss = sum softplus(s(u, n) - s(u, p)) + embeddings * (|U_u|^2 + |V_p|^2 + |V_n|^2) + convs * sum_l (|W_l|^2 +
        |b_l|^2) + (output + convs) * |w|^2

    over the triples of a batch, sums and not means, without a factor 1/2, as in the authors' code. Their bias of
        the score is left out: it changes no difference of scores. As long as the network says nothing, the penalties
    are all that its weights feel, and with the authors' strengths shrink it to 0 within 50 updates: so, like them,
    they are left out for the first epoch. Theirs start from the tables of a BPR-MF (`initialize_from`).

    Args:
        shape: (n_users, n_items).
        dim: width of both tables; the product of the kernels.
        channels: of each layer's output.
        kernels: width and stride of each layer.
        dropout: probability that a number of h_L is set to 0 while training; the others are scaled up.
        embedding_regularization, conv_regularization, output_regularization: embeddings, convs and output above.
        unregularized_epochs: how many epochs at the start have none of the three penalties.
        popularity: a negative is drawn with probability proportional to its degree to this power.
        init_std: initial values of the tables are N(0, init_std^2), those of the other weights N(0, .1^2), both
            drawn anew beyond two standard deviations; biases are .1.
        density: of the weights, in (0, 1]: ``users``, ``items``, ``convs.0``, ..., ``output`` and the biases of
            ``convs``.
        generator: initial values, index sets and later dropout follow from it.

    Raises:
        ConfigError: if channels and kernels differ in number, or the kernels' product is not dim.
    """

    knows_users = True
    paper = ("users", "items")
    noise: torch.Generator

    def __init__(
        self,
        shape: tuple[int, int],
        dim: int = 64,
        channels: Sequence[int] = (32,) * 6,
        kernels: Sequence[int] = (2,) * 6,
        dropout: float = 0.0,
        embedding_regularization: float = 0.01,
        conv_regularization: float = 1.0,
        output_regularization: float = 10.0,
        unregularized_epochs: int = 1,
        popularity: float = 0.0,
        init_std: float = 0.01,
        *,
        density: float | Density = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not channels or len(channels) != len(kernels):
            raise ConfigError(
                "channels and kernels name one number for each layer, and there is at least one; "
                f"got channels {list(channels)} and kernels {list(kernels)}"
            )
        if math.prod(kernels) != dim:
            raise ConfigError(
                f"the kernels {list(kernels)} reduce a map of {math.prod(kernels)} x {math.prod(kernels)} to one "
                f"number, but dim is {dim}; their product must be dim"
            )
        self.n_users, self.n_items = shape
        self._pairs = max(_FEWEST_PAIRS, _BLOCK_BYTES // (4 * channels[0] * (dim // kernels[0]) ** 2))
        self.unregularized_epochs, self.popularity = unregularized_epochs, popularity
        self._epoch = 0  # its steps, known once there are batches
        self.dropout, self.init_std = dropout, init_std
        self.embedding_regularization = embedding_regularization
        self.conv_regularization, self.output_regularization = conv_regularization, output_regularization
        # Drawn before anything whose amount depends on the density: dense, masked and sparse share dropout.
        self.noise = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))

        layers = Layers(density, generator)
        self.users = layers.embedding("users", self.n_users, dim)
        self.items = layers.embedding("items", self.n_items, dim)
        self.convs = nn.ModuleList(
            layers.conv2d(f"convs.{n}", inputs, outputs, kernel, kernel)
            for n, (inputs, outputs, kernel) in enumerate(
                zip([1, *channels], channels, kernels, strict=False)
            )
        )
        self.output = layers.linear("output", channels[-1], 1, bias=False)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all values anew; index sets stay."""
        for layer in (self.users, self.items, *self.convs, self.output):
            std = self.init_std if layer in (self.users, self.items) else 0.1
            values = sparsecore.weight_parameter(layer)
            nn.init.trunc_normal_(values, 0, std, -2 * std, 2 * std, generator=generator)
        for bias in self._biases():
            nn.init.constant_(bias, 0.1)

    def _biases(self) -> list[nn.Parameter]:
        return [
            parameter
            for name, parameter in self.convs.named_parameters()
            if name.removesuffix(".values").endswith("bias")
        ]

    def initialize_from(self, parts: Mapping[str, Recommender]) -> None:
        """Take the tables of a trained BPR-MF, ``parts["bprmf"]``, as the authors do; see `recsys.models.transfer`.

        Raises:
            ConfigError: for another part or model, or tables of another shape or density.
        """
        check_parts(self, parts, {"bprmf": BPRMF})
        for part in parts.values():
            copy_layer("users", self.users, part.get_submodule("users"))
            copy_layer("items", self.items, part.get_submodule("items"))

    @classmethod
    def from_train(cls, train: csr_array, **options: Any) -> Self:
        return cls(train.shape, **options)

    def batches(self, dataset: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[Triples]:
        """Every interaction once, with one item not chosen, see `negative_batches`."""
        sampler = NegativeSampler(dataset.train, self.popularity)
        self._epoch = -(-sampler.interactions // batch_size)
        return negative_batches(sampler, 1, batch_size, generator)

    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        return -(-NegativeSampler(dataset.train, self.popularity).interactions // batch_size)

    def interact(self, users: Tensor, items: Tensor) -> Tensor:
        """(B, M) scores of embeddings: users (B, dim), for each of them items (B, M, dim)."""
        height = max(1, self._pairs // max(1, items.shape[1]))
        parts = zip(users.split(height), items.split(height), strict=True)
        return torch.cat([self._interact(*part) for part in parts])

    def _interact(self, users: Tensor, items: Tensor) -> Tensor:
        batch, each = items.shape[:2]
        # In place: memory for one more of the largest maps can be mapped afresh for every block.
        maps = self._first(users, items)
        for conv in list(self.convs)[1:]:
            maps = conv(maps).relu_()
        hidden = maps.flatten(1)
        if self.training and self.dropout > 0:
            hidden = dropout(hidden, self.dropout, self.noise)
        return self.output(hidden).view(batch, each)

    def _first(self, users: Tensor, items: Tensor) -> Tensor:
        """h_1, the first layer's output, (B M, channels, dim / k, dim / k), in channels_last format.

        Of an outer product a window's sum is sum_a u[kx + a] (sum_b W[c, a, b] v[ky + b]): one small product
        per item and one per pair. Neither the outer products nor, backward, their gradients are written; a
        training step takes about 0.6 of the time of one with a convolution here. Of a sparse kernel all k^2
        weights per channel are multiplied, zeros too.
        """
        conv: Any = self.convs[0]
        (batch, each, dim), k = items.shape, conv.kernel_size[0]
        weight = conv.expand() if isinstance(conv, sparsecore.SparseConv2d) else conv.weight
        channels, size = weight.shape[0], dim // k
        bias = add_bias(weight.new_zeros(channels), conv.bias)
        by_item = torch.einsum("nyb,cab->nayc", items.reshape(-1, size, k), weight.squeeze(1))
        # The bias is one more product, with 1: a sum over the output would be another pass over the memory.
        by_item = torch.cat((by_item, bias.expand(batch * each, 1, size, channels)), dim=1)
        by_user = F.pad(users.view(batch, 1, size, k), (0, 1), value=1.0)
        maps = (by_user @ by_item.view(batch, each, k + 1, size * channels)).relu_()
        return maps.view(batch * each, size, size, channels).permute(0, 3, 1, 2)

    def loss(self, batch: Triples, step: int) -> Tensor:
        users = self.users(batch.users)
        items = self.items(torch.cat((batch.positives.unsqueeze(1), batch.negatives.view(-1, 1)), dim=1))
        scores = widened(self.interact(users, items))
        loss = F.softplus(scores[:, 1] - scores[:, 0]).sum()
        if step < self.unregularized_epochs * self._epoch:
            return loss
        loss = loss + self.embedding_regularization * (squared_norm(users) + squared_norm(items))
        for conv in self.convs:
            squares = sum(squared_norm(parameter) for parameter in conv.parameters())
            loss = loss + self.conv_regularization * squares
        strength = self.output_regularization + self.conv_regularization
        return loss + strength * squared_norm(sparsecore.weight_parameter(self.output))

    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        """Every pair takes a pass through the network, 1.5 million multiply-adds with the authors' settings: slow.

        Raises:
            DataError: for a user who is not in the training data (-1).
        """
        items = torch.arange(self.n_items, device=self.device)
        return self.score_items(users, inputs, items.expand(len(users), -1))

    @torch.no_grad()
    def score_items(self, users: np.ndarray, inputs: csr_array, items: Tensor) -> Tensor:
        """`inputs` is not read.

        Raises:
            DataError: for a user who is not in the training data (-1).
        """
        rows = self.users(known_users(self, users, self.n_users))
        blocks = [
            self.interact(rows, self.items(block))
            for block in items.to(rows.device).split(self._pairs, dim=1)
        ]
        return torch.cat(blocks, dim=1)
