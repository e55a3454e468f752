"""SASRec: self-attention over the sequence of items that a user has chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecore
from recsys.csr import rank_in_rows
from recsys.errors import DataError
from recsys.models.base import Interactions, Recommender
from recsys.models.devices import moved
from recsys.models.factors import catalogue_scores, row_scores
from recsys.models.layers import Density, Layers, dropout
from recsys.models.triples import TripleSampler

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from recsys.data import Dataset

__all__ = ["SASRec", "Steps"]


@dataclass(frozen=True)
class Steps:
    """Sequences and what follows each place of them: the item chosen next, and one that the user has never chosen.

    sequences: B sequences of n items in all, the oldest first.
    positives, negatives: (n,) int64 each.
    """

    sequences: Interactions
    positives: Tensor
    negatives: Tensor

    @property
    def size(self) -> int:
        """Number of sequences, B."""
        return self.sequences.size


class SASRec(Recommender):
    """Kang, McAuley (2018), "Self-attentive sequential recommendation".

    A sequence i_1 ... i_m of items (of a longer one the last L = `max_length`) becomes

        x_t = Dropout(sqrt(d) V[i_t] + P[L - m + t]),      then in each block
        x <- x + Dropout(W_o Attention(W_q x', W_k x', W_v x'))     with x' = LayerNorm(x)
        x <- x + Dropout(W_2 ReLU(W_1 x'' + b_1) + b_2)             with x'' = LayerNorm(x)

    and h = LayerNorm(x). A place attends to itself and earlier ones. An item is scored by the same table that items
    are looked up in: score_t(i) = h_t . V[i]. Positions count from the end, so that the newest item is always at L.

    loss = mean over all places t of  softplus(-score_t(i_{t+1})) + softplus(score_t(j)),  j drawn anew for each place.

    This follows the authors' text, and their code in the scale sqrt(d) and the last LayerNorm; W_o is added, as in any
    multi-head attention. (Their code has its residuals and LayerNorms elsewhere, and drops attention weights too.)
    There is no padding row: what is done place by place is done for the places that exist, and only attention sees
    sequences padded to one length, at their end, where causality hides it.

    Args:
        train: (n_users, n_items) interactions.
        order: (train.nnz,) place of each in its user's history, as `Dataset.order`. Part of the state dict.
        hidden: width d.
        blocks: how many.
        heads: of the attention; they divide `hidden`.
        max_length: L.
        dropout: probability, of what is marked Dropout above.
        density: of ``items``, ``positions`` and in block k ``blocks.k.query``, ``.key``, ``.value``, ``.out``,
            ``.inner`` and ``.outer``. LayerNorm stays dense.
        generator: initial values, index sets and later dropout follow from it.
    """

    ordered = True
    noise: torch.Generator
    keys: Tensor
    order: Tensor

    def __init__(
        self,
        train: csr_array,
        order: np.ndarray,
        hidden: int = 50,
        blocks: int = 2,
        heads: int = 1,
        max_length: int = 50,
        dropout: float = 0.5,
        *,
        density: float | Density = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.n_items = train.shape[1]
        self.hidden, self.max_length, self.dropout = hidden, max_length, dropout
        # Drawn before anything whose amount depends on the density: dense, masked and sparse share their noise.
        self.noise = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        users = np.repeat(np.arange(train.shape[0]), np.diff(train.indptr))
        # user * n_items + item, ascending: where an interaction is found.
        keys = torch.from_numpy(users * self.n_items + train.indices)
        self.register_buffer("keys", keys, persistent=False)
        self.register_buffer("order", torch.from_numpy(rank_in_rows(train, order).astype(np.int32)))

        layers = Layers(density, generator)
        self.items = layers.embedding("items", self.n_items, hidden)
        self.positions = layers.embedding("positions", max_length, hidden)
        self.blocks = nn.ModuleList(_Block(f"blocks.{k}", hidden, heads, layers) for k in range(blocks))
        self.norm = nn.LayerNorm(hidden)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, N(0, 2 / (in + out)); biases are 0, LayerNorm does nothing, index sets stay."""
        sizes: dict[nn.Module, int] = {
            self.items: self.n_items + self.hidden,
            self.positions: self.max_length + self.hidden,
        }
        for module in self.modules():
            if isinstance(module, nn.Linear | sparsecore.SparseLinear):
                sizes[module] = 2 * self.hidden
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        with torch.no_grad():
            for layer, fans in sizes.items():
                sparsecore.weight_parameter(layer).normal_(0, (2 / fans) ** 0.5, generator=generator)
            for name, parameter in self.named_parameters():
                if name.removesuffix(".values").endswith("bias"):
                    parameter.zero_()

    @classmethod
    def from_train(cls, train: csr_array, **options: Any) -> Self:
        return cls(train, **options)

    def encode(self, sequences: Interactions) -> Tensor:
        """h at every place of these sequences, (n, hidden); none of them longer than `max_length`."""
        counts, rows = sequences.counts, sequences.rows
        place = torch.arange(len(rows), device=rows.device) - sequences.pointers[rows]
        longest = self.max_length  # on a GPU the longest one would have to be waited for
        if counts.device.type == "cpu":
            longest = int(counts.max()) if len(counts) else 0
        layout = _Layout(rows * longest + place, sequences.size, longest)
        x = self.hidden**0.5 * self.items(sequences.items)
        x = self._drop(x + self.positions(self.max_length - counts[rows] + place))
        for block in self.blocks:
            x = block(x, layout, self._drop)
        return self.norm(x)

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        return dropout(x, self.dropout, self.noise)

    def batches(self, dataset: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[Steps]:
        """Users in random order, each with the last of their history; those with one item or all of them have nothing
        to predict or to set against it, and are left out.
        """
        sampler = TripleSampler(dataset.train)
        first, items = sampler.negatives.pointers, sampler.negatives.items
        history = torch.empty_like(items)
        history[first[self.keys.cpu() // self.n_items] + self.order.cpu()] = items
        users = self._trainable(sampler)
        for part in users[torch.randperm(len(users), generator=generator)].split(batch_size):
            end = first[part + 1]
            counts = (end - first[part] - 1).clamp(max=self.max_length)
            pointers = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
            # Of each user the interactions end - 1 - count .. end - 2, followed by those one later.
            at = torch.arange(int(pointers[-1])) + (end - 1 - pointers[1:]).repeat_interleave(counts)
            negatives = sampler.negatives.draw(part.repeat_interleave(counts), 1, generator).squeeze(1)
            yield Steps(Interactions(history[at], pointers, part), history[at + 1], negatives)

    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        return -(-len(self._trainable(TripleSampler(dataset.train))) // batch_size)

    @staticmethod
    def _trainable(sampler: TripleSampler) -> Tensor:
        users = sampler.users[sampler.negatives.pointers.diff()[sampler.users] > 1]
        if not len(users):
            raise DataError("no user has two interactions, one to follow the other: there is no sequence")
        return users

    def loss(self, batch: Steps, step: int) -> Tensor:
        pairs = torch.stack((batch.positives, batch.negatives), dim=1)
        positive, negative = row_scores(self.encode(batch.sequences), self.items, pairs).unbind(1)
        return (F.softplus(-positive) + F.softplus(negative)).mean()

    @torch.no_grad()
    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        """h . V[i] at the end of each user's sequence, for every item; 0 for a user without any input.

        The sequence is `inputs`: first, in their order, the items that are known from training; after them the others,
        in the order in which the matrix stores them. So at test the item of validation is the newest, as it should be.
        For somebody new (-1) all are in that order, which is by column in an `EvalSet`: not the true one.
        """
        given = moved(Interactions.from_scipy(inputs, users), self.device)
        sequences = self._last(self._in_order(given))
        filled = sequences.counts > 0
        state = sparsecore.weight_parameter(self.items).new_zeros((len(filled), self.hidden))
        if bool(filled.any()):
            state[filled] = self.encode(sequences)[sequences.pointers[1:][filled] - 1]
        return catalogue_scores(state, self.items)

    def _in_order(self, inputs: Interactions) -> Interactions:
        """The inputs as sequences, see `score`."""
        assert inputs.users is not None
        rows = inputs.rows
        keys = inputs.users[rows] * self.n_items + inputs.items
        found = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        # A user's places are below n_items. The key of a user -1 is negative and never found.
        place = torch.where(self.keys[found] == keys, self.order[found], self.n_items)
        by_place = torch.argsort(rows * (self.n_items + 1) + place, stable=True)
        return Interactions(inputs.items[by_place], inputs.pointers)

    def _last(self, sequences: Interactions) -> Interactions:
        """The last `max_length` of every sequence."""
        ends = sequences.pointers[1:].repeat_interleave(sequences.counts)
        kept = torch.arange(len(ends), device=ends.device) >= ends - self.max_length
        counts = sequences.counts.clamp(max=self.max_length)
        return Interactions(sequences.items[kept], torch.cat((counts.new_zeros(1), counts.cumsum(0))))


@dataclass(frozen=True)
class _Layout:
    """Where n places of B sequences lie in a padded (B, longest) array: `flat`, (n,) int64."""

    flat: Tensor
    size: int
    longest: int


class _Block(nn.Module):
    """Causal self-attention and a point-wise feed-forward network, each with LayerNorm before and a residual."""

    def __init__(self, name: str, hidden: int, heads: int, layers: Layers) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.forward_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query = layers.linear(f"{name}.query", hidden, hidden, bias=False)
        self.key = layers.linear(f"{name}.key", hidden, hidden, bias=False)
        self.value = layers.linear(f"{name}.value", hidden, hidden, bias=False)
        self.out = layers.linear(f"{name}.out", hidden, hidden, bias=False)
        self.inner = layers.linear(f"{name}.inner", hidden, hidden)
        self.outer = layers.linear(f"{name}.outer", hidden, hidden)

    def forward(self, x: Tensor, layout: _Layout, drop: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, hidden) -> (n, hidden), the places of all sequences in a row."""
        normed = self.attention_norm(x)
        query, key, value = (
            self._padded(project(normed), layout) for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(-1, x.shape[1])[layout.flat]
        x = x + drop(self.out(attended))
        return x + drop(self.outer(torch.relu(self.inner(self.forward_norm(x)))))

    def _padded(self, x: Tensor, layout: _Layout) -> Tensor:
        """(n, hidden) -> (B, heads, longest, hidden / heads), 0 behind the end of a sequence."""
        padded = x.new_zeros((layout.size * layout.longest, x.shape[1])).index_copy(0, layout.flat, x)
        return padded.view(layout.size, layout.longest, self.heads, x.shape[1] // self.heads).transpose(1, 2)
