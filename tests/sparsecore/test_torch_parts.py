"""The torch backend computes of the rows that are looked up a part at a time: the same, whatever the size of a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import AsOnAGpu
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsecore import Pattern
from sparsecore.backends.torch import csr, graph, linear
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


def multiplied(
    values: Tensor, crow: Tensor, col: Tensor, n_cols: int, dense: Tensor, *, transposed: bool = False
) -> Tensor:
    """In the place of torch.sparse, whose matrices have no form without content: the shape of its product."""
    assert dense.shape[0] == (crow.numel() - 1 if transposed else n_cols)
    return dense.new_empty((n_cols if transposed else crow.numel() - 1, dense.shape[1]))


def test_products_and_propagation_wait_for_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csr, "csr", lambda values, crow, col, n_cols: (values, crow, col, n_cols))
    with torch.device("meta"):
        crow, col = torch.empty(21, dtype=torch.int32), torch.empty(70, dtype=torch.uint8)
        values, x, dy = torch.empty(70), torch.empty(30, 12), torch.empty(30, 20)
        turned, ends, row, rows = csr._turned(values, crow, col, 12)
        assert (turned.shape, ends.shape, row.shape, rows) == ((70,), (13,), (70,), 20)
        assert ends.dtype == row.dtype == torch.int32
        assert linear.spmm(values, crow, col, x, product=multiplied).shape == (30, 20)
        assert linear.spmm_t(values, crow, col, dy, 12, product=multiplied).shape == (30, 12)
        edges, ids = (crow, torch.empty(70, dtype=torch.int32), values), torch.empty(9, dtype=torch.int64)
        hop, table = torch.empty(20, 12), (values, crow, col)
        assert graph.propagate(*edges, hop, base=hop, scale=0.5, product=multiplied).shape == (20, 12)
        assert graph.propagate_rows(*edges, hop, ids, product=multiplied).shape == (9, 12)
        some = torch.empty(9, 12)
        assert graph.propagate_from(*edges, some, ids, 20, product=multiplied).shape == (20, 12)
        assert graph.propagate(*edges, hop, table=table, product=multiplied).shape == (20, 12)
        assert graph.propagate_table(*edges, *table, 12, add=True, product=multiplied).shape == (20, 12)
        assert graph.propagate_sample(*edges, hop, hop, crow, col, 70, product=multiplied).shape == (70,)


def test_propagation_on_a_gpu_multiplies_all_rows_and_adds_in_a_fixed_order() -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = Pattern.random((20, 20), 0.2, generator=generator)
    weight = torch.randn(pattern.nnz, generator=generator, dtype=torch.float64)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    ids = torch.randint(20, (9,), generator=generator)
    ids[1] = ids[0]
    edges, dense = (pattern.crow, pattern.col, weight), pattern.to_dense(weight)
    spread = torch.zeros_like(x).index_add_(0, ids, x[:9])
    for found in (graph.propagate_rows(*edges, x, ids), _as_on_a_gpu(graph.propagate_rows, *edges, x, ids)):
        torch.testing.assert_close(found, (dense @ x)[ids])
    for found in (
        graph.propagate_from(*edges, x[:9], ids, 20),
        _as_on_a_gpu(graph.propagate_from, *edges, x[:9], ids, 20),
    ):
        torch.testing.assert_close(found, dense @ spread)


def _as_on_a_gpu(run: Callable[..., Tensor], *args: Any) -> Tensor:
    with AsOnAGpu():
        return run(*args)
