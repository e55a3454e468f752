"""A model's best items are those of its scores, whether or not all of them exist for that."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from recsys.models.bprmf import BPRMF
from recsys.models.multvae import MultVAE

USERS = np.array([3, 0, 3, 5])


def left_out() -> csr_array:
    dense = np.zeros((4, 30), dtype=np.float32)
    dense[0, :29] = 1  # one item is left
    dense[1, [2, 7]] = 1
    return csr_array(dense)


@pytest.mark.parametrize("k", [1, 5, 30, 99])
@pytest.mark.parametrize("kind", ["sparse tables", "dense tables", "multvae"])
@pytest.mark.parametrize("exclude", [None, left_out()])
@pytest.mark.parametrize(("together", "fused"), [(1, 9), (65, 1), (1 << 24, 9)])
def test_best_are_those_of_the_scores(
    k: int, kind: str, exclude: csr_array | None, together: int, fused: int
) -> None:
    g = torch.Generator().manual_seed(0)
    if kind == "multvae":
        model = MultVAE(30, 8, 4, density=0.5, generator=g).eval()
    else:
        model = BPRMF((6, 30), dim=8, density=0.5 if kind == "sparse tables" else 1.0, generator=g).eval()
    inputs = csr_array(np.eye(4, 30, dtype=np.float32))
    scores = model.score(USERS, inputs)
    if exclude is not None:
        scores[torch.from_numpy(exclude.toarray() > 0)] = -torch.inf
    expected = scores.topk(min(k, 30)).values
    with patch("recsys.models.base._MOST_SCORES", together), patch("recsys.models.factors._FUSED", fused):
        found, items = model.best(USERS, inputs, k, exclude)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    there = found > -torch.inf
    torch.testing.assert_close(
        scores.gather(1, items.clamp(min=0))[there], found[there], rtol=1e-5, atol=1e-6
    )
    assert all(
        len(set(row[mask].tolist())) == int(mask.sum()) for row, mask in zip(items, there, strict=True)
    )


def test_best_of_sparse_tables_has_no_scores_of_all_items() -> None:
    model = BPRMF((6, 30), dim=8, density=0.5).eval()
    with patch.object(model, "score", side_effect=AssertionError("all scores")):
        model.best(np.repeat(USERS, 4), csr_array((16, 30)), 3)
