"""The triton backend against dense torch: in Triton's interpreter on the CPU and, marked ``gpu``, on CUDA.

Without hypothesis, for a bare machine (`harness.gpu_check`); what it draws is in `test_triton_drawn`.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse
import torch
from devices import HAS_TRITON, INTERPRETED, devices, values_for
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparsecore
from sparsecore import Pattern, SparsecoreError, backends, ops, optional
from sparsecore.encoding import ENCODINGS, encode

pytestmark = pytest.mark.feature("triton's kernels")

every_device = pytest.mark.parametrize("device", devices("triton"))
every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
# The interpreter computes with numpy, which warns of what a GPU computes silently.
of_infinities = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
FEW = torch.cuda.is_available()  # a GPU compiles anew for most cases

Index = tuple[Tensor, Tensor | None]


class Table:
    """A sparse table on a device, with the dense one beside it."""

    def __init__(
        self,
        pattern: Pattern,
        device: str,
        encoding: str = "csr",
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        pointers: torch.dtype = torch.int32,
        columns: torch.dtype | None = None,
    ) -> None:
        self.rows, self.cols = pattern.shape
        self.nnz = pattern.nnz
        self.pattern = pattern.to(device)
        self.values = values_for(pattern, seed, dtype).to(device).requires_grad_()
        self.index: Index = (
            pattern.crow.to(device, pointers),
            pattern.col.to(device, columns or pattern.col.dtype),
        )
        if encoding == "bitmap":
            self.index = (encode(pattern.crow, pattern.col, self.cols).to(device), None)

    @property
    def operand(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.values, *self.index

    def dense(self) -> Tensor:
        return self.pattern.to_dense(self.values)

    def ids(self, *shape: int) -> Tensor:
        """With repetitions; the first and the last row are among them if there is room."""
        drawn = torch.randint(self.rows, shape, generator=torch.Generator().manual_seed(sum(shape)))
        drawn.view(-1)[:2] = torch.tensor([self.rows - 1, 0])[: drawn.numel()]
        return drawn.to(self.values.device)


def randn(*shape: int, like: Tensor, seed: int = 1) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(like.device, like.dtype)


def close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = 1e-11 if theirs.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def check(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    """Values and gradients of an operator and of dense torch."""
    expected = theirs()
    weights = randn(*expected.shape, like=expected)
    with sparsecore.backend("triton"):
        found = ours()
        gradients = torch.autograd.grad((found * weights).sum(), inputs)
    close(found, expected)
    for mine, right in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        close(mine, right)


def bags(n: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Where bags begin, some of them empty, and the bag of each of n entries."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(n + 1, (max(0, n // 3),), generator=generator).sort().values
    offsets = torch.cat((torch.tensor([0]), cuts, torch.tensor([n])))
    return offsets.to(device), torch.repeat_interleave(offsets.diff()).to(device)


def check_lookups(table: Table, n: int, seed: int = 0) -> None:
    ids, values = table.ids(n), table.values
    check(
        lambda: ops.gather(*table.operand, ids, table.cols),
        lambda: table.dense()[ids],
        [values],
    )
    offsets, bag = bags(n, seed, str(values.device))
    weights = randn(n, like=values, seed=2).requires_grad_()

    def summed() -> Tensor:
        zeros = values.new_zeros(offsets.numel() - 1, table.cols)
        return zeros.index_add(0, bag, weights[:, None] * table.dense()[ids])

    check(lambda: ops.bag(*table.operand, ids, offsets, weights, table.cols), summed, [values, weights])


def check_pairs(a: Table, b: Table, n: int, each: int | None) -> None:
    ids_a, ids_b = a.ids(n), b.ids(*((n,) if each is None else (n, each)))

    def products() -> Tensor:
        left = a.dense()[ids_a]
        return ((left if each is None else left[:, None]) * b.dense()[ids_b]).sum(-1)

    inputs = [a.values] if a is b else [a.values, b.values]
    check(lambda: ops.gather_dot(*a.operand, ids_a, *b.operand, ids_b, a.cols), products, inputs)


def check_touched(table: Table, n: int, seed: int = 0) -> None:
    """With and without sources: places and sums, at the rows that occur alone."""
    ids, device = table.ids(n), table.values.device
    sources = torch.randint(max(1, n // 2), (n,), generator=torch.Generator().manual_seed(seed)).to(device)
    weights = randn(n, like=table.values)
    rows = table.pattern.row_indices()
    for arguments in ((), (sources, weights)):
        grad = randn(n + 1, table.cols, like=table.values)
        added = weights[:, None] * grad[sources] if arguments else grad[:n]
        dense = grad.new_zeros(table.rows, table.cols).index_add(0, ids, added)
        with sparsecore.backend("triton"):
            places, values = ops.touched(*table.index, ids, grad, table.nnz, *arguments)
        assert torch.equal(places, torch.nonzero(torch.isin(rows, ids)).view(-1))
        close(values, dense.view(-1)[table.pattern.positions()[places]])


def check_linear(table: Table, n: int, seed: int = 0) -> None:
    x = randn(n, table.cols, like=table.values, seed=seed).requires_grad_()
    dy = randn(n, table.rows, like=table.values, seed=seed + 1).requires_grad_()
    values = table.values
    check(lambda: ops.spmm(*table.operand, x), lambda: x @ table.dense().t(), [values, x])
    check(lambda: ops.spmm_t(*table.operand, dy, table.cols), lambda: dy @ table.dense(), [values, dy])


@every_device
@pytest.mark.parametrize("n", [1, 16, 64, 130] if not FEW else [5, 130])
@pytest.mark.parametrize(("rows", "cols"), [(129, 65), (64, 200), (300, 32), (1, 600)])
def test_linear_products_around_the_sizes_of_a_tile(device: str, rows: int, cols: int, n: int) -> None:
    """Several parts of the sum, several tiles of each side."""
    pattern = Pattern.random((rows, cols), 0.4, generator=torch.Generator().manual_seed(n))
    check_linear(Table(pattern, device, "bitmap", torch.float32), n)


@every_device
def test_how_exact_a_product_of_float32_is(device: str) -> None:
    """As float32 itself; as torch was told that is enough; and no further off where the sums are long."""
    generator = torch.Generator().manual_seed(0)
    table = Table(Pattern.random((64, 4000), 0.5, generator=generator), device, "bitmap", torch.float32)
    x = randn(20, 4000, like=table.values)
    exact = x.double() @ table.dense().detach().double().t()
    before = torch.get_float32_matmul_precision()
    try:
        for precision, worst in (("highest", 1e-6), ("high", 3e-5), ("medium", 1e-2)):
            torch.set_float32_matmul_precision(precision)
            with sparsecore.backend("triton"), torch.no_grad():
                found = ops.spmm(*table.operand, x).double()
            assert torch.linalg.vector_norm(found - exact) < worst * torch.linalg.vector_norm(exact)
    finally:
        torch.set_float32_matmul_precision(before)


@every_device
@every_encoding
@pytest.mark.parametrize("cols", [33, 300] if FEW else [31, 32, 33, 64, 128, 129, 300])
def test_widths_around_those_of_a_tile(device: str, encoding: str, cols: int) -> None:
    table = Table(
        Pattern.random((19, cols), 0.3, generator=torch.Generator().manual_seed(cols)), device, encoding
    )
    check_lookups(table, 12)
    check_touched(table, 12)
    check_pairs(table, table, 12, None)


@every_device
def test_the_widest_columns_of_an_index_type(device: str) -> None:
    col = torch.tensor([0, 32768, 32768, 32767, 32768])
    table = Table(Pattern.from_coo(torch.tensor([0, 0, 1, 2, 2]), col, (3, 32769)), device)
    ids = table.ids(3)
    with sparsecore.backend("triton"), torch.no_grad():
        assert torch.equal(ops.gather(*table.operand, ids, 32769), table.dense()[ids])


@every_device
@every_encoding
def test_an_entry_that_most_name(device: str, encoding: str) -> None:
    """Its sum takes many tiles; and it is the same every time."""
    table = Table(Pattern.random((30, 50), 0.4), device, encoding, torch.float32)
    ids = torch.cat((table.ids(60), torch.full((900,), 5, device=device)))
    grad = randn(ids.numel(), 50, like=table.values)
    with sparsecore.backend("triton"):
        found, again = (ops.scatter_grad(*table.index, ids, grad, table.nnz) for _ in range(2))
    assert torch.equal(found, again)
    dense = grad.new_zeros(30, 50).index_add(0, ids, grad)
    torch.testing.assert_close(found, dense.view(-1)[table.pattern.positions()], rtol=1e-4, atol=1e-3)


@every_device
@every_encoding
def test_second_derivatives_and_memory_layouts(device: str, encoding: str) -> None:
    table = Table(Pattern.random((3, 4), 0.5, generator=torch.Generator().manual_seed(1)), device, encoding)
    ids, (offsets, _) = table.ids(4), bags(4, 0, device)
    weights = randn(4, like=table.values).requires_grad_()
    with sparsecore.backend("triton"):
        for operator, arguments in (
            (ops.bag, (*table.operand, ids, offsets, weights, 4)),
            (ops.gather_dot, (*table.operand, ids[:2], *table.operand, ids[:2, None].expand(2, 2), 4)),
        ):
            assert torch.autograd.gradcheck(operator, arguments)
            assert torch.autograd.gradgradcheck(operator, arguments)


@every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(device: str, dtype: torch.dtype) -> None:
    table = Table(Pattern.random((9, 20), 0.5), device, dtype=torch.float32)
    ids, values = table.ids(12), table.values.detach().to(dtype)
    dense = table.pattern.to_dense(values)
    x, dy = (randn(17, n, like=values) for n in (20, 9))
    bitmap = encode(table.pattern.crow, table.pattern.col, 20)
    if device == "cuda" or dtype == torch.float16:  # the interpreter takes bfloat16 for integers
        with sparsecore.backend("triton"):
            products = ops.spmm(values, bitmap, None, x), ops.spmm_t(values, bitmap, None, dy, 20)
            gradient = ops.sddmm(bitmap, None, dy, x, table.nnz)
        wide = x.double(), dy.double(), dense.double()
        for ours, theirs in zip(
            (*products, gradient),
            (wide[0] @ wide[2].t(), wide[1] @ wide[2],
             (wide[1].t() @ wide[0]).view(-1)[table.pattern.positions()]), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-2, atol=2e-2)
    with sparsecore.backend("triton"):
        found = ops.gather(values, *table.index, ids, 20)
        sparse = ops.gather_touched(values.requires_grad_(), *table.index, ids, 20)
        (grad,) = torch.autograd.grad(sparse.sum(), values)
    assert torch.equal(found, table.pattern.to_dense(values.detach())[ids])
    assert torch.equal(sparse, found)
    counts = torch.bincount(ids, minlength=9)[table.pattern.row_indices()]
    assert torch.equal(grad.to_dense(), counts.to(dtype))


@every_device
@of_infinities
def test_what_is_not_stored_is_not_multiplied_by_infinity(device: str) -> None:
    """As in the torch backend: in bags; in products of pairs a missing value is a zero."""
    table = Table(Pattern.from_mask(torch.tensor([[True, False], [True, True]])), device)
    infinite = torch.full((3,), torch.inf, device=device, dtype=torch.float64)
    ids, offsets = torch.tensor([0, 1, 0], device=device), torch.tensor([0, 3], device=device)
    found = []
    for backend in ("triton", "torch"):
        with sparsecore.backend(backend):
            found.append(
                (
                    ops.bag(*table.operand, ids, offsets, infinite, 2),
                    ops.bag_grad(*table.index, ids, offsets, infinite, infinite[None, :2], 3),
                    ops.bag_dot(*table.operand, ids, offsets, infinite[None, :2]),
                    ops.gather_dot(infinite, *table.index, ids, *table.operand, ids.flip(0) ^ 1, 2),
                )
            )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


# ---------------------------------------------------------------- top-k


def coarse(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """Quarters: their sums of products are exact in any order, and there are many ties."""
    drawn = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device, dtype) / 4


def check_topk(table: Table, n: int, k: int, share: float, seed: int = 0) -> None:
    """Scores and ids, without a share of the items for each query, against a stable sort of all scores."""
    dtype, device = table.values.dtype, str(table.values.device)
    queries = coarse((n, table.cols), seed, dtype, device)
    values = coarse((table.nnz,), seed + 1, dtype, device)
    mask = torch.rand(n, table.rows, generator=torch.Generator().manual_seed(n)) < share
    crow = torch.cat((torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)))
    seen: tuple[Any, ...] = ()
    if share:
        seen = (
            crow.to(device, torch.int32),
            mask.nonzero()[:, 1].to(device, torch.int32 if n % 2 else torch.int64),
        )
    with sparsecore.backend("triton"):
        scores, ids = ops.score_topk(queries, values, *table.index, k, *seen)
    all_scores = (queries @ table.pattern.to_dense(values).t()).masked_fill(mask.to(device), -torch.inf)
    expected, order = all_scores.sort(dim=1, descending=True, stable=True)
    missing = max(0, k - table.rows)
    expected = torch.nn.functional.pad(expected[:, :k], (0, missing), value=-torch.inf)
    order = torch.nn.functional.pad(order[:, :k], (0, missing), value=-1)
    assert torch.equal(scores, expected)
    assert torch.equal(ids, order.masked_fill(expected == -torch.inf, -1))
    assert scores.is_contiguous()
    assert ids.is_contiguous()


@every_device
@every_encoding
@every_dtype
@pytest.mark.parametrize("k", [10, 65] if FEW else [1, 10, 64, 65])
def test_topk_over_tiles_and_blocks(
    device: str, encoding: str, dtype: torch.dtype, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles for a program, several programs, several turns of 64 queries; several blocks for a large k."""
    topk = importlib.import_module("sparsecore.backends.triton.topk")
    monkeypatch.setattr(topk, "_programs", lambda device: 3)
    monkeypatch.setattr(topk, "_SCORES", 2000)
    pattern = Pattern.random((500, 40), 0.2, generator=torch.Generator().manual_seed(0))
    for n, share in ((1, 0.0), (17, 0.05), (70, 0.05)):
        check_topk(Table(pattern, device, encoding, dtype), n, k, share)


@every_device
def test_topk_of_wide_rows(device: str) -> None:
    pattern = Pattern.random((150, 200), 0.1, generator=torch.Generator().manual_seed(0))
    check_topk(Table(pattern, device, dtype=torch.float32), 66, 8, 0.1)


@every_device
def test_topk_does_not_depend_on_the_precision_of_products(device: str) -> None:
    """Scores that bfloat16 cannot tell apart."""
    pattern = Pattern.from_mask(torch.ones(400, 32, dtype=torch.bool))
    table = Table(pattern, device, "bitmap", torch.float32)
    drawn = torch.rand(400 * 32 + 3 * 32, generator=torch.Generator().manual_seed(0)).to(device) / 50 + 1
    values, queries = drawn[: 400 * 32], drawn[400 * 32 :].view(3, 32)
    before, found = torch.get_float32_matmul_precision(), []
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            with sparsecore.backend("triton"):
                found.append(ops.score_topk(queries, values, *table.index, 5))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found[0][1], found[1][1])
    exact = queries.double() @ pattern.to(device).to_dense(values).double().t()
    torch.testing.assert_close(found[0][0].double(), exact.topk(5).values, rtol=1e-6, atol=0)


@every_device
@every_encoding
@pytest.mark.parametrize("k", [7, 70])
def test_topk_of_equal_scores(device: str, encoding: str, k: int) -> None:
    table = Table(Pattern.random((300, 3), 0.2), device, encoding, torch.float32)
    with sparsecore.backend("triton"):
        scores, ids = ops.score_topk(
            torch.ones(9, 3, device=device), torch.zeros_like(table.values), *table.index, k
        )
    assert not scores.any()
    assert torch.equal(ids.cpu(), torch.arange(k).expand(9, k))


@every_device
@of_infinities
def test_topk_of_scores_that_are_not_finite_in_many_tiles(device: str) -> None:
    """More tiles than are chosen hold one, and more than one program looks for them."""
    pattern = Pattern.from_mask(torch.ones(70 * 64, 1, dtype=torch.bool))
    table = Table(pattern, device, "bitmap", torch.float32)
    values = torch.arange(70.0 * 64, device=device)
    values[5::64] = torch.nan
    values[9::640] = torch.inf
    values[7::64] = -torch.inf
    with sparsecore.backend("triton"):
        scores, ids = ops.score_topk(torch.ones(2, 1, device=device), values, *table.index, 9)
    assert ids[1].tolist() == [9, 649, 1289, 1929, 2569, 3209, 3849, 4479, 4478]
    assert scores[1].tolist() == [torch.inf] * 7 + [4479.0, 4478.0]


@every_device
def test_topk_of_nothing(device: str) -> None:
    none = torch.zeros(0, device=device)
    index = torch.zeros(1, dtype=torch.int32, device=device), none.to(torch.uint8)
    with sparsecore.backend("triton"):
        scores, ids = ops.score_topk(torch.ones(2, 3, device=device), none, *index, 4)
    assert scores.tolist() == [[-torch.inf] * 4] * 2
    assert ids.tolist() == [[-1] * 4] * 2


@every_device
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16])
def test_topk_of_narrow_ids_that_were_seen(device: str, kind: torch.dtype) -> None:
    table = Table(Pattern.from_mask(torch.ones(6, 1, dtype=torch.bool)), device, dtype=torch.float32)
    seen = torch.tensor([0, 2], device=device), torch.tensor([1, 4], dtype=kind, device=device)
    with sparsecore.backend("triton"):
        _, ids = ops.score_topk(
            torch.ones(1, 1, device=device), torch.arange(6.0, device=device), *table.index, 3, *seen
        )
    assert ids.tolist() == [[5, 3, 2]]


@every_device
@every_encoding
@pytest.mark.parametrize("missing", [0, 70])
@of_infinities
def test_topk_of_scores_that_are_not_finite(device: str, encoding: str, missing: int) -> None:
    table = Table(Pattern.from_mask(torch.ones(6, 1, dtype=torch.bool)), device, encoding)
    values = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 2.0, 1.0], device=device)
    with sparsecore.backend("triton"):
        scores, ids = ops.score_topk(torch.ones(2, 1, device=device), values, *table.index, 6 + missing)
    assert ids[0].tolist() == [2, 4, 0, 5, *[-1] * (2 + missing)]
    assert scores[0].tolist() == [torch.inf, 2, 1, 1, *[-torch.inf] * (2 + missing)]


# ---------------------------------------------------------------- exploration


def explore_once(table: Table, share: float, backend: str) -> tuple[Any, ...]:
    """Prune, grow, realign and record; ``share`` of what could be exchanged is."""
    generator, (rows, cols) = torch.Generator().manual_seed(0), (table.rows, table.cols)
    values, k = table.values.detach(), round(share * min(table.nnz, rows * cols - table.nnz))
    gradient = torch.randn(rows, cols, generator=generator, dtype=values.dtype).to(values.device)
    moments = torch.randn(table.nnz, generator=generator, dtype=values.dtype).to(values.device)
    history = torch.randint(256, (-(-rows * cols // 8),), generator=generator, dtype=torch.uint8)
    history = history.to(values.device)

    class Source:
        def rows(self) -> Tensor | None:
            return None

        def block(self, rows: Tensor | slice) -> Tensor:
            return gradient[rows].clone()

    with sparsecore.backend(backend):
        left = ops.explore.prune(values, table.index, (rows, cols), k)
        copy = tuple(part if part is None else part.clone() for part in left)
        grown = ops.explore.grow(Source(), left, (rows, cols), k)
        own = [values.clone(), moments]
        kept = ops.explore.realign_(list(zip(own, (0.0, 0.5), strict=True)), table.index, grown, (rows, cols))
        added = ops.explore.record_(history, grown, (rows, cols))
    return copy, grown, own, history, kept, added


def check_exploration(
    device: str, encoding: str, pattern: Pattern, share: float, dtype: torch.dtype, seed: int
) -> None:
    table = Table(pattern, device, encoding, dtype, seed)
    found, expected = (explore_once(table, share, backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_device
@every_encoding
@pytest.mark.parametrize("cols", [1, 8, 31, 32, 33, 64, 128, 129, 700])
def test_an_exploration_is_torchs(device: str, encoding: str, cols: int) -> None:
    pattern = Pattern.random((70, cols), 0.4, generator=torch.Generator().manual_seed(cols))
    check_exploration(device, encoding, pattern, 0.5, torch.float32, cols)


class Launches(TorchDispatchMode):
    """Counts operations of torch that compute, and kernels."""

    count = 0
    counting = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = ("aten.empty", "aten.detach", "aten._unsafe_view")
        self.count += self.counting and not function.is_view and not str(function).startswith(views)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not INTERPRETED, reason="counted in Triton's interpreter")
def test_an_exploration_of_a_bitmap_launches_less_than_masks_take(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    run, launches = interpreter.run, Launches()

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.count, launches.counting = launches.count + 1, False
        try:
            return run(self, *args, **kwargs)
        finally:
            launches.counting = True

    monkeypatch.setattr(interpreter, "run", counted)
    for module in ("masks", "explore"):  # two blocks, as a weight of 8 M positions has on a GPU
        part = importlib.import_module(f"sparsecore.backends.torch.{module}")
        monkeypatch.setattr(part, "block_height", lambda shape, device: shape[0] // 2)
    pattern, found = Pattern.random((80, 64), 0.25, generator=torch.Generator().manual_seed(0)), {}
    for backend in ("torch", "triton"):
        launches.count = 0
        with launches:
            explore_once(Table(pattern, "cpu", "bitmap", torch.float32), 0.5, backend)
        found[backend] = launches.count
    assert found["triton"] < 0.6 * found["torch"]


# ---------------------------------------------------------------- the backend


@needs_triton
@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_torchs_newer_setting_of_tf32() -> None:
    """In a process of its own: torch refuses its older setting ever after."""
    code = """
import torch
from sparsecore.backends.triton.products import _parts_of_float32 as parts
assert parts() == 3
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert parts() == 2
torch.backends.cuda.matmul.fp32_precision = "ieee"
assert parts() == 3
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_triton
def test_it_offers_what_the_torch_backend_offers() -> None:
    for part in ("", ".explore"):
        ours, theirs = (
            importlib.import_module(f"sparsecore.backends.{b}{part}") for b in ("triton", "torch")
        )
        # Of torch's explorations triton's takes parts.
        parts = {"insert", "move_", "what_stays"} if part else set()
        assert set(ours.__all__) == set(theirs.__all__) - parts


def lookup() -> Tensor:
    table = Table(Pattern.random((3, 4), 0.5), "cpu")
    with sparsecore.backend("triton"):
        return ops.gather(*table.operand, torch.tensor([0, 2]), 4)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_the_cpu_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_interpreted", False)
    with pytest.raises(SparsecoreError, match=r"set TRITON_INTERPRET=1 .* or use 'numba' or 'torch'"):
        lookup()


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_interpreted", True)
    monkeypatch.setattr(backends, "_loaded", {})
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not there
    for name in [n for n in sys.modules if n.startswith("sparsecore.backends.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(backends, "_environment", "triton")  # SPARSECORE_BACKEND
    table = sparsecore.SparseEmbedding(6, 3, density=0.5)
    for use in (
        lookup,
        lambda: table(torch.tensor([1])),
        lambda: ops.explore.prune(table.values.detach(), table.index, table.shape, 2),
    ):
        with pytest.raises(SparsecoreError, match="needs the package triton"):
            use()


@pytest.mark.parametrize(
    ("installed", "compilers", "named", "usable"),
    [
        (True, {"gcc"}, None, True),
        (True, {"clang"}, None, True),
        (True, set(), "/opt/cc", True),
        (True, set(), None, False),
        (False, {"gcc"}, None, False),
    ],
)
def test_triton_is_used_where_it_can_compile(
    monkeypatch: pytest.MonkeyPatch, installed: bool, compilers: set[str], named: str | None, usable: bool
) -> None:
    monkeypatch.setattr(optional.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(optional.shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.setattr(optional.os, "name", "posix")
    monkeypatch.delenv("CC", raising=False)
    if named:
        monkeypatch.setenv("CC", named)
    assert optional.has_triton.__wrapped__() is usable


@pytest.mark.gpu
@pytest.mark.skipif(not (HAS_TRITON and torch.cuda.is_available()), reason="needs triton and a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_kernels_do_not_wait_for_the_device() -> None:
    table = Table(Pattern.random((300, 64), 0.3), "cuda", dtype=torch.float32)
    ids, (offsets, bag) = table.ids(50), bags(50, 0, "cuda")
    weights, queries = randn(50, like=table.values), randn(20, 64, like=table.values)
    grad = randn(50, 64, like=table.values)
    seen = torch.arange(21, device="cuda"), torch.arange(20, device="cuda")
    dense_enough = Table(Pattern.random((300, 64), 0.3), "cuda", "bitmap", torch.float32)
    matrix = scipy.sparse.random_array((300, 300), density=0.1, rng=0)
    edges = sparsecore.Graph.from_scipy(matrix, torch.float32).to("cuda").arrays()
    whole = randn(300, 64, like=table.values)
    products = randn(20, 300, like=table.values)

    def everything() -> None:
        with sparsecore.backend("triton"), torch.no_grad():
            ops.gather(*table.operand, ids, 64)
            ops.gather_touched(*table.operand, ids, 64)
            ops.gather_dot(*table.operand, ids, *table.operand, ids, 64)
            ops.scatter_grad(*table.index, ids, grad, table.nnz)
            ops.bag(*table.operand, ids, offsets, weights, 64)
            backends.load(ids.device).bag_grad(*table.index, ids, bag, weights, grad, table.nnz)
            backends.load(ids.device).bag_dot(*table.operand, ids, bag, grad)
            ops.score_topk(queries, *table.operand, 10, *seen)
            ops.score_topk(queries, *table.operand, 100, *seen)
            ops.spmm(*dense_enough.operand, queries)
            ops.spmm_t(*dense_enough.operand, products, 64)
            ops.sddmm(*dense_enough.index, products, queries, dense_enough.nnz)
            for some in (20, 5):  # a bitmap is made; torch.sparse multiplies
                ops.spmm(*table.operand, queries[:some])
                ops.spmm_t(*table.operand, products[:some], 64)
                ops.sddmm(*table.index, products[:some], queries[:some], table.nnz)
            ops.propagate(*edges, whole)
            ops.propagate_rows(*edges, whole, ids)
            ops.propagate_rows_t(*edges, grad, ids)
            for encoded in (table, dense_enough):
                ops.propagate_mean(*edges, *encoded.operand, 64, 3)
                ops.propagate_mean_grad(*edges, *encoded.index, whole, 3, encoded.nnz)

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


COMPILE = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from test_triton import ENCODINGS, Pattern, Table
from sparsecore.backends import triton as kernels
from sparsecore.backends.triton import draw as kernels_of_draw, explore as kernels_of_explore, graph
from sparsecore.sampling import plan_draw

class NoDevice:
    def get_current_target(self): return GPUTarget("cuda", 80, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cuda")

driver.set_active(NoDevice())
run, compiled = JITFunction.run, set()

def compile_only(self, *args, grid, warmup, **kwargs):
    run(self, *args, grid=grid, warmup=True, **kwargs)
    compiled.add(self.fn.__name__)

JITFunction.run = compile_only
kernels_of_explore.by_torch.move_ = lambda *_: 0  # nothing has written the places that it reads
ids = torch.tensor([0, 1, 1])
kernels_of_draw.members(plan_draw(9, 4), 0, 9, torch.device("cpu"))
for dtype in (torch.float32, torch.float64):
    for cols in (40, 600):
        for encoding in ENCODINGS:
            table = Table(Pattern.random((5, cols), 0.4), "cpu", encoding, dtype)
            values, index = table.values.detach(), table.index
            rows, weights = torch.ones(3, cols, dtype=dtype), torch.ones(3, dtype=dtype)
            many = rows.repeat(6, 1)
            kernels.gather(values, *index, ids, cols)
            kernels.bag(values, *index, ids, torch.tensor([0, 3]), weights, cols)
            kernels.bag_dot(values, *index, ids, ids, rows)
            kernels.bag_grad(*index, ids, ids, weights, rows, table.nnz)
            kernels.scatter_grad(*index, ids, rows, table.nnz)
            kernels.touched(*index, ids, rows, table.nnz, ids, weights)
            kernels.gather_dot(values, *index, ids, values, *index, ids, cols)
            if dtype == torch.float32:
                for precision in ("highest", "medium"):
                    torch.set_float32_matmul_precision(precision)
                    kernels.spmm(values, *index, many)
                    kernels.spmm_t(values, *index, many[:, :5].contiguous(), cols)
                    kernels.sddmm(*index, many[:, :5].contiguous(), many, table.nnz)
            graph.add_rows_(torch.zeros(5, cols, dtype=dtype), values, *index)
            if encoding == "bitmap":
                shape = (5, cols)
                kernels_of_explore.prune(values, index, shape, 2)
                kernels_of_explore._insert(index, shape, torch.tensor([1, 2], dtype=torch.int32))
                kernels_of_explore.realign_([(values.clone(), 0.0)], index, index, shape)
                kernels_of_explore.record_(torch.zeros(5 * cols // 8, dtype=torch.uint8), index, shape)
            graph.sample(*index, torch.zeros(5, cols, dtype=dtype), table.nnz)
            queries = rows.repeat(22, 1)
            for k in (10, 100):
                for seen in ((None, None), (torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1]))):
                    kernels.score_topk(rows, values, *index, k, *seen, cols)
                kernels.score_topk(queries, values, *index, k, None, None, cols)
print(*sorted(compiled))
"""


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """To machine code, without a GPU: the interpreter takes types and control flow that the compiler refuses."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SPARSECORE_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", COMPILE, str(Path(__file__).parent)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "_add_rows", "_add_up_rows", "_bag", "_bag_dot", "_best_of_tiles", "_best_of_unknown", "_count", "_draw",
        "_gather", "_gather_dot", "_keep", "_record", "_sample", "_score_block", "_score_tiles", "_sddmm", "_set",
        "_set_bits", "_split", "_spmm", "_spmm_t", "_starts", "_trace",
    ]  # fmt: skip
