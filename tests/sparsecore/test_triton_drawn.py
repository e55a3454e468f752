"""The triton backend on inputs that hypothesis draws; the rest is in `test_triton`, which needs no hypothesis."""

from __future__ import annotations

import importlib

import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dtypes, patterns, seeds
from test_triton import (
    FEW,
    Table,
    check,
    check_exploration,
    check_linear,
    check_lookups,
    check_pairs,
    check_topk,
    check_touched,
    every_device,
)
from torch import Tensor

import sparsecore
from sparsecore import Pattern, ops, sampling
from sparsecore.encoding import ENCODINGS

pytestmark = pytest.mark.feature("triton's kernels")

examples = settings(max_examples=3 if FEW else 40)
encodings = st.sampled_from(ENCODINGS)
pointer_types = st.sampled_from((torch.int32, torch.int64))
column_types = st.sampled_from((None, torch.int16, torch.int32, torch.int64))  # None: the narrowest


@every_device
@examples
@given(patterns(), st.integers(0, 20), encodings, dtypes, pointer_types, column_types, seeds)
def test_lookups_of_any_table(
    device: str, pattern: Pattern, n: int, encoding: str, dtype: torch.dtype, pointers: torch.dtype,
    columns: torch.dtype | None, seed: int,
) -> None:  # fmt: skip
    table = Table(pattern, device, encoding, dtype, seed, pointers, columns)
    check_lookups(table, n, seed)
    check_touched(table, n, seed)


@every_device
@examples
@given(
    patterns(), st.integers(1, 12), st.integers(0, 20), st.sampled_from((None, 1, 3)), encodings, encodings, dtypes,
    column_types, seeds,
)  # fmt: skip
def test_products_of_any_pairs(
    device: str, pattern: Pattern, rows: int, n: int, each: int | None, first: str, second: str,
    dtype: torch.dtype, columns: torch.dtype | None, seed: int,
) -> None:  # fmt: skip
    a = Table(pattern, device, first, dtype, seed, columns=columns)
    other = Pattern.random(
        (rows, a.cols), nnz=(rows * a.cols + 1) // 2, generator=torch.Generator().manual_seed(seed)
    )
    check_pairs(a, Table(other, device, second, dtype, seed + 1), n, each)
    check_pairs(a, a, n, each)


@every_device
@examples
@given(patterns(), st.integers(0, 70), encodings, dtypes, seeds)
def test_linear_products_of_any_weight(
    device: str, pattern: Pattern, n: int, encoding: str, dtype: torch.dtype, seed: int
) -> None:
    check_linear(Table(pattern, device, encoding, dtype, seed), n, seed % 1000)


@every_device
@examples
@given(patterns(), st.integers(1, 3), st.booleans(), encodings, dtypes, column_types, seeds)
def test_propagation_of_any_table(
    device: str, pattern: Pattern, hops: int, symmetric: bool, encoding: str, dtype: torch.dtype,
    columns: torch.dtype | None, seed: int,
) -> None:  # fmt: skip
    table = Table(pattern, device, encoding, dtype, seed, columns=columns)
    edges = scipy.sparse.random_array((table.rows, table.rows), density=0.3, rng=seed % 1000)
    graph = sparsecore.Graph.from_scipy(edges + edges.T if symmetric else edges, dtype).to(device)
    adjacency = torch.from_numpy((edges + edges.T if symmetric else edges).toarray()).to(table.values)

    def mean() -> Tensor:
        hop = total = table.dense()
        for _ in range(hops):
            hop = adjacency @ hop
            total = total + hop
        return total / (hops + 1)

    check(lambda: ops.propagate_mean(*graph.arrays(), *table.operand, table.cols, hops), mean, [table.values])


@every_device
@examples
@given(
    patterns(max_rows=40), st.integers(0, 40), st.integers(1, 60) | st.just(70), st.sampled_from((0.0, 0.3, 1.0)),
    encodings, dtypes, column_types, seeds,
)  # fmt: skip
def test_topk_of_any_table(
    device: str, pattern: Pattern, n: int, k: int, share: float, encoding: str, dtype: torch.dtype,
    columns: torch.dtype | None, seed: int,
) -> None:  # fmt: skip
    check_topk(Table(pattern, device, encoding, dtype, seed, columns=columns), n, k, share, seed % 1000)


@every_device
@examples
@given(
    st.integers(1, 3 * sampling.BLOCK) | st.integers(1, 200), st.floats(0, 1), st.data(), st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_a_draw_is_the_same_as_everywhere(
    device: str, total: int, share: float, data: st.DataObject, seed: int
) -> None:
    members = importlib.import_module("sparsecore.backends.triton.draw").members
    count = round(share * total)
    plan = sampling.plan_draw(total, count, torch.Generator().manual_seed(seed))
    everyone = torch.zeros(total, dtype=torch.bool)
    for ranks in sampling.sample_ranks(total, count, torch.Generator().manual_seed(seed)):
        everyone[ranks] = True
    first = data.draw(st.integers(0, total))
    last = data.draw(st.integers(first, total))
    assert torch.equal(members(plan, first, last, torch.device(device)).cpu(), everyone[first:last])


@every_device
@examples
@given(patterns(), st.floats(0, 1), encodings, dtypes, seeds)
def test_any_exploration_is_torchs(
    device: str, pattern: Pattern, share: float, encoding: str, dtype: torch.dtype, seed: int
) -> None:
    check_exploration(device, encoding, pattern, share, dtype, seed)
