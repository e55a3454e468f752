"""Every operator against plain dense torch: values, all derivatives, shapes, threads, memory layouts, counts."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BACKENDS, DTYPES, NARROW_WIDTHS, backends, patterns, seeds, values_for
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sparsecore
from sparsecore import MacCounter, Pattern, SparsecoreError, ops
from sparsecore.encoding import ENCODINGS, encode

pytestmark = pytest.mark.feature("operators: values, derivatives, torch.library.opcheck")


@pytest.fixture(autouse=True)
def kernels(every_size: None) -> None:
    """Each test twice: its problems are small enough for numba's small kernels."""


# ---------------------------------------------------------------- the operators in plain dense torch


def dense(values: Tensor, crow: Tensor, col: Tensor, cols: int) -> Tensor:
    rows, out = row_of(crow), values.new_zeros(crow.numel() - 1, cols)
    return out.index_put((rows, col.to(torch.int64)), values)


def row_of(crow: Tensor) -> Tensor:
    return torch.tensor(
        [i for i in range(crow.numel() - 1) for _ in range(int(crow[i]), int(crow[i + 1]))], dtype=torch.int64
    )


def at(matrix: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    return matrix[row_of(crow), col.to(torch.int64)]


def bag_of(offsets: Tensor) -> Tensor:
    return torch.tensor(
        [b for b in range(offsets.numel() - 1) for _ in range(int(offsets[b]), int(offsets[b + 1]))],
        dtype=torch.int64,
    )


def bag(
    values: Tensor, crow: Tensor, col: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor, cols: int
) -> Tensor:
    out = values.new_zeros(offsets.numel() - 1, cols)
    return out.index_add(0, bag_of(offsets), weights[:, None] * dense(values, crow, col, cols)[ids])


def bag_grad(
    crow: Tensor, col: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor, grad: Tensor, nnz: int
) -> Tensor:
    out = grad.new_zeros(crow.numel() - 1, grad.shape[1])
    return at(out.index_add(0, ids, weights[:, None] * grad[bag_of(offsets)]), crow, col)


def scatter_grad(crow: Tensor, col: Tensor, ids: Tensor, grad: Tensor, nnz: int) -> Tensor:
    return at(grad.new_zeros(crow.numel() - 1, grad.shape[1]).index_add(0, ids, grad), crow, col)


def bag_dot(values: Tensor, crow: Tensor, col: Tensor, ids: Tensor, offsets: Tensor, grad: Tensor) -> Tensor:
    return (dense(values, crow, col, grad.shape[1])[ids] * grad[bag_of(offsets)]).sum(1)


def adjacency(crow: Tensor, col: Tensor, weight: Tensor) -> Tensor:
    return dense(weight, crow, col, crow.numel() - 1)


def mean_of_hops(a: Tensor, x: Tensor, hops: int) -> Tensor:
    total, power = x, x
    for _ in range(hops):
        power = a @ power
        total = total + power
    return total / (hops + 1)


def propagate_mean(*args: Any) -> Tensor:
    return mean_of_hops(adjacency(*args[:3]), dense(*args[6:10]), args[10])


def propagate_mean_grad(*args: Any) -> Tensor:
    crow, col, grad, hops, _ = args[6:]
    return at(mean_of_hops(adjacency(*args[:3]).t(), grad, hops), crow, col)


@dataclass(frozen=True)
class Operator:
    """An operator, its dense reference (same arguments), and the positions of its differentiable arguments."""

    name: str
    reference: Callable[..., Tensor]
    differentiable: tuple[int, ...]

    @property
    def run(self) -> Any:
        return getattr(ops, self.name)


OPERATORS = [
    Operator("gather", lambda v, crow, col, ids, n: dense(v, crow, col, n)[ids], (0,)),
    Operator("scatter_grad", scatter_grad, (3,)),
    Operator("bag", bag, (0, 5)),
    Operator("bag_grad", bag_grad, (4, 5)),
    Operator("bag_dot", bag_dot, (0, 5)),
    Operator("spmm", lambda v, crow, col, x: x @ dense(v, crow, col, x.shape[1]).t(), (0, 3)),
    Operator("spmm_t", lambda v, crow, col, dy, n: dy @ dense(v, crow, col, n), (0, 3)),
    Operator("sddmm", lambda crow, col, dy, x, nnz: at(dy.t() @ x, crow, col), (2, 3)),
    Operator("propagate", lambda *a: adjacency(*a[:3]) @ a[6], (6,)),
    Operator("propagate_rows", lambda *a: (adjacency(*a[:3]) @ a[6])[a[7]], (6,)),
    Operator("propagate_rows_t", lambda *a: adjacency(*a[:3])[a[7]].t() @ a[6], (6,)),
    Operator("propagate_mean", propagate_mean, (6,)),
    Operator("propagate_mean_grad", propagate_mean_grad, (8,)),
]
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def graph(nodes: int, density: float, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """An asymmetric graph and its transpose; its first node is isolated."""
    mask = torch.rand(nodes, nodes, generator=generator) < density
    mask[0] = mask[:, 0] = False
    mask[-1, -1] = True
    a = torch.rand(nodes, nodes, generator=generator, dtype=dtype) * mask
    arrays: list[Tensor] = []
    for matrix in (a, a.t()):
        pattern = Pattern.from_mask(matrix)
        arrays += [pattern.crow, pattern.col.to(torch.int32), matrix[pattern.to_mask()]]
    return tuple(arrays)


def arguments(
    name: str, pattern: Pattern, batch: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Any]:
    """Random arguments of an operator for a weight of this pattern; ids repeat and some bags are empty."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    rows, cols = pattern.shape
    values, index = values_for(pattern, seed, dtype), [pattern.crow, pattern.col]
    ids = torch.randint(rows, (batch,), generator=generator)
    n_bags = max(1, batch // 3)
    cuts = torch.randint(batch + 1, (n_bags - 1,), generator=generator).sort().values
    offsets = torch.cat((torch.tensor([0]), cuts, torch.tensor([batch])))
    bags: list[Any] = [ids, offsets]
    if name.startswith("propagate"):
        edges = list(graph(rows, min(0.3, 2500 / rows**2), dtype, generator))
        return {
            "propagate": [*edges, randn(rows, cols)],
            "propagate_rows": [*edges, randn(rows, cols), ids],
            "propagate_rows_t": [*edges, randn(batch, cols), ids],
            "propagate_mean": [*edges, values, *index, cols, 3],
            "propagate_mean_grad": [*edges, *index, randn(rows, cols), 3, pattern.nnz],
        }[name]
    return {
        "gather": [values, *index, ids, cols],
        "scatter_grad": [*index, ids, randn(batch, cols), pattern.nnz],
        "bag": [values, *index, *bags, randn(batch), cols],
        "bag_grad": [*index, *bags, randn(batch), randn(n_bags, cols), pattern.nnz],
        "bag_dot": [values, *index, *bags, randn(n_bags, cols)],
        "spmm": [values, *index, randn(batch, cols)],
        "spmm_t": [values, *index, randn(batch, rows), cols],
        "sddmm": [*index, randn(batch, rows), randn(batch, cols), pattern.nnz],
    }[name]


def with_gradients(args: list[Any], wanted: tuple[int, ...]) -> list[Any]:
    return [a.detach().clone().requires_grad_() if i in wanted else a for i, a in enumerate(args)]


INDEX_AT = {
    "gather": 1, "bag": 1, "bag_dot": 1, "spmm": 1, "spmm_t": 1, "scatter_grad": 0, "bag_grad": 0, "sddmm": 0,
    "propagate_mean": 7, "propagate_mean_grad": 6,
}  # fmt: skip
COLUMNS = {
    "gather": lambda a: a[4], "bag": lambda a: a[6], "bag_dot": lambda a: a[5].shape[1],
    "spmm": lambda a: a[3].shape[1], "spmm_t": lambda a: a[4], "scatter_grad": lambda a: a[3].shape[1],
    "bag_grad": lambda a: a[5].shape[1], "sddmm": lambda a: a[3].shape[1], "propagate_mean": lambda a: a[9],
    "propagate_mean_grad": lambda a: a[8].shape[1],
}  # fmt: skip


def as_bitmap(name: str, args: list[Any]) -> list[Any]:
    """The same arguments with the weight's index set as a bitmap (graphs have none)."""
    if name not in INDEX_AT:
        return args
    i = INDEX_AT[name]
    return [*args[:i], encode(args[i], args[i + 1], COLUMNS[name](args)), None, *args[i + 2 :]]


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-11 if actual.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check_against_reference(operator: Operator, args: list[Any], wanted: tuple[int, ...]) -> None:
    check_one_encoding(operator, args, args, wanted)
    if operator.name in INDEX_AT:
        check_one_encoding(operator, as_bitmap(operator.name, args), args, wanted)


def check_one_encoding(
    operator: Operator, args: list[Any], reference_args: list[Any], wanted: tuple[int, ...]
) -> None:
    ours, theirs = with_gradients(args, wanted), with_gradients(reference_args, wanted)
    out, expected = operator.run(*ours), operator.reference(*theirs)
    assert out.dtype == expected.dtype
    assert out.is_contiguous()
    close(out, expected)
    if not wanted:
        return
    seed = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad(out, [ours[i] for i in wanted], seed)
    for got, right in zip(
        gradients, torch.autograd.grad(expected, [theirs[i] for i in wanted], seed), strict=True
    ):
        close(got, right)


# ---------------------------------------------------------------- values and gradients


@every_operator
@given(patterns(), st.integers(0, 20), backends, seeds)
def test_any_pattern(operator: Operator, pattern: Pattern, batch: int, backend: str, seed: int) -> None:
    with sparsecore.backend(backend):
        args = arguments(operator.name, pattern, batch, seed=seed)
        check_against_reference(operator, args, operator.differentiable)


@every_operator
@every_backend
@every_dtype
@pytest.mark.parametrize("batch", [0, 1, 2, 15, 16, 17, 63, 64, 65, 130])
def test_batch_sizes(operator: Operator, backend: str, dtype: torch.dtype, batch: int) -> None:
    """Around the vector width (16) and the panel width (64) of the kernels."""
    pattern = Pattern.random((21, 50), 0.3, generator=torch.Generator().manual_seed(2))
    with sparsecore.backend(backend):
        args = arguments(operator.name, pattern, batch, dtype)
        check_against_reference(operator, args, operator.differentiable)


@every_operator
@every_backend
@pytest.mark.parametrize("cols", [1, 10, 50, 200])
def test_odd_widths(operator: Operator, backend: str, cols: int) -> None:
    pattern = Pattern.random((19, cols), 0.4, generator=torch.Generator().manual_seed(cols))
    with sparsecore.backend(backend):
        check_against_reference(operator, arguments(operator.name, pattern, 33), operator.differentiable)


@every_operator
@every_backend
@pytest.mark.parametrize("cols", [257, 32768, 32769])
def test_wide_columns_of_every_index_type(operator: Operator, backend: str, cols: int) -> None:
    """The last column that each type must hold: 256 and 32767 in int16, 32768 in int32."""
    col = torch.tensor([0, cols - 1, cols - 1, 5, cols - 2, cols - 1])
    pattern = Pattern.from_coo(torch.tensor([0, 0, 1, 3, 3, 3]), col, (4, cols))
    with sparsecore.backend(backend):
        check_against_reference(operator, arguments(operator.name, pattern, 3), operator.differentiable)


@every_operator
@every_backend
def test_gradient_of_one_argument_alone(operator: Operator, backend: str) -> None:
    """What the backward pass keeps depends on which inputs need a gradient."""
    pattern = Pattern.random((9, 14), 0.4, generator=torch.Generator().manual_seed(0))
    with sparsecore.backend(backend):
        for i in operator.differentiable:
            check_against_reference(operator, arguments(operator.name, pattern, 11), (i,))
        check_against_reference(operator, arguments(operator.name, pattern, 11), ())


def as_csr(name: str, args: list[Any]) -> list[Any]:
    return args


every_encoding = pytest.mark.parametrize("encoding", [as_csr, as_bitmap], ids=["csr", "bitmap"])


@every_operator
@every_backend
@every_encoding
def test_gradcheck_and_gradgradcheck(operator: Operator, backend: str, encoding: Any) -> None:
    pattern = Pattern.random((4, 5), 0.5, generator=torch.Generator().manual_seed(1))
    args = with_gradients(
        encoding(operator.name, arguments(operator.name, pattern, 6)), operator.differentiable
    )
    with sparsecore.backend(backend):
        assert torch.autograd.gradcheck(operator.run, args)
        assert torch.autograd.gradgradcheck(operator.run, args)


@every_operator
@every_backend
@every_encoding
def test_opcheck(operator: Operator, backend: str, encoding: Any) -> None:
    """Schema, fake implementation, autograd registration, and tracing with dynamic shapes."""
    pattern = Pattern.random((4, 5), 0.5, generator=torch.Generator().manual_seed(1))
    args = with_gradients(
        encoding(operator.name, arguments(operator.name, pattern, 6)), operator.differentiable
    )
    with sparsecore.backend(backend):
        torch.library.opcheck(operator.run.op, tuple(args))


@every_backend
def test_repeated_ids_add_up(backend: str) -> None:
    pattern = Pattern.from_mask(torch.tensor([[1, 1], [0, 1]]))
    ids = torch.zeros(1000, dtype=torch.int64)
    with sparsecore.backend(backend):
        out = ops.scatter_grad(pattern.crow, pattern.col, ids, torch.ones(1000, 2, dtype=torch.float64), 3)
    assert out.tolist() == [1000, 1000, 0]


# ---------------------------------------------------------------- threads


def large(name: str, dtype: torch.dtype) -> list[Any]:
    """Arguments with more work than the serial threshold in every kernel."""
    generator = torch.Generator().manual_seed(3)
    if name.startswith("propagate"):
        return arguments(name, Pattern.random((300, 200), 0.95, generator=generator), 400, dtype)
    batch = 130 if name in ("spmm", "spmm_t", "sddmm") else 1500
    pattern = Pattern.random((80, 100), 0.5, generator=generator)
    return arguments(name, pattern, batch, dtype)


@every_operator
@every_dtype
@every_encoding
def test_threads_do_not_change_a_bit(
    operator: Operator, dtype: torch.dtype, encoding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsecore.backends.numba import jit

    chunks: set[int] = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("sparsecore.backends.numba.") and hasattr(module, "threads") and module is not jit:
            monkeypatch.setattr(
                module, "threads", lambda work: chunks.add(jit.threads(work)) or jit.threads(work)
            )
    reference_args = large(operator.name, dtype)
    args = encoding(operator.name, reference_args)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        chunks.clear()
        with sparsecore.backend("numba"):
            results.append(operator.run(*args))
            assert torch.equal(operator.run(*args), results[-1])
        assert max(chunks) == n, "the case is too small to run in parallel"
        assert torch.get_num_threads() == n
    close(results[0], operator.reference(*reference_args))
    if operator.name == "spmm_t":  # threads take rows: their sums are added in the order of the threads
        close(results[1], results[0])
        close(results[2], results[0])
    else:
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@every_dtype
@pytest.mark.parametrize("threads", [1, 2])
def test_one_sample_above_the_threshold(threads: int, dtype: torch.dtype) -> None:
    pattern = Pattern.random((300, 250), 0.9, generator=torch.Generator().manual_seed(3))
    args = arguments("spmm", pattern, 1, dtype)
    torch.set_num_threads(threads)
    operator = next(o for o in OPERATORS if o.name == "spmm")
    check_against_reference(operator, args, ())


@pytest.mark.parametrize("threads", [2, 7])
def test_more_threads_than_rows(threads: int) -> None:
    """All nonzeros in one row, and more chunks than rows: nothing may be lost or done twice."""
    mask = torch.zeros(3, 250)
    mask[1] = 1
    pattern = Pattern.from_mask(mask)
    torch.set_num_threads(threads)
    for operator in OPERATORS:
        if not operator.name.startswith("propagate"):
            check_against_reference(operator, arguments(operator.name, pattern, 600), operator.differentiable)


# ---------------------------------------------------------------- memory layouts


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers one element behind the start of a storage."""
    return torch.cat((tensor.new_zeros(1), tensor.reshape(-1)))[1:].view(tensor.shape)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, not contiguous."""
    if tensor.dim() == 2:
        return tensor.t().contiguous().t()
    return torch.stack((tensor, tensor), 1)[:, 0]


@every_operator
@every_backend
@every_encoding
@pytest.mark.parametrize("layout", [misaligned, strided])
def test_memory_layout_does_not_matter(
    operator: Operator, backend: str, encoding: Any, layout: Callable[[Tensor], Tensor]
) -> None:
    pattern = Pattern.random((9, 14), 0.4, generator=torch.Generator().manual_seed(0))
    args = encoding(operator.name, arguments(operator.name, pattern, 18))
    with sparsecore.backend(backend):
        expected = operator.run(*args)
        awkward = [layout(a) if isinstance(a, Tensor) else a for a in args]
        before = [a.clone() if isinstance(a, Tensor) else a for a in awkward]
        close(operator.run(*awkward), expected)
    for a, b in zip(awkward, before, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b), "an argument was written to"


@every_backend
def test_expanded_gradients(backend: str) -> None:
    """``sum().backward()`` sends a gradient with stride 0."""
    pattern = Pattern.random((9, 14), 0.4, generator=torch.Generator().manual_seed(0))
    with sparsecore.backend(backend):
        for operator in OPERATORS:
            args = with_gradients(arguments(operator.name, pattern, 18), operator.differentiable)
            inputs = [args[i] for i in operator.differentiable]
            expected = torch.autograd.grad(operator.reference(*args).sum(), inputs)
            for got, right in zip(
                torch.autograd.grad(operator.run(*args).sum(), inputs), expected, strict=True
            ):
                close(got, right)


# ---------------------------------------------------------------- numbers that are not finite


@every_operator
@every_backend
@pytest.mark.parametrize("batch", [1, 3, 70])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings(
    "ignore:invalid value encountered in reduce"
)  # Triton's interpreter adds up with numpy
def test_bad_numbers_reach_what_depends_on_them_and_nothing_else(
    operator: Operator, backend: str, batch: int, bad: float
) -> None:
    pattern = Pattern.from_mask(torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]))
    with sparsecore.backend(backend):
        for i in operator.differentiable:
            args = arguments(operator.name, pattern, batch)
            for place in {0, args[i].numel() - 1}:
                base, moved = operator.run(*args), list(args)
                moved[i] = args[i].clone()
                moved[i].view(-1)[place] += 1.0
                depends = operator.run(*moved) != base
                moved[i].view(-1)[place] = bad
                assert torch.equal(~operator.run(*moved).isfinite(), depends)


# ---------------------------------------------------------------- errors


@every_backend
@pytest.mark.parametrize("wrong", [-1, 9, 2**40])
@pytest.mark.parametrize("name", ["gather", "bag"])
def test_ids_out_of_range(backend: str, name: str, wrong: int) -> None:
    pattern = Pattern.random((9, 14), 0.4, generator=torch.Generator().manual_seed(0))
    args = arguments(name, pattern, 6)
    args[3][2] = wrong
    with (
        sparsecore.backend(backend),
        pytest.raises(IndexError, match=rf"ids must be in 0 \.\. 8, got {wrong}"),
    ):
        getattr(ops, name)(*args)


@every_backend
@pytest.mark.parametrize("name", ["bag", "spmm", "spmm_t", "sddmm", "propagate", "propagate_mean"])
def test_mixed_types_are_refused_by_name(backend: str, name: str) -> None:
    pattern = Pattern.random((9, 14), 0.4, generator=torch.Generator().manual_seed(0))
    args = arguments(name, pattern, 6)
    floats = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    args[floats[-1]] = args[floats[-1]].float()
    with (
        sparsecore.backend(backend),
        pytest.raises(SparsecoreError, match=f"{name} needs one floating-point type, got .*float64.*float32"),
    ):
        getattr(ops, name)(*args)


@every_operator
@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_up_in_float32(operator: Operator, backend: str, dtype: torch.dtype) -> None:
    pattern = Pattern.random((9, 14), 0.4, generator=torch.Generator().manual_seed(0))

    def cast(args: list[Any], kind: torch.dtype) -> list[Any]:
        return [a.to(kind) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]

    half = cast(arguments(operator.name, pattern, 6), dtype)
    with sparsecore.backend(backend):
        found = operator.run(*half)
        expected = operator.run(*cast(half, torch.float32)).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


# ---------------------------------------------------------------- backends


def test_backend_override_nests_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecore import backends
    from sparsecore.backends import backend_name

    cpu = torch.device("cpu")
    monkeypatch.setattr(backends, "_environment", None)
    assert backend_name(cpu) == "numba"
    for triton, expected in ((True, "triton"), (False, "torch")):
        monkeypatch.setattr(backends, "has_triton", lambda: triton)  # noqa: B023
        assert backend_name(torch.device("cuda")) == expected
    assert backend_name(torch.device("meta")) == "torch"
    with sparsecore.backend("torch"):
        assert backend_name(cpu) == "torch"
        with sparsecore.backend("numba"):
            assert backend_name(cpu) == "numba"
            with pytest.raises(SparsecoreError, match="numba backend runs on the CPU, not on cuda"):
                backend_name(torch.device("cuda"))
        assert backend_name(cpu) == "torch"
    monkeypatch.setattr(backends, "_environment", "torch")  # SPARSECORE_BACKEND
    assert backend_name(cpu) == "torch"
    monkeypatch.setattr(backends, "_environment", "cupy")
    with pytest.raises(
        SparsecoreError, match=r"SPARSECORE_BACKEND must be one of numba, torch, .*, got 'cupy'"
    ):
        backend_name(cpu)
    with pytest.raises(SparsecoreError, match="backend must be one of"), sparsecore.backend("nope"):
        pass


def test_backends_offer_the_same_functions() -> None:
    numba, torch = (importlib.import_module(f"sparsecore.backends.{name}") for name in ("numba", "torch"))
    # torch's own optimizers are the other implementation of these.
    optimizers = {
        "adagrad_",
        "adam_",
        "adam_rows_",
        "sgd_",
        "spans_of_places",
        "spans_of_rows",
        "sum_rows",
        "touched_spans",
    }
    assert set(numba.__all__) - optimizers == set(torch.__all__)


# ---------------------------------------------------------------- counts


def brute_force_macs(name: str, args: list[Any]) -> int:
    """Multiply-adds counted one by one."""
    if name in ("gather", "scatter_grad"):
        return 0
    if name.startswith("propagate"):
        crow, col = args[0].tolist(), args[1].tolist()
        edges = [(i, col[k]) for i in range(len(crow) - 1) for k in range(crow[i], crow[i + 1])]
        if name == "propagate":
            return sum(1 for _ in itertools.product(edges, range(args[6].shape[1])))
        if name.startswith("propagate_rows"):
            edges = [edge for i in args[7].tolist() for edge in edges if edge[0] == i]
            return sum(1 for _ in itertools.product(edges, range(args[6].shape[1])))
        if name == "propagate_mean_grad":
            return sum(1 for _ in itertools.product(range(args[9]), edges, range(args[8].shape[1])))
        table, cols, hops = args[7].tolist(), args[9], args[10]
        first = sum(1 for _, j in edges for _ in range(table[j], table[j + 1]))
        return first + sum(1 for _ in itertools.product(range(hops - 1), edges, range(cols)))
    crow = (args[1] if name in ("bag", "bag_dot", "spmm", "spmm_t") else args[0]).tolist()
    if name.startswith("bag"):
        ids = (args[2] if name == "bag_grad" else args[3]).tolist()
        return sum(1 for r in ids for _ in range(crow[r], crow[r + 1]))
    batch = (args[2] if name == "sddmm" else args[3]).shape[0]
    return sum(1 for _ in range(batch) for r in range(len(crow) - 1) for _ in range(crow[r], crow[r + 1]))


BACKWARD = {
    "gather": {0: "scatter_grad"}, "scatter_grad": {3: "gather"}, "bag": {0: "bag_grad", 5: "bag_dot"},
    "bag_grad": {4: "bag_dot", 5: "bag"}, "bag_dot": {0: "bag_grad", 5: "bag"},
    "spmm": {0: "sddmm", 3: "spmm_t"}, "spmm_t": {0: "sddmm", 3: "spmm"}, "sddmm": {2: "spmm", 3: "spmm_t"},
    "propagate": {6: "propagate"}, "propagate_rows": {6: "propagate_rows_t"},
    "propagate_rows_t": {6: "propagate_rows"}, "propagate_mean": {6: "propagate_mean_grad"},
    "propagate_mean_grad": {8: "propagate_mean"},
}  # fmt: skip


def backward_macs(operator: Operator, args: list[Any], i: int) -> int:
    """The backward operator's count, from its definition: it does the same work as the forward, except over a graph."""
    kind = BACKWARD[operator.name][i]
    if kind == "propagate_mean_grad":
        return brute_force_macs(
            kind, [*args[:6], args[7], args[8], torch.empty(args[0].numel() - 1, args[9]), args[10], 0]
        )
    if kind == "propagate_mean":
        return brute_force_macs(kind, [*args[:6], None, args[6], args[7], args[8].shape[1], args[9]])
    return brute_force_macs(operator.name, args)


@every_operator
@every_backend
def test_counts_equal_brute_force(operator: Operator, backend: str) -> None:
    pattern = Pattern.random((9, 14), 0.4, generator=torch.Generator().manual_seed(0))
    with sparsecore.backend(backend):
        for count in range(1, len(operator.differentiable) + 1):
            for wanted in itertools.combinations(operator.differentiable, count):
                args = with_gradients(arguments(operator.name, pattern, 11), wanted)
                counter = MacCounter()
                with counter.phase("forward"):
                    out = operator.run(*args)
                with counter.phase("backward"):
                    out.sum().backward()
                assert counter.macs["forward"] == brute_force_macs(operator.name, args)
                assert counter.macs["backward"] == sum(backward_macs(operator, args, i) for i in wanted)


@every_operator
def test_torch_flop_counter_sees_two_flops_per_multiply_add(operator: Operator) -> None:
    pattern = Pattern.random((9, 14), 0.4, generator=torch.Generator().manual_seed(0))
    args = arguments(operator.name, pattern, 11)
    with FlopCounterMode(display=False) as counter:
        operator.run(*args)
    assert counter.get_total_flops() == 2 * brute_force_macs(operator.name, args)


def test_full_density_costs_what_a_dense_layer_costs() -> None:
    pattern = Pattern.from_mask(torch.ones(7, 5))
    args = with_gradients(arguments("spmm", pattern, 6), (0, 3))
    weight, x = torch.ones(7, 5, requires_grad=True), torch.ones(6, 5, requires_grad=True)
    ours, theirs = MacCounter(), MacCounter()
    for counter, run in ((ours, lambda: ops.spmm(*args)), (theirs, lambda: x @ weight.t())):
        with counter.phase("forward"):
            out = run()
        with counter.phase("backward"):
            out.sum().backward()
    assert ours.macs == theirs.macs == {"forward": 210, "backward": 420}


def test_all_narrow_widths_share_one_column_type() -> None:
    """The tests above compile few kernels because of this."""
    assert {Pattern.from_mask(torch.ones(1, w)).col.dtype for w in NARROW_WIDTHS} == {torch.uint8}


# ---------------------------------------------------------------- two ways to one implementation


def test_direct_path_is_for_plain_eager_code_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes, autocast and subclasses need torch's dispatcher; both ways give the same."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    pattern = Pattern.random((9, 14), 0.4, generator=torch.Generator().manual_seed(0))
    args = with_gradients(arguments("spmm", pattern, 6, torch.float32), (0, 3))
    direct = ops.spmm(*args)
    assert type(direct.grad_fn).__name__ == "spmmBackward"
    with Mode():
        dispatched = ops.spmm(*args)
        dispatched.sum().backward()
    assert {torch.ops.sparsecore.spmm.default, torch.ops.sparsecore.sddmm.default} <= set(seen)
    assert torch.equal(direct, dispatched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.spmm(args[0], *args[1:3], args[3].bfloat16()).dtype == torch.float32
    with torch.no_grad():
        assert ops.spmm(*args).grad_fn is None


def test_operators_are_traced_by_torch_compile() -> None:
    pattern = Pattern.random((9, 14), 0.4, generator=torch.Generator().manual_seed(0))
    args = arguments("spmm", pattern, 6)
    for index in ([pattern.crow, pattern.col], [encode(pattern.crow, pattern.col, 14), None]):
        values, x = with_gradients([args[0], args[3]], (0, 1))
        bias = torch.randn(9, dtype=torch.float64, requires_grad=True)

        def loss(values: Tensor, x: Tensor, bias: Tensor, index: Any = index) -> Tensor:
            return ops.spmm(values, *index, x, bias).square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(values, x, bias), (values, x, bias))
        for ours, right in zip(
            got, torch.autograd.grad(loss(values, x, bias), (values, x, bias)), strict=True
        ):
            close(ours, right)


@every_backend
def test_bias_is_added_and_differentiated(backend: str) -> None:
    pattern = Pattern.random((9, 14), 0.4, generator=torch.Generator().manual_seed(0))
    values, x = arguments("spmm", pattern, 6)[0], torch.randn(6, 14, dtype=torch.float64)
    inputs = with_gradients([values, x, torch.randn(9, dtype=torch.float64)], (0, 1, 2))

    def run(values: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return ops.spmm(values, pattern.crow, pattern.col, x, bias)

    with sparsecore.backend(backend):
        close(run(*inputs), ops.spmm(values, pattern.crow, pattern.col, x) + inputs[2])
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


@every_backend
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("in_bags", [False, True])
def test_opcheck_of_sparse_gradients(backend: str, encoding: str, in_bags: bool) -> None:
    """Not differentiable, and its results' length is known only when it has run: not among the operators above."""
    table = sparsecore.SparseEmbedding(12, 5, density=0.4)
    table.set_encoding(encoding)
    ids, grad = torch.tensor([3, 0, 3, 7]), torch.randn(2 if in_bags else 4, 5)
    bags = (torch.tensor([0, 0, 1, 1]), torch.randn(4)) if in_bags else ()
    with sparsecore.backend(backend):
        torch.library.opcheck(ops.touched.op, (*table.index, ids, grad, table.nnz, *bags))


def test_no_operator_was_forgotten() -> None:
    """Each of sparsecore's is among those above, or has an opcheck of its own: in the named file."""
    elsewhere = {
        "touched": "test_ops.py",
        "gather_dot": "test_gather_dot.py",
        "score_topk": "test_topk.py",
    }
    for name, file in elsewhere.items():
        assert f"opcheck(ops.{name}" in (Path(__file__).parent / file).read_text(), name
    registered = {
        name.removeprefix("sparsecore::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("sparsecore::")
    }
    assert registered == {operator.name for operator in OPERATORS} | set(elsewhere)
