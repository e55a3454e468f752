"""LightGCN: embeddings of users and items averaged over the hops of their interaction graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import sparsecore
from recsys.errors import RecsysError
from recsys.models.base import Recommender, Triples, known_users
from recsys.models.layers import Density, Layers
from recsys.models.losses import squared_norm
from recsys.models.triples import triple_batches
from sparsecore.nn import normalized_bipartite, propagate_mean

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from recsys.data import Dataset

__all__ = ["LightGCN"]

_CACHE = 1 << 21  # bytes of embeddings that need no order: about what a core has for itself


class LightGCN(Recommender):
    """He, Deng, Wang, Li, Zhang, Wang (2020), "LightGCN: simplifying and powering graph convolution network".

    E = mean of E0, A E0, ..., A^hops E0, with A = D^-1/2 [[0, R], [R^T, 0]] D^-1/2 and E0 one table of all
    users followed by all items; score(u, i) = E_u . E_i. Rows of the table and of A are in an order that makes hops
    faster (`tune`): ``place`` says which row is a user's, and an item's. Trained with BPR on sampled triples (u, p, n):

    loss = mean softplus(s(u, n) - s(u, p)) + regularization / 2 * (|E0_u|^2 + |E0_p|^2 + |E0_n|^2) / B

    Args:
        train: (n_users, n_items) interactions, the graph.
        dim: width of the embeddings.
        hops: how many times to propagate.
        regularization: see above; of the layer-0 embeddings in the batch.
        init: "normal", N(0, .1^2), as the authors' PyTorch code, or "xavier_uniform" with the bound of the
            dense table, sqrt(6 / (rows + dim)), as their TensorFlow code.
        popularity: a negative is drawn with probability proportional to its degree to this power.
        density: of ``table``, in (0, 1].
        generator: initial values and index set follow from it.
    """

    knows_users = True

    def __init__(
        self,
        train: csr_array,
        dim: int = 64,
        hops: int = 3,
        regularization: float = 1e-4,
        init: Literal["normal", "xavier_uniform"] = "normal",
        popularity: float = 0.0,
        *,
        density: float | Density = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.n_users, self.n_items = train.shape
        self.hops, self.regularization, self.init = hops, regularization, init
        self.popularity = popularity
        self.graph = normalized_bipartite(train)
        self.table = Layers(density, generator).embedding("table", self.n_users + self.n_items, dim)
        self.dim = dim
        self.place: Tensor | None
        self.register_buffer("place", None)  # row of each node, if that is another than its number
        self._placed: Tensor | None = None  # what the graph is in the order of
        self._propagated: Tensor | None = None
        self.register_load_state_dict_pre_hook(_take_place)
        self.register_load_state_dict_post_hook(_follow)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the table anew, see `init`."""
        values = sparsecore.weight_parameter(self.table)
        with torch.no_grad():
            if self.init == "normal":
                values.normal_(0, 0.1, generator=generator)
            else:
                bound = (6 / (self.n_users + self.n_items + self.dim)) ** 0.5
                values.uniform_(-bound, bound, generator=generator)

    def tune(self) -> None:
        """Give the nodes of a large graph rows in an order in which a hop takes less time: `Graph.locality_order`.

        The rows of a table that was just drawn are alike: which of them is whose does not matter.
        """
        if 4 * self.graph.n_nodes * self.dim > _CACHE:
            self.place = torch.argsort(self.graph.locality_order(self.n_users)).to(torch.int32)
            self._follow_place()

    def _follow_place(self) -> None:
        """Bring the graph into the order of the table."""
        nodes = torch.arange(self.graph.n_nodes)
        now = nodes if self._placed is None else self._placed
        place = nodes if self.place is None else self.place.cpu().to(torch.int64)
        order = torch.argsort(place)
        if not torch.equal(place[order], nodes):
            raise RecsysError(f"place: expected the row of each of {len(nodes)} nodes, got something else")
        if not torch.equal(place, now):
            self.graph = self.graph.reordered(now[order])
            self._placed = place

    def rows(self, nodes: Tensor) -> Tensor:
        """Rows of the table that belong to users (their numbers) and items (n_users and more)."""
        return nodes if self.place is None else self.place[nodes]

    def propagate(self) -> Tensor:
        """(n_users + n_items, dim) final embeddings: of all users, then of all items."""
        final = propagate_mean(self.graph, self.table, self.hops)
        return final if self.place is None else final[self.place]

    def batches(self, dataset: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[Triples]:
        """As many triples as there are interactions, see `triple_batches`."""
        return triple_batches(dataset.train, batch_size, generator, self.popularity)

    def steps_per_epoch(self, dataset: Dataset, batch_size: int) -> int:
        return -(-dataset.train.nnz // batch_size)

    def loss(self, batch: Triples, step: int) -> Tensor:
        nodes = torch.cat([batch.users, self.n_users + batch.positives, self.n_users + batch.negatives])
        rows = self.rows(nodes)
        user, positive, negative = propagate_mean(self.graph, self.table, self.hops, rows).chunk(3)
        ranking = F.softplus((user * (negative - positive)).sum(dim=1)).mean()
        penalty = squared_norm(self.table(rows)) / (2 * batch.size)
        return ranking + self.regularization * penalty

    def train(self, mode: bool = True) -> LightGCN:
        self._propagated = None
        return super().train(mode)

    @torch.no_grad()
    def score(self, users: np.ndarray, inputs: csr_array) -> Tensor:
        """Dot products of final embeddings; `inputs` is not read. In eval mode, propagated once and kept.

        Raises:
            DataError: for a user who is not in the graph (-1): LightGCN has no embedding for somebody new.
        """
        rows = known_users(self, users, self.n_users)
        embeddings = self._propagated if self._propagated is not None else self.propagate()
        if not self.training:
            self._propagated = embeddings
        return embeddings[rows] @ embeddings[self.n_users :].T


def _take_place(module: LightGCN, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Weights that are loaded say in which order they are, or are in that of the nodes."""
    place = state.get(prefix + "place")
    module.place = None if place is None else torch.empty_like(place, device=module.device)


def _follow(module: LightGCN, incompatible_keys: Any) -> None:
    """New weights are in: the graph follows their order, and what was propagated from the old ones is void."""
    module._follow_place()
    module._propagated = None
