"""NeuMF: a generalised matrix factorisation and a multilayer perceptron, side by side, under one logistic output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecore
from recsys.errors import ConfigError
from recsys.models.base import Recommender, Triples, known_users
from recsys.models.layers import Density, Layers, add_bias, dropout
from recsys.models.losses import squared_norm, widened
from recsys.models.negatives import NegativeSampler, negative_batches
from recsys.models.transfer import check_parts, copy_layer, copy_weight, dense_weight

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from recsys.data import Dataset

__all__ = ["NeuMF"]

_BLOCK = 1 << 22  # numbers of the widest hidden layer that stand at a time while scoring: 16 MiB


class NeuMF(Recommender):
    """He, Liao, Zhang, Nie, Hu, Chua (2017), "Neural collaborative filtering".

    With tables P, Q of `factors` columns and U, V of layers[0] / 2 columns,

        score(u, i) = w . (P_u * Q_i) + v . h_n + c,
        h_1 = relu(A U_u + B V_i + b_1),  h_k = relu(W_k h_(k-1) + b_k),

    where A and B are the two halves of the first layer's matrix, for the concatenation of U_u and V_i, which is
    never made: A U_u is computed once for all items of a user. In training, every h_k is followed by dropout.

    Each chosen item comes with `negatives` that the user has not chosen, drawn anew every epoch. With the log losses
    softplus(-s) of the B chosen and softplus(s) of the B N others of a batch,

        loss = their mean over all B (1 + N) (`loss` "samples": as the authors), or the mean over the chosen plus the
               mean over the others ("means": as the authors of Dynamic Sparse Learning)
               + regularization / 2 * (mean |row|^2 of the users + of the items), over rows of the tables in the batch.

    Args:
        shape: (n_users, n_items).
        factors: columns of P and Q.
        layers: widths, the first of the concatenation; the authors' has 3 hidden layers, [8f, 4f, 2f, f].
        parts: "both", or one alone: "gmf", "mlp", which can be trained first (`initialize_from`).
        negatives: N.
        popularity: a negative is drawn with probability proportional to its degree to this power.
        dropout: probability that a hidden unit is zeroed while training; the others are scaled up.
        regularization, loss: see above.
        init_std: tables are N(0, init_std^2) at first; matrices uniform within sqrt(6 / (in + out)), of the whole first
            layer and the whole output; biases 0.
        density: of the weights, in (0, 1]: ``gmf_users``, ``gmf_items``, ``mlp_users``, ``mlp_items``;
            ``hidden_user`` (A, with the bias), ``hidden_item`` (B), ``hidden.0`` (W_2), ...; ``output_gmf`` (w),
            ``output_mlp`` (v). The halves of a matrix have that density each.
        generator: initial values, index sets and later dropout follow from it.
    """

    knows_users = True
    paper = ("mlp_users", "mlp_items")
    noise: torch.Generator

    def __init__(
        self,
        shape: tuple[int, int],
        factors: int = 8,
        layers: Sequence[int] = (64, 32, 16, 8),
        parts: Literal["both", "gmf", "mlp"] = "both",
        negatives: int = 4,
        popularity: float = 0.0,
        dropout: float = 0.0,
        regularization: float = 0.0,
        loss: Literal["samples", "means"] = "samples",
        init_std: float = 0.01,
        *,
        density: float | Density = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len(layers) < 2 or layers[0] % 2:
            raise ConfigError(
                f"model.layers: expected an even width (of a user's and an item's row together) and at least one "
                f"hidden layer, got {list(layers)}"
            )
        self.n_users, self.n_items = shape
        self.layers, self.parts = list(layers), parts
        self.negatives, self.popularity, self.dropout, self.init_std = (
            negatives,
            popularity,
            dropout,
            init_std,
        )
        self.regularization, self.pooled = regularization, loss == "samples"
        self.gmf, self.mlp = parts != "mlp", parts != "gmf"
        # Drawn before anything whose amount depends on the density: dense, masked and sparse share their dropout.
        noise_seed = torch.randint(2**62, (), generator=generator)
        self.noise = torch.Generator().manual_seed(int(noise_seed))

        make = Layers(density, generator)
        fans: dict[str, int] = {}  # in + out of each matrix, 0 for tables
        output = self.gmf * factors + self.mlp * layers[-1] + 1
        if self.gmf:
            self.gmf_users = make.embedding("gmf_users", self.n_users, factors)
            self.gmf_items = make.embedding("gmf_items", self.n_items, factors)
            self.output_gmf = make.linear("output_gmf", factors, 1, bias=False)
            fans |= {"gmf_users": 0, "gmf_items": 0, "output_gmf": output}
        if self.mlp:
            half, first = layers[0] // 2, layers[1]
            self.mlp_users = make.embedding("mlp_users", self.n_users, half)
            self.mlp_items = make.embedding("mlp_items", self.n_items, half)
            self.hidden_user = make.linear("hidden_user", half, first)
            self.hidden_item = make.linear("hidden_item", half, first, bias=False)
            fans |= {"mlp_users": 0, "mlp_items": 0}
            fans |= {"hidden_user": layers[0] + first, "hidden_item": layers[0] + first}
            self.hidden = nn.ModuleList()
            for k, (wide, narrow) in enumerate(itertools.pairwise(layers[1:])):
                self.hidden.append(make.linear(f"hidden.{k}", wide, narrow))
                fans[f"hidden.{k}"] = wide + narrow
            self.output_mlp = make.linear("output_mlp", layers[-1], 1, bias=False)
            fans["output_mlp"] = output
        self.output_bias = make.bias("output_bias", 1)
        self.matrices, self._widest = fans, max(layers[1:]) if self.mlp else factors
        self._catalogue: Tensor | None = None
        self.register_load_state_dict_post_hook(_forget)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all values anew, see `init_std`; index sets stay."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                fan = self.matrices.get(name.removesuffix(".weight").removesuffix(".values"))
                if fan is None:
                    parameter.zero_()
                elif fan == 0:
                    parameter.normal_(0, self.init_std, generator=generator)
                else:
                    parameter.uniform_(-((6 / fan) ** 0.5), (6 / fan) ** 0.5, generator=generator)

    @classmethod
    def from_train(cls, train: csr_array, **options: Any) -> Self:
        return cls(train.shape, **options)

    def batches(self, dataset: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[Triples]:
        """Every interaction once, in random order, with its negatives; `batch_size` does not count these.

        What validation and test rank is not looked at. Interactions of users who have chosen everything are left out.
        """
        sampler = NegativeSampler(dataset.train, self.popularity)
        return negative_batches(sampler, self.negatives, batch_size, generator)

    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        return -(-NegativeSampler(dataset.train, self.popularity).interactions // batch_size)

    def loss(self, batch: Triples, step: int) -> Tensor:
        items = torch.cat((batch.positives.unsqueeze(1), batch.negatives), dim=1)
        scores = widened(self._scores(batch.users, items))
        chosen, others = F.softplus(-scores[:, 0]), F.softplus(scores[:, 1:])
        pooled = (chosen.sum() + others.sum()) / scores.numel()
        loss = pooled if self.pooled else chosen.mean() + others.mean()
        if self.regularization:
            loss = loss + self.regularization / 2 * self._squares(batch.users, items)
        return loss

    def _scores(self, users: Tensor, items: Tensor) -> Tensor:
        """(B, M) logits of items (B, M) for users (B,)."""
        parts = []
        if self.gmf:
            product = self.gmf_users(users).unsqueeze(1) * self.gmf_items(items)
            parts.append(self.output_gmf(product))
        if self.mlp:
            of_user = self.hidden_user(self.mlp_users(users)).unsqueeze(1)
            parts.append(self._perceptron(of_user + self._hidden_items(items)))
        return add_bias(sum(parts[1:], parts[0]), self.output_bias).squeeze(-1)

    def _squares(self, users: Tensor, items: Tensor) -> Tensor:
        """Mean |row|^2 of the users plus that of the items, over all tables."""
        lookups = []
        if self.gmf:
            lookups += [(self.gmf_users, users), (self.gmf_items, items)]
        if self.mlp:
            lookups += [(self.mlp_users, users), (self.mlp_items, items)]
        return torch.stack([squared_norm(table(ids)) / ids.numel() for table, ids in lookups]).sum()

    def _hidden_items(self, items: Tensor) -> Tensor:
        """B V_i, (*items.shape, layers[1])."""
        # Where a batch looks up more items than there are, each is multiplied once instead.
        if self._keeps or items.numel() > self.n_items:
            return F.embedding(items, self._all_items())
        return self.hidden_item(self.mlp_items(items))

    def _all_items(self) -> Tensor:
        """B V, (n_items, layers[1])."""
        if self._catalogue is not None and self._keeps:
            return self._catalogue
        rows = self.hidden_item(self.mlp_items(torch.arange(self.n_items, device=self.device)))
        self._catalogue = rows if self._keeps else None
        return rows

    @property
    def _keeps(self) -> bool:
        """Whether weights are at rest, so that what is computed from them may be kept."""
        return not self.training and not torch.is_grad_enabled()

    def _perceptron(self, first: Tensor) -> Tensor:
        """(..., 1) of what goes into the first layer's activation, (..., layers[1])."""
        hidden = self._activate(first)
        for layer in self.hidden:
            hidden = self._activate(layer(hidden))
        return self.output_mlp(hidden)

    def _activate(self, input: Tensor) -> Tensor:
        hidden = F.relu(input)
        return dropout(hidden, self.dropout, self.noise) if self.training and self.dropout > 0 else hidden

    def train(self, mode: bool = True) -> Self:
        self._catalogue = None
        return super().train(mode)

    @torch.no_grad()
    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        """Logits of the whole catalogue, some items of all users at a time; `inputs` is not read.

        Raises:
            DataError: for a user who is not in the training data (-1).
        """
        rows = known_users(self, users, self.n_users)
        weight = next(self.parameters())
        scores = torch.zeros(len(rows), self.n_items, dtype=weight.dtype, device=weight.device)
        if self.gmf:
            weighted = self.gmf_users(rows) * dense_weight(self.output_gmf)
            if isinstance(self.gmf_items, sparsecore.SparseEmbedding):
                scores += sparsecore.ops.spmm(*self.gmf_items.operands, weighted)
            else:
                scores += weighted @ self.gmf_items.weight.T
        if self.mlp:
            of_user = self.hidden_user(self.mlp_users(rows)).unsqueeze(1)
            step = max(1, _BLOCK // max(1, len(rows) * self._widest))
            of_items = self._all_items()
            for block, part in zip(scores.split(step, dim=1), of_items.split(step), strict=True):
                block += self._perceptron(of_user + part).squeeze(2)
        return add_bias(scores, self.output_bias)

    @torch.no_grad()
    def score_items(self, users: np.ndarray, inputs: csr_array, items: Tensor) -> Tensor:
        """Logits of these items alone, some users at a time."""
        rows = known_users(self, users, self.n_users)
        items = items.to(rows.device)
        step = max(1, _BLOCK // max(1, items.shape[1] * self._widest))
        return torch.cat(
            [self._scores(*part) for part in zip(rows.split(step), items.split(step), strict=True)]
        )

    def initialize_from(self, parts: Mapping[str, Recommender]) -> None:
        """Start with parts that were trained alone: {"gmf": NeuMF(parts="gmf"), "mlp": NeuMF(parts="mlp")}, or one.

        Each part's output weights and bias are halved in a model of both (the authors' alpha = .5), so that its
        score begins as the mean of the parts'. For weights that are stored differently see `copy_weight`.

        Raises:
            ConfigError: another part, or one of other widths or density.
        """
        check_parts(self, parts, {"gmf": NeuMF, "mlp": NeuMF})
        scale = 1 / (self.gmf + self.mlp)
        bias = torch.zeros(1)
        for name, part in parts.items():
            assert isinstance(part, NeuMF)
            if part.parts != name or self.parts not in ("both", name):
                raise ConfigError(
                    f"train.pretrained.{name}: expected a run with model.parts = {name!r} for a model that has this "
                    f"part, got one with {part.parts!r} for one with {self.parts!r}"
                )
            if part.layers != self.layers and name == "mlp":
                raise ConfigError(
                    f"train.pretrained.mlp: the run has model.layers = {part.layers}, this model {self.layers}"
                )
            for layer in part.matrices:
                copy_layer(
                    layer,
                    self.get_submodule(layer),
                    part.get_submodule(layer),
                    scale if "output" in layer else 1.0,
                )
            bias += scale * dense_weight(part.output_bias)
        if parts:
            copy_weight("output_bias", self.output_bias, bias)


def _forget(module: nn.Module, incompatible_keys: Any) -> None:
    """New weights are in: what was computed from the old ones is void."""
    module._catalogue = None  # type: ignore[assignment]
