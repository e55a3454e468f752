"""A recommender through torch.export: MultVAE from interactions to scores, any number of users, saved and loaded."""

from __future__ import annotations

import io

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from recsys.models.base import Interactions
from recsys.models.multvae import MultVAE
from sparsecore import SparseModule
from sparsecore.encoding import ENCODINGS


class Scores(nn.Module):
    """Scores of every item, for users by the items of the first one, of the second one, .. and how many each has.

    Not by pointers, of which there is one more than users: torch would then serve no user alone.
    """

    def __init__(self, model: MultVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, items: Tensor, counts: Tensor) -> Tensor:
        pointers = F.pad(counts.cumsum(0), (1, 0))
        mean, _ = self.model.encode(Interactions(items, pointers))
        return self.model.decode(mean)


def interactions(users: int) -> tuple[Tensor, Tensor]:
    history = np.random.default_rng(users).random((users, 40)) < 0.2
    history[2:3] = False
    batch = Interactions.from_scipy(scipy.sparse.csr_array(history.astype(np.float32)))
    return batch.items, batch.counts


@pytest.mark.feature("torch.export")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_multvae_serves_any_batch_from_a_file(encoding: str) -> None:
    model = MultVAE(40, 16, 6, density=0.3, generator=torch.Generator().manual_seed(0)).eval()
    for part in model.modules():
        if isinstance(part, SparseModule):
            part.set_encoding(encoding)
    scores = Scores(model).eval()
    shapes = ({0: Dim("interactions")}, {0: Dim("users")})
    program = torch.export.export(scores, interactions(5), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for users in (5, 1, 30):
        given = interactions(users)
        assert torch.equal(loaded(*given), scores(*given))
