"""Kernels of propagation against dense matrices: encodings, types, widths, threads, adversarial graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from processes import run_portable
from strategies import dtypes, masks, patterns, seeds, values_for
from torch import Tensor

import sparsecore
from sparsecore import Pattern
from sparsecore.backends import load
from sparsecore.backends import numba as kernels
from sparsecore.backends.numba import jit, simd
from sparsecore.encoding import encode

WIDTHS = (1, 7, 10, 16, 17, 31, 33, 50, 64, 65, 96, 128, 200)
Index = tuple[Tensor, Tensor | None]


def index_of(pattern: Pattern, encoding: str) -> Index:
    if encoding == "bitmap":
        return encode(pattern.crow, pattern.col, pattern.shape[1]), None
    return pattern.crow, pattern.col


def graph_of(mask: Tensor, dtype: torch.dtype, pointers: torch.dtype = torch.int32) -> tuple[Tensor, ...]:
    pattern = Pattern.from_mask(mask)
    return pattern.crow.to(pointers), pattern.col.to(torch.int32), values_for(pattern, dtype=dtype)


def check_all(
    graph: tuple[Tensor, ...], a: Tensor, pattern: Pattern, encoding: str, dtype: torch.dtype
) -> None:
    """Every kernel of the module against the dense formula."""
    nodes, d = pattern.shape
    generator = torch.Generator().manual_seed(1)
    x, base = torch.randn(2, nodes, d, dtype=dtype, generator=generator)
    values = values_for(pattern, dtype=dtype)
    e, index, places = pattern.to_dense(values), index_of(pattern, encoding), pattern.positions()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12

    def close(got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got, want, rtol=tolerance, atol=10 * tolerance)

    close(kernels.propagate(*graph, x), a @ x)
    close(kernels.propagate(*graph, x, base=base, scale=0.5), (a @ x + base) / 2)
    close(kernels.propagate(*graph, x, table=(values, *index), scale=0.25), (a @ x + e) / 4)
    close(kernels.propagate(*graph, x, base=base, table=(values, *index)), a @ x + base + e)
    close(kernels.propagate_table(*graph, values, *index, d), a @ e)
    close(kernels.propagate_table(*graph, values, *index, d, add=True, scale=0.5), (a @ e + e) / 2)
    got = kernels.propagate_sample(*graph, x, base, *index, pattern.nnz, 0.5)
    close(got, ((a @ x + base) / 2).view(-1)[places])
    close(kernels.propagate_sample(*graph, x, None, *index, pattern.nnz), (a @ x).view(-1)[places])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("encoding", ["csr", "bitmap"])
def test_every_width(dtype: torch.dtype, encoding: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(23, 23, generator=generator) < 0.2
    mask[4] = False  # no edges
    mask[:, 5] = False  # asked for by nobody
    mask[6] = True
    graph = graph_of(mask, dtype)
    a = Pattern.from_mask(mask).to_dense(graph[2])
    for d in WIDTHS:
        check_all(graph, a, Pattern.random((23, d), 0.4, generator=generator), encoding, dtype)


@given(masks(max_rows=9, widths=(9,)), patterns(max_rows=9), dtypes, st.sampled_from(["csr", "bitmap"]))
def test_any_graph_and_any_table(mask: Tensor, pattern: Pattern, dtype: torch.dtype, encoding: str) -> None:
    nodes = pattern.shape[0]
    square = torch.zeros(nodes, nodes, dtype=torch.bool)
    rows, cols = min(nodes, mask.shape[0]), min(nodes, mask.shape[1])
    square[:rows, :cols] = mask[:rows, :cols]
    graph = graph_of(square, dtype)
    check_all(graph, Pattern.from_mask(square).to_dense(graph[2]), pattern, encoding, dtype)


@pytest.mark.parametrize("n_threads", [2, 5])
@pytest.mark.parametrize("encoding", ["csr", "bitmap"])
@pytest.mark.parametrize("nodes", [1, 2, 23])
@pytest.mark.parametrize("edges", ["all in one row", "all to one node", "one", "all"])
def test_uneven_graphs_and_fewer_nodes_than_threads(
    edges: str, nodes: int, encoding: str, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "_SERIAL_WORK", 0)
    torch.set_num_threads(n_threads)  # put back by the fixture of conftest.py
    for node in {0, nodes // 2, nodes - 1}:
        mask = torch.zeros(nodes, nodes, dtype=torch.bool)
        if edges == "all in one row":
            mask[node] = True
        elif edges == "all to one node":
            mask[:, node] = True
        elif edges == "one":
            mask[node, node] = True
        else:
            mask[:] = True
        graph = graph_of(mask, torch.float32)
        a = Pattern.from_mask(mask).to_dense(graph[2])
        for d in (1, 70):
            # Of the table, too, one row may hold all, and may be another one.
            table = torch.zeros(nodes, d, dtype=torch.bool)
            table[nodes - 1 - node] = True
            for pattern in (
                Pattern.from_mask(table),
                Pattern.random(
                    (nodes, d), nnz=max(1, nodes * d // 3), generator=torch.Generator().manual_seed(d)
                ),
            ):
                check_all(graph, a, pattern, encoding, torch.float32)


@pytest.mark.parametrize("encoding", ["csr", "bitmap"])
def test_threads_and_pointer_types_give_the_same_bits(encoding: str) -> None:
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(301, 301, generator=generator) < 0.1
    mask[7] = True  # rows of very different lengths
    table = Pattern.random((301, 70), 0.3, generator=generator)
    values, index = values_for(table, dtype=torch.float32), index_of(table, encoding)
    x, base = torch.randn(2, 301, 70, generator=generator)
    found = []
    for n_threads, pointers in ((1, torch.int32), (2, torch.int32), (1, torch.int64)):
        torch.set_num_threads(n_threads)
        graph = graph_of(mask, torch.float32, pointers)
        found.append([
            kernels.propagate(*graph, x, base=base, table=(values, *index), scale=0.5),
            kernels.propagate_table(*graph, values, *index, 70, add=True),
            kernels.propagate_sample(*graph, x, base, *index, table.nnz, 0.5),
        ])  # fmt: skip
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("encoding", ["csr", "bitmap"])
def test_strided_and_misaligned_inputs(encoding: str) -> None:
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(12, 12, generator=generator) < 0.4
    graph = graph_of(mask, torch.float32)
    pattern = Pattern.random((12, 40), 0.5, generator=generator)
    values, index = values_for(pattern, dtype=torch.float32), index_of(pattern, encoding)
    aligned = torch.randn(12, 40, generator=generator)
    strided = aligned.t().contiguous().t()
    odd = torch.empty(12 * 40 + 1)[1:].view(12, 40).copy_(aligned)
    want = kernels.propagate(*graph, aligned)
    for x in (strided, odd):
        assert torch.equal(kernels.propagate(*graph, x), want)
        assert torch.equal(
            kernels.propagate(*graph, x, base=x), kernels.propagate(*graph, aligned, base=aligned)
        )
        for name, table in (("propagate", {"table": (values, *index)}), ("propagate_sample", {})):
            more = (None, *index, pattern.nnz) if name == "propagate_sample" else ()
            run = getattr(kernels, name)
            assert torch.equal(run(*graph, x, *more, **table), run(*graph, aligned, *more, **table))


def test_nothing_is_read_where_there_is_no_edge() -> None:
    """Rows that nobody asks for may hold anything, and so may a row without edges and its neighbours."""
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 1] = True
    x = torch.tensor([[torch.nan] * 20, [1.0] * 20, [torch.inf] * 20])
    out = kernels.propagate(*graph_of(mask, torch.float32), x)
    assert torch.isfinite(out).all()
    assert not out[1:].any()


@njit
def _spread(values, mask, out):
    simd.store(out, 0, simd.spread(simd.load(values, 0), mask))


@given(seeds, dtypes)
@settings(max_examples=20)
def test_spread_is_the_inverse_of_compress(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(16).astype(np.float32 if dtype == torch.float32 else np.float64)
    chosen = rng.random(16) < rng.random()
    out = np.empty_like(values)
    _spread(values, np.packbits(chosen, bitorder="little").view(np.uint16)[0], out)
    want = np.zeros_like(values)
    want[chosen] = values[: chosen.sum()]
    assert np.array_equal(out, want)


@njit
def _unpack(values, place, mask, out):
    simd.store(out, 0, simd.unpack(values, place, mask))


@pytest.mark.parametrize("bits", [0, 1, 0x80, 0xFF, 0x100, 0x8000, 0xFF00, 0x5A5A, 0xFFFF])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_at_the_end_of_an_array_are_unpacked(dtype: type, bits: int) -> None:
    chosen = np.unpackbits(np.array([bits], np.uint16).view(np.uint8), bitorder="little").astype(bool)
    values = np.arange(1, 4 + chosen.sum(), dtype=dtype)
    out, want = np.full(16, np.nan, dtype), np.zeros(16, dtype)
    _unpack(values, 3, np.uint16(bits), out)
    want[chosen] = values[3:]
    assert np.array_equal(out, want)


PORTABLE = """
import torch
import test_graph_kernels as t
from sparsecore import Pattern
mask = torch.rand(15, 15) < 0.3
graph = t.graph_of(mask, torch.float32)
a = Pattern.from_mask(mask).to_dense(graph[2])
for encoding in ("csr", "bitmap"):
    for d in (10, 64, 70):
        t.check_all(graph, a, Pattern.random((15, d), 0.4), encoding, torch.float32)
"""


def test_without_avx512() -> None:
    run_portable(PORTABLE)


def test_the_torch_backend_agrees() -> None:
    mask = torch.rand(9, 9) < 0.4
    mask[0, 0] = True
    graph = graph_of(mask, torch.float64)
    pattern = Pattern.random((9, 20), 0.3)
    values, index = values_for(pattern), index_of(pattern, "csr")
    x, base = torch.randn(2, 9, 20, dtype=torch.float64)
    with sparsecore.backend("torch"):
        reference = load(x.device)
    for name, arguments in (
        ("propagate", (*graph, x)),
        ("propagate_table", (*graph, values, *index, 20)),
        ("propagate_sample", (*graph, x, base, *index, pattern.nnz, 0.5)),
    ):
        torch.testing.assert_close(getattr(kernels, name)(*arguments), getattr(reference, name)(*arguments))
