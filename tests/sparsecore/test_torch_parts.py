"""The torch backend computes of the rows that are looked up a part at a time: the same, whatever the size of a part."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsecore import Pattern
from sparsecore.backends.torch import csr
from sparsecore.backends.torch import embedding as kernels


@pytest.mark.feature("operators: values, derivatives, torch.library.opcheck")
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=9),
    chosen=st.lists(st.integers(0, 8), max_size=12),
    part=st.integers(1, 30),
)
def test_parts_are_the_entries_in_turn(lengths: list[int], chosen: list[int], part: int) -> None:
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    crow = Pattern.from_mask(mask).crow
    ids = torch.tensor([i for i in chosen if i < len(lengths)], dtype=torch.int64)
    which, place = csr.entries(crow, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csr, "PART", part)
        found = list(csr.parts(crow, ids, 7))
    if found:
        assert torch.equal(torch.cat([start.start + own for start, own, _ in found]), which)
        assert torch.equal(torch.cat([places for _, _, places in found]), place)
    assert all(own.numel() < part + 7 for _, own, _ in found)
    assert [i for start, _, _ in found for i in range(start.start, start.stop)] == list(range(ids.numel()))


@pytest.mark.parametrize("part", [1, 5, 64])
def test_the_size_of_a_part_changes_no_result(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(part)
    mask = torch.rand(20, 12, generator=generator) < 0.3
    mask[::5] = False
    pattern = Pattern.from_mask(mask)
    crow, col, nnz = pattern.crow, pattern.col, pattern.nnz
    values = torch.randn(nnz, generator=generator, dtype=torch.float64)
    ids = torch.randint(20, (30,), generator=generator)
    grad = torch.randn(10, 12, generator=generator, dtype=torch.float64)
    offsets = torch.arange(0, 31, 3)
    bags = torch.arange(10).repeat_interleave(3)
    weights = torch.randn(30, generator=generator, dtype=torch.float64)

    def results() -> list[Tensor]:
        return [
            kernels.gather(values, crow, col, ids, 12),
            kernels.bag(values, crow, col, ids, offsets, weights, 12),
            kernels.bag_grad(crow, col, ids, bags, weights, grad, nnz),
            kernels.bag_dot(values, crow, col, ids, bags, grad),
            kernels.scatter_grad(crow, col, ids[:10], grad, nnz),
            kernels.gather_dot(values, crow, col, ids[:10], values, crow, col, ids.view(10, 3), 12),
            kernels.gather_dot(values, crow, col, ids, values, crow, col, ids.flip(0), 12),
        ]

    whole = results()
    dense = torch.zeros(20, 12, dtype=torch.float64).masked_scatter(mask, values)
    torch.testing.assert_close(whole[0], dense[ids])
    torch.testing.assert_close(whole[5], (dense[ids[:10]].unsqueeze(1) * dense[ids.view(10, 3)]).sum(-1))
    monkeypatch.setattr(csr, "PART", part)
    monkeypatch.setattr(kernels, "PART", part)
    for one, other in zip(results(), whole, strict=True):
        torch.testing.assert_close(one, other)
