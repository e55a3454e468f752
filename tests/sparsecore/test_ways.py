"""Whichever way a product goes, and with two threads: derivatives, and training equals masked dense training.

The problems of other tests are so small that most ways are never chosen for them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from strategies import misaligned, of_numba, values_for
from test_ops import INDEX_AT, OPERATORS, Operator, arguments, as_bitmap, with_gradients
from test_parity import OPTIMIZERS, dense_twin, train_both
from torch import Tensor, nn
from ways import CASES, WAYS, take, went

from sparsecore import Pattern, SparseLinear
from sparsecore.backends.numba import few_one, jit, linear, turned_spmm_t, turning
from sparsecore.encoding import encode, has_expand

pytestmark = of_numba

of_operators = pytest.mark.feature("operators: values, derivatives, torch.library.opcheck")
of_training = pytest.mark.feature("training and exploring equals masked dense training")
every_way = pytest.mark.parametrize(("way", "encoding"), CASES)
SHAPE = (37, 41)  # two blocks of 16 columns or rows, and a rest


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def n_threads(request: pytest.FixtureRequest, vectors: None, monkeypatch: pytest.MonkeyPatch) -> int:
    torch.set_num_threads(request.param)  # put back by the fixture of conftest.py
    monkeypatch.setattr(jit, "_SERIAL_WORK", 0)
    return request.param


def check_derivatives(operator: Operator, encoding: str, batch: int) -> None:
    """First and second, in directions that are random: as much as there is to compute takes a few calls so."""
    torch.manual_seed(0)
    pattern = Pattern.random(SHAPE, 0.4, generator=torch.Generator().manual_seed(1))
    args = arguments(operator.name, pattern, batch)
    args = with_gradients(
        as_bitmap(operator.name, args) if encoding == "bitmap" else args, operator.differentiable
    )
    assert torch.autograd.gradcheck(operator.run, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(operator.run, args, fast_mode=True)


@of_operators
@every_way
def test_derivatives_of_each_way(
    way: str, encoding: str, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = take(way, monkeypatch)
    (product,) = (
        operator for operator in OPERATORS if operator.name == "spmm"
    )  # whose derivatives are the others
    check_derivatives(product, encoding, WAYS[way][1])
    assert used == went(way)


@of_operators
@pytest.mark.parametrize(
    ("operator", "encoding"),
    [(o, e) for o in OPERATORS for e in ("csr", "bitmap") if e == "csr" or o.name in INDEX_AT],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_derivatives_with_two_threads(operator: Operator, encoding: str, two_threads: set[str]) -> None:
    check_derivatives(operator, encoding, 20)
    assert two_threads


def layers(density: float, encoding: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> nn.Module:
    """Two layers: the second one's gradient in its input is taken."""
    generator = torch.Generator().manual_seed(3)
    made = nn.Sequential(
        SparseLinear(sizes[0], sizes[1], density=density, generator=generator),
        nn.Tanh(),
        SparseLinear(sizes[1], sizes[2], density=density, generator=generator),
    ).to(dtype)
    for layer in (made[0], made[2]):
        layer.set_encoding(encoding)
    return made


@of_training
@every_way
def test_training_by_each_way(
    way: str, encoding: str, vectors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = take(way, monkeypatch)
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(3, WAYS[way][1], 41, generator=draws, dtype=torch.float64)
    target = torch.randn(3, WAYS[way][1], 35, generator=draws, dtype=torch.float64)
    exchanged = train_both(
        lambda: layers(0.3, encoding, torch.float64, (41, 37, 35)),
        lambda model, step: (model(x[step % 3]) - target[step % 3]).square().mean(),
        OPTIMIZERS["adam"],
        steps=24,
        interval=6,
    )
    assert used == went(way)
    assert exchanged > 200


def gradients_in_float32(density: float, encoding: str, batch: int) -> None:
    """Of one step, beside the dense weights' in float64: what rounding would decide of an exploration is not asked."""
    x = torch.randn(batch, 90, generator=torch.Generator().manual_seed(1))

    def build() -> nn.Module:
        return layers(density, encoding, torch.float32, (90, 65, 150))

    sparse, (dense, masks) = build(), dense_twin(build)
    dense = dense.double()
    for model, given in ((sparse, x), (dense, x.double())):
        model(given).square().mean().backward()
    for name, parameter in dense.named_parameters():
        part, _, kind = name.rpartition(".")
        layer: Any = sparse.get_submodule(part)
        found, expected = (
            (layer.values.grad, parameter.grad[masks[name]])
            if kind == "weight"
            else (layer.bias.grad, parameter.grad)
        )
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


@of_training
@every_way
def test_gradients_in_float32_by_each_way(
    way: str, encoding: str, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = take(way, monkeypatch)
    gradients_in_float32(0.3, encoding, WAYS[way][1])
    assert used == went(way)


OPERANDS = ("values", "index", "activations")


@every_way
@pytest.mark.parametrize("cols", [41, 300, 33_000])  # stored as uint8, int16, int32
def test_memory_that_begins_behind_a_cache_line(
    way: str, encoding: str, cols: int, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operand alone, and all of them, to the same bits."""
    used = take(way, monkeypatch)
    generator = torch.Generator().manual_seed(cols)
    pattern = Pattern.random((37, cols), 0.4 if cols < 1000 else 0.02, generator=generator)
    values = values_for(pattern, dtype=torch.float32)
    batch = WAYS[way][1] if way != "lanes" or cols < 1000 else 3  # their scratch is bounded
    x = torch.randn(batch, cols, generator=generator)
    dy = torch.randn(batch, 37, generator=generator)
    crow, col = pattern.crow, pattern.col
    index = (crow, col) if encoding == "csr" else (encode(crow, col, cols),)

    def products(*changed: str) -> list[Tensor]:
        def operand(name: str, t: Tensor) -> Tensor:
            return misaligned(t) if name in changed else t

        crow, col = (*(operand("index", t) for t in index), None)[:2]
        v = operand("values", values)
        return [
            linear.spmm(v, crow, col, operand("activations", x)),
            linear.spmm_t(v, crow, col, operand("activations", dy), cols),
            linear.sddmm(crow, col, operand("activations", dy), operand("activations", x), pattern.nnz),
        ]

    weight, aligned = pattern.to_dense(values), products()
    expected = (x @ weight.t(), dy @ weight, (dy.t() @ x)[pattern.to_mask()])
    for found, right in zip(aligned, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    for changed in (*((name,) for name in OPERANDS), OPERANDS):
        for found, right in zip(products(*changed), aligned, strict=True):
            assert torch.equal(found, right)
    assert used == went(way)


@of_training
def test_gradients_by_a_weight_that_is_turned_in_blocks(
    n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a float32 weight in a bitmap is where there is AVX-512: chunks of 32 rows, all but the last."""
    if not has_expand():
        pytest.skip("blocks are turned with AVX-512 alone")
    listed = []
    workspace = turning.workspace

    def poisoned(name: str, n_chunks: int, size: int, dtype: torch.dtype) -> np.ndarray:
        scratch = workspace(name, n_chunks, size, dtype)
        if name == "listed":
            scratch[:] = np.nan
            listed.append(scratch)
        return scratch

    monkeypatch.setattr(turning, "workspace", poisoned)
    monkeypatch.setattr(turned_spmm_t, "block_of", lambda *args: 32)
    assert linear._turns(40, int(0.3 * 150 * 65), (150, 65), None, torch.float32)
    gradients_in_float32(0.3, "bitmap", 40)
    assert not np.isnan(listed[-1]).all()


@of_training
@pytest.mark.parametrize(
    ("density", "form"), [(0.1, few_one._PICK_64), (0.3, few_one._PICK_32), (0.6, few_one._SPREAD)]
)
def test_gradients_of_one_example_in_every_form(
    density: float, form: tuple[np.int8, ...], n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations are picked where the processor can (AVX-512 VBMI2), else values are spread out at any density."""
    forms = []
    run = few_one._dot_rows
    monkeypatch.setattr(few_one, "_dot_rows", lambda *args: (forms.append(args[-2]), run(*args))[1])
    gradients_in_float32(density, "bitmap", 1)
    expected = form if few_one.can_pick(np.dtype(np.float32)) else few_one._SPREAD
    assert forms == [expected, expected]
