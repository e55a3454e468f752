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
        found = list(csr.parts(crow, ids, 7, int(crow[-1])))
        patch.setattr(csr, "_counts", lambda ids: False)
        patch.setattr(csr, "_PADDED", part)
        padded = list(csr.parts(crow, ids, 7, int(crow[-1])))
    if found:
        assert torch.equal(torch.cat([p.ids.start + p.which for p in found]), which)
        assert torch.equal(torch.cat([p.place for p in found]), place)
    assert all(p.which.numel() < part + 7 for p in found)
    assert [i for p in found for i in range(p.ids.start, p.ids.stop)] == list(range(ids.numel()))
    if padded:
        stored = ~torch.cat([p.padding for p in padded if p.padding is not None])
        assert torch.equal(torch.cat([p.ids.start + p.which for p in padded])[stored], which)
        places = torch.cat([p.place for p in padded])
        assert torch.equal(places[stored], place)
        assert places.max() < crow[-1]
    else:
        assert not place.numel()
    assert all(p.which.numel() <= max(part, 7) for p in padded)


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "padded, as on a GPU"])
@pytest.mark.parametrize("part", [1, 5, 64])
def test_the_size_of_a_part_changes_no_result(
    part: int, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(csr, "_PADDED", part)
    monkeypatch.setattr(csr, "_counts", lambda ids: counted)
    monkeypatch.setattr(kernels, "PART", part)
    for one, other in zip(results(), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_padding_does_not_carry_over_what_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csr, "_counts", lambda ids: False)
    pattern = Pattern.from_mask(torch.tensor([[True, False], [True, True], [False, False]]))
    values = torch.tensor([1.0, torch.nan, torch.inf])
    ids = torch.tensor([0, 2])
    found = kernels.gather(values, pattern.crow, pattern.col, ids, 2)
    assert found.tolist() == [[1, 0], [0, 0]]
    grad = torch.tensor([[2.0, torch.nan], [torch.inf, torch.nan]])
    assert kernels.scatter_grad(pattern.crow, pattern.col, ids, grad, 3).tolist() == [2, 0, 0]


def test_nothing_waits_for_a_gpu_to_know_a_shape() -> None:
    """Tensors without content: what asks for a number in them, or for a shape that one decides, fails."""
    with torch.device("meta"):
        crow, col = torch.empty(21, dtype=torch.int32), torch.empty(70, dtype=torch.uint8)
        values, grad, weights = torch.empty(70), torch.empty(10, 12), torch.empty(30)
        ids, bags = torch.empty(2, 30, dtype=torch.int64).unbind()
        offsets = torch.empty(11, dtype=torch.int64)
        table = values, crow, col
        assert kernels.gather(*table, ids, 12).shape == (30, 12)
        assert kernels.bag(*table, ids, offsets, weights, 12).shape == (10, 12)
        assert kernels.bag_grad(crow, col, ids, bags, weights, grad, 70).shape == (70,)
        assert kernels.bag_dot(*table, ids, bags, grad).shape == (30,)
        assert kernels.scatter_grad(crow, col, ids[:10], grad, 70).shape == (70,)
        assert kernels.gather_dot(*table, ids[:10], *table, ids.view(10, 3), 12).shape == (10, 3)
        with pytest.raises((NotImplementedError, RuntimeError)):
            csr.entries(crow, ids)
