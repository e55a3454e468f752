"""The numba backend's linear products: every algorithm, encoding and thread count against dense torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_portable
from strategies import DTYPES, NARROW_WIDTHS, patterns, values_for

from sparsecore import Pattern
from sparsecore.backends.numba import (
    blockwise,
    few,
    few_spmm,
    jit,
    linear,
    packing,
    panel_spmm,
    turned_spmm_t,
    turning,
)
from sparsecore.encoding import ENCODINGS, encode, has_expand

TURN = (
    (1, 1),
    (1 << 30, 1 << 30),
)  # always, never: from which batch on the gradient in the input turns the weight
BATCHES = (0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 130, 512)


@pytest.fixture(autouse=True)
def vectors_alone(vectors):
    """Small products have kernels of their own: test_small_kernels.py."""


@pytest.fixture(params=(1, 2), ids=("one thread", "two threads"))
def n_threads(request, monkeypatch):
    torch.set_num_threads(request.param)  # put back by the fixture of conftest.py
    if request.param > 1:
        monkeypatch.setattr(jit, "_SERIAL_WORK", 0)
    return request.param


def random_pattern(shape, density, seed):
    return Pattern.random(shape, density, generator=torch.Generator().manual_seed(seed))


def index_of(pattern, encoding):
    if encoding == "csr":
        return pattern.crow, pattern.col
    return encode(pattern.crow, pattern.col, pattern.shape[1]), None


def dense_of(pattern, values):
    weight = torch.zeros(pattern.shape, dtype=values.dtype)
    weight[where(pattern)] = values
    return weight


def where(pattern):
    return torch.repeat_interleave(pattern.crow.long().diff()), pattern.col.long()


def check(pattern, encoding, batch, dtype, change=lambda t: t):
    """All three products of one weight and batch; `change` alters the memory, not the numbers, of the activations."""
    rows, cols = pattern.shape
    generator = torch.Generator().manual_seed(batch)
    values = values_for(pattern, dtype=dtype)
    weight = dense_of(pattern, values)
    x = torch.randn((batch, cols), generator=generator, dtype=dtype)
    dy = torch.randn((batch, rows), generator=generator, dtype=dtype)
    crow, col = index_of(pattern, encoding)
    results = (
        linear.spmm(values, crow, col, change(x)),
        linear.spmm_t(values, crow, col, change(dy), cols),
        linear.sddmm(crow, col, change(dy), change(x), pattern.nnz),
    )
    expected = (x @ weight.t(), dy @ weight, (dy.t() @ x)[where(pattern)])
    terms = (cols, rows, max(batch, 1))
    for result, right, n in zip(results, expected, terms, strict=True):
        tolerance = n**0.5 * (4e-6 if dtype is torch.float32 else 1e-14)
        torch.testing.assert_close(result, right, rtol=1e-5, atol=tolerance)
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("turn", TURN)
def test_batches(batch, encoding, dtype, turn, monkeypatch, n_threads):
    monkeypatch.setattr(linear, "_TURN", turn)
    check(random_pattern((150, 137), 0.3, seed=1), encoding, batch, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("batch", [1000, 4096])
@pytest.mark.parametrize("turn", TURN)
def test_batches_of_many_panels(batch, encoding, dtype, turn, monkeypatch, n_threads):
    monkeypatch.setattr(linear, "_TURN", turn)
    monkeypatch.setattr(linear, "_algorithm", lambda operation, panels, *rest: panels)
    check(random_pattern((40, 37), 0.3, seed=1), encoding, batch, dtype)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("turn", TURN)
def test_wide_weights(encoding, turn, monkeypatch, n_threads):
    """Values and sums of rows to come are asked for in their blocks."""
    monkeypatch.setattr(linear, "_TURN", turn)
    for batch in (33, 130):
        check(random_pattern((150, panel_spmm.WIDE + 10), 0.1, seed=3), encoding, batch, torch.float32)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("turn", TURN)
def test_activations_in_parts(encoding, turn, monkeypatch, n_threads):
    """Panels of all examples would take more than `packing.parts` lets stand at a time: 128 + 128 + 5 examples."""
    assert len(packing.parts(261, 30_001)) == 3
    monkeypatch.setattr(linear, "_TURN", turn)
    check(random_pattern((40, 30_001), 0.1, seed=6), encoding, 261, torch.float32)
    check(random_pattern((30_001, 40), 0.1, seed=6), encoding, 261, torch.float32)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_each_thread_or_of_all(encoding, dtype, monkeypatch, n_threads):
    """Threads pack them for themselves, or share what is large: the same numbers."""
    pattern = random_pattern((150, 137), 0.3, seed=1)
    values, index = values_for(pattern, dtype=dtype), index_of(pattern, encoding)
    usual = packing._OWN
    for batch in (2, 3, 7, 12, 16, 40, 200):
        x, dy = torch.randn(batch, 137, dtype=dtype), torch.randn(batch, 150, dtype=dtype)
        found = []
        for most in (usual, 0):
            monkeypatch.setattr(packing, "_OWN", most)
            products = (
                linear.spmm(values, *index, x),
                linear.spmm_t(values, *index, dy, 137),
                linear.sddmm(*index, dy, x, pattern.nnz),
            )
            found.append([product.clone() for product in products])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("turn", TURN)
def test_heights(rows, encoding, turn, monkeypatch, n_threads):
    monkeypatch.setattr(linear, "_TURN", turn)
    for batch in (1, 4, 20, 70):
        check(random_pattern((rows, 33), 0.4, seed=2), encoding, batch, torch.float32)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "cols", [*NARROW_WIDTHS, 31, 32, 33, 96, 97, 127, 128, 129, 511, 513, 1025, 65535, 65537]
)
@pytest.mark.parametrize("turn", TURN)
def test_widths(cols, encoding, turn, monkeypatch, n_threads):
    monkeypatch.setattr(linear, "_TURN", turn)
    for batch in (1, 3, 16, 33, 129) if cols < 60000 else (1, 3, 17):
        check(
            random_pattern((5, cols), 0.5 if cols < 60000 else 0.01, seed=3), encoding, batch, torch.float32
        )


@settings(max_examples=60)
@given(
    patterns(max_rows=40),
    st.sampled_from(ENCODINGS),
    st.sampled_from((1, 2, 5, 16, 40, 100, 200)),
    st.sampled_from(DTYPES),
    st.sampled_from((1, 2)),
    st.sampled_from(TURN),
)
def test_patterns(pattern, encoding, batch, dtype, count, turn):
    before = jit._SERIAL_WORK, linear._TURN
    torch.set_num_threads(count)
    jit._SERIAL_WORK, linear._TURN = 0, turn
    try:
        check(pattern, encoding, batch, dtype)
    finally:
        jit._SERIAL_WORK, linear._TURN = before
        torch.set_num_threads(1)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("batch", [1, 2, 4, 7, 16])
def test_a_few_examples_read_no_scratch_that_was_not_written(batch, encoding, monkeypatch, n_threads):
    workspace = few_spmm.workspace

    def poisoned(name, n_chunks, size, dtype):
        scratch = workspace(name, n_chunks, size, dtype)
        scratch[:] = np.nan if dtype.is_floating_point else -1  # the largest column that there could be
        return scratch

    monkeypatch.setattr(few_spmm, "workspace", poisoned)
    monkeypatch.setattr(packing, "workspace", poisoned)
    for shape, density in (((53, 77), 0.5), ((20, 33), 0.02), ((1, 64), 0.5), ((3, 70_000), 0.01)):
        check(random_pattern(shape, density, seed=8), encoding, batch, torch.float32)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("batch", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_a_few_examples_do_not_multiply_what_is_not_stored(density, batch, encoding, n_threads):
    pattern = random_pattern((40, 90), density, seed=8)
    values = values_for(pattern, dtype=torch.float32)
    x = torch.randn((batch, 90), generator=torch.Generator().manual_seed(0))
    right = linear.spmm(values, *index_of(pattern, encoding), x)
    x[:, 17] = float("nan")
    reached = torch.zeros(40, dtype=torch.bool)
    reached[where(pattern)[0][where(pattern)[1] == 17]] = True
    result = linear.spmm(values, *index_of(pattern, encoding), x)
    assert 0 < reached.sum() < 40
    assert result[:, reached].isnan().all()
    assert torch.equal(result[:, ~reached], right[:, ~reached])


PORTABLE = """
import torch
import test_linear_kernels as t
from sparsecore.backends.numba import lanes_csr
for lanes_csr._MOST_EXAMPLES in (96, -1):
    for batch in (1, 3, 7, 16, 33, 130):
        t.check(t.random_pattern((150, 137), 0.3, seed=1), "csr", batch, torch.float32)
"""


def test_without_avx512() -> None:
    run_portable(PORTABLE)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_all_nonzeros_in_one_percent_of_the_rows(encoding, n_threads):
    mask = torch.zeros((1000, 130), dtype=torch.bool)
    mask[::100] = torch.rand((10, 130), generator=torch.Generator().manual_seed(0)) < 0.9
    for batch in (1, 2, 24, 100):
        check(Pattern.from_mask(mask), encoding, batch, torch.float32)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("batch", [1, 4, 16, 50, 200])
def test_memory_layouts(encoding, batch, n_threads):
    pattern = random_pattern((70, 83), 0.4, seed=4)
    plain = check(pattern, encoding, batch, torch.float32)

    def transposed(t):
        return t.t().contiguous().t()

    def every_second_column(t):
        wide = torch.full((t.shape[0], 2 * t.shape[1]), float("nan"), dtype=t.dtype)
        wide[:, ::2] = t
        return wide[:, ::2]

    def misaligned(t):
        memory = torch.empty(t.numel() + 1, dtype=t.dtype)
        memory[1:] = t.flatten()
        return memory[1:].view(t.shape)

    for change in (transposed, every_second_column, misaligned):
        for a, b in zip(plain, check(pattern, encoding, batch, torch.float32, change), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_blockwise(density, dtype, encoding, monkeypatch, n_threads):
    monkeypatch.setattr(linear, "_algorithm", lambda *args: blockwise)
    for shape in ((53, 77), (16, 16), (1, 60), (60, 1), (129, 270), (330, 128)):
        check(random_pattern(shape, density, seed=5), encoding, 9, dtype)
    with monkeypatch.context() as few:
        few.setattr(blockwise, "_PACKED", 1 << 12)  # terms packed at a time: products of the next are added
        check(random_pattern((600, 309), density, seed=8), encoding, 15, dtype)
        check(random_pattern((300, 600), density, seed=8), encoding, 523, dtype)  # in two parts
    for batch in (1, 6, 130, 516, 517, 1033):  # a slab's terms, and a part's examples, and a few more
        check(random_pattern((20, 33), density, seed=6), encoding, batch, dtype)
    check(random_pattern((200, 70), density, seed=7), encoding, 600, dtype)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_blockwise_reads_no_scratch_that_it_has_not_written(encoding, monkeypatch, n_threads):
    workspace = blockwise.workspace

    def poisoned(name, n_chunks, size, dtype):
        scratch = workspace(name, n_chunks, size, dtype)
        scratch[:] = np.nan if dtype.is_floating_point else -1
        return scratch

    monkeypatch.setattr(blockwise, "workspace", poisoned)
    monkeypatch.setattr(linear, "_algorithm", lambda *args: blockwise)
    for shape, batch in (((53, 77), 9), ((1, 1), 1), ((130, 33), 517), ((7, 129), 131)):
        check(random_pattern(shape, 0.6, seed=9), encoding, batch, torch.float32)
    monkeypatch.setattr(blockwise, "_PACKED", 1 << 12)
    check(random_pattern((300, 309), 0.6, seed=9), encoding, 15, torch.float32)


def test_blockwise_sums_in_parts(monkeypatch):
    """One number after the other, ten thousand times 0.1 in float32 is off by 1e-4."""
    monkeypatch.setattr(linear, "_algorithm", lambda *args: blockwise)
    pattern = Pattern.random((16, 16), 1.0)
    x, dy = torch.full((20_000, 16), 0.1), torch.ones(20_000, 16)
    found = linear.sddmm(pattern.crow, pattern.col, dy, x, pattern.nnz)
    torch.testing.assert_close(found, torch.full_like(found, 2000.0), rtol=2e-6, atol=0)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_blockwise_does_not_depend_on_the_number_of_threads(encoding, monkeypatch):
    monkeypatch.setattr(linear, "_algorithm", lambda *args: blockwise)
    monkeypatch.setattr(blockwise, "_PACKED", 1 << 14)
    monkeypatch.setattr(jit, "_SERIAL_WORK", 0)
    check_threads((300, 170), 140, encoding)
    check_threads((40, 24), 13, encoding)  # two or three slabs of a few tiles: most threads share one


def check_threads(shape, batch, encoding):
    pattern = random_pattern(shape, 0.6, seed=7)
    values, index = values_for(pattern, dtype=torch.float32), index_of(pattern, encoding)
    x, dy = torch.randn(batch, shape[1]), torch.randn(batch, shape[0])

    def results(n):
        torch.set_num_threads(n)  # put back by the fixture of conftest.py
        products = (
            linear.spmm(values, *index, x),
            linear.spmm_t(values, *index, dy, shape[1]),
            linear.sddmm(*index, dy, x, pattern.nnz),
        )
        return [product.clone() for product in products]

    check(pattern, encoding, batch, torch.float32)
    one = results(1)
    for n in (2, 3, 7, 25):  # more than there are slabs
        assert all(torch.equal(a, b) for a, b in zip(one, results(n), strict=True))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("shape", "density", "batch"),
    [((24, 600), 0.95, 256), ((300, 400), 0.95, 140), ((300, 50_000), 0.01, 8), ((300, 90_000), 0.01, 12)],
)
def test_the_way_a_product_goes_does_not_depend_on_the_number_of_threads(encoding, shape, density, batch):
    """Neither does its rounding then (but that of ``spmm_t``)."""
    pattern = random_pattern(shape, density, seed=7)
    values, index = values_for(pattern, dtype=torch.float32), index_of(pattern, encoding)
    x, dy = torch.randn(batch, shape[1]), torch.randn(batch, shape[0])

    def results(n):
        torch.set_num_threads(n)  # put back by the fixture of conftest.py
        return linear.spmm(values, *index, x).clone(), linear.sddmm(*index, dy, x, pattern.nnz).clone()

    one = results(1)
    for n in (2, 9, 25):
        assert all(torch.equal(a, b) for a, b in zip(one, results(n), strict=True))


def test_blockwise_spreads_out_the_same_few_blocks_whatever_the_weight(monkeypatch):
    sizes = {}
    workspace = blockwise.workspace

    def recorded(name, n_chunks, size, dtype):
        sizes.setdefault(name, []).append(size)
        return workspace(name, n_chunks, size, dtype)

    monkeypatch.setattr(blockwise, "workspace", recorded)
    monkeypatch.setattr(linear, "_algorithm", lambda *args: blockwise)
    for shape in ((40, 50), (1500, 1400)):
        check(random_pattern(shape, 0.3, seed=8), "csr", 20, torch.float32)
    for name in ("block", "slabs", "results"):
        small, large = sizes[name][: len(sizes[name]) // 2], sizes[name][len(sizes[name]) // 2 :]
        assert small == large
    check(random_pattern((20, 20), 0.3, seed=8), "csr", 5000, torch.float32)
    assert max(sizes["turned dY"] + sizes["results"]) <= 192 * 516  # and of the batch
    assert max(sizes["packed"]) <= 1 << 20
    assert max(sizes["block"] + sizes["slabs"]) <= 256 * 128


@pytest.mark.parametrize("processor", ["Zen 5", "AVX-512", "portable"])
def test_which_algorithm(processor, monkeypatch):
    monkeypatch.setattr(linear, "_processor", lambda: processor)
    col = torch.zeros(1)

    def chosen(operation, batch, density, col):
        in_blocks = linear._in_blocks(operation, batch, int(10_000 * density), (100, 100))
        return linear._algorithm(operation, panel_spmm, batch, in_blocks, col)

    for operation in ("spmm", "spmm_t", "sddmm"):
        assert chosen(operation, 1, 0.5, col) is chosen(operation, 1, 0.5, None) is few
        assert (chosen(operation, 16, 0.5, col) is few) is (operation != "sddmm")
        assert chosen(operation, 17, 0.5, col) is panel_spmm
        few_will_do = (processor, operation) in {
            ("AVX-512", "spmm"),
            ("portable", "sddmm"),
        } or operation == "spmm_t"
        assert (chosen(operation, 64, 1.0, None) is blockwise) is few_will_do
        assert chosen(operation, 512, 0.3, None) is panel_spmm
        never = processor == "Zen 5" and operation == "sddmm"
        assert (chosen(operation, 512, 1.0, None) is blockwise) is not never
    assert linear._in_blocks("spmm_t", 512, 90_000, (10, 10_000))
    assert linear._in_blocks("spmm", 512, 95_000, (10, 10_000))  # threads share sixteen rows by examples


@pytest.mark.parametrize("density", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("cols", [1, 15, 16, 17, 31, 33, 48, 65, 130])
def test_turned_in_blocks(cols, density, monkeypatch, n_threads):
    """Chunks of 32 rows: whole ones in blocks of 16 x 16, rows that are left and those at the end one by one."""
    if not has_expand():
        pytest.skip("blocks are turned with AVX-512 alone")
    listed = []
    workspace = turning.workspace

    def poisoned(name, n_chunks, size, dtype):
        scratch = workspace(name, n_chunks, size, dtype)
        scratch[:] = np.nan if dtype.is_floating_point else -1
        if name == "listed":
            listed.append(scratch)
        return scratch

    monkeypatch.setattr(turning, "workspace", poisoned)
    monkeypatch.setattr(turned_spmm_t, "block_of", lambda *args: 32)
    monkeypatch.setattr(linear, "_TURN", TURN[0])
    monkeypatch.setattr(linear, "_in_blocks", lambda *args: False)
    for rows in (64, 150, 200):
        check(random_pattern((rows, cols), density, seed=rows), "bitmap", 20, torch.float32)
    assert not np.isnan(listed[-1]).all()


def test_which_weights_are_turned(monkeypatch):
    monkeypatch.setattr(linear, "_TURN", (33, 128))
    monkeypatch.setattr(linear, "has_expand", lambda: True)

    def turns(batch, density, col=None, dtype=torch.float32, cols=100):
        return linear._turns(batch, int(100 * cols * density), (100, cols), col, dtype)

    assert turns(33, 0.5)
    assert not turns(32, 0.5)
    assert not turns(100, 0.1)  # blocks would be nearly empty
    assert not turns(100, 0.5, col=torch.zeros(1))
    assert not turns(100, 0.5, dtype=torch.float64)
    assert turns(128, 0.1)
    assert not turns(512, 0.5, cols=70_000)
    monkeypatch.setattr(linear, "has_expand", lambda: False)
    assert not turns(100, 0.5)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_rows_longer_than_the_scratch_of_a_chunk(encoding, batch, monkeypatch, n_threads):
    monkeypatch.setattr(panel_spmm, "_LOCAL", 300)
    check(random_pattern((40, 90), 0.3, seed=6), encoding, batch, torch.float32)
    check(random_pattern((4, 700), 0.3, seed=6), encoding, batch, torch.float32)
    monkeypatch.setattr(turned_spmm_t, "_POSITIONS", 300)
    monkeypatch.setattr(linear, "_TURN", TURN[0])
    check(random_pattern((40, 90), 0.3, seed=6), encoding, batch, torch.float32)
    check(random_pattern((4, 700), 0.3, seed=6), encoding, batch, torch.float32)


@pytest.mark.parametrize("batch", [1, 3, 16, 70, 200])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_infinite_activations_reach_stored_places_only(encoding, batch):
    pattern = random_pattern((20, 90), 0.3, seed=7)
    values = values_for(pattern, dtype=torch.float32)
    stored = dense_of(pattern, torch.ones(pattern.nnz)).bool()
    crow, col = index_of(pattern, encoding)
    x, dy = torch.randn(batch, 90), torch.randn(batch, 20)
    x[:, 5], dy[:, 7] = float("inf"), float("inf")
    assert torch.equal(linear.spmm(values, crow, col, x).isinf(), stored[:, 5].expand(batch, 20))
    assert torch.equal(linear.spmm_t(values, crow, col, dy, 90).isinf(), stored[7].expand(batch, 90))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("batch", [1, 16, 100, 600])
def test_repeatable(encoding, batch, n_threads):
    """Same bits at every call; of the forward product and the weight's gradient at every thread count."""
    pattern = random_pattern((300, 200), 0.3, seed=8)
    first = check(pattern, encoding, batch, torch.float32)
    for a, b in zip(first, check(pattern, encoding, batch, torch.float32), strict=True):
        assert torch.equal(a, b)
    torch.set_num_threads(1)
    alone = check(pattern, encoding, batch, torch.float32)
    assert torch.equal(first[0], alone[0])
    assert torch.equal(first[2], alone[2])


def test_no_nonzeros_at_all():
    empty = torch.zeros(4, dtype=torch.int32), torch.zeros(0, dtype=torch.uint8)
    for crow, col in (empty, (encode(*empty, 7), None)):
        values = torch.zeros(0)
        assert torch.equal(linear.spmm(values, crow, col, torch.ones(5, 7)), torch.zeros(5, 3))
        assert torch.equal(linear.spmm_t(values, crow, col, torch.ones(5, 3), 7), torch.zeros(5, 7))
        assert linear.sddmm(crow, col, torch.ones(5, 3), torch.ones(5, 7), 0).shape == (0,)
