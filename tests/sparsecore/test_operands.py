"""What a sparse weight is used with: other devices, numbers that are not what lies in memory, and other transforms."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from strategies import of_numba
from torch import Tensor, nn

from sparsecore import SparseConv2d, SparsecoreError, SparseEmbedding, SparseLinear, optim
from sparsecore.nn import SparseBias

pytestmark = of_numba

# A layer for the small kernels, and one for the others.
SIZES = pytest.mark.parametrize("size", [8, 400])


@SIZES
@pytest.mark.parametrize(
    "use",
    [
        lambda n, on: SparseLinear(n, n, density=0.5)(torch.ones(16, n, **on)),
        lambda n, on: SparseEmbedding(n, 64, density=0.5)(torch.zeros(n, dtype=torch.int64, **on)),
        lambda n, on: SparseEmbedding(n, 64, density=0.5, sparse=True)(
            torch.zeros(n, dtype=torch.int64, **on)
        ),
        lambda n, on: SparseBias(n, density=0.5)(torch.ones(16, n, **on)),
        lambda n, on: SparseConv2d(1, n, 2, density=0.5)(torch.ones(1, 1, 9, 9, **on)),
    ],
    ids=["linear", "embedding", "embedding, sparse gradient", "bias", "convolution"],
)
def test_another_device_is_refused(use: Callable[..., Tensor], size: int) -> None:
    with pytest.raises(SparsecoreError, match="on the CPU, what it is used with on meta"):
        use(size, {"device": "meta"})


@SIZES
@pytest.mark.parametrize("sparse", [False, True])
def test_a_default_device_does_not_move_results(size: int, sparse: bool) -> None:
    table = SparseEmbedding(size, 64, density=0.5, sparse=sparse)
    layer = SparseLinear(64, size, density=0.5)
    optimizer = optim.SGD([*table.parameters(), *layer.parameters()], lr=0.1)
    ids, x = torch.arange(size), torch.randn(16, 64)
    before = table.to_dense().weight.clone()
    with torch.device("meta"):
        rows, y = table(ids), layer(x)
        (rows.sum() + y.sum()).backward()
        optimizer.step()
    assert rows.is_cpu
    assert y.is_cpu
    assert torch.equal(rows, before)
    torch.testing.assert_close(y, layer.to_dense()(x) + 0.1 * y_gain(layer, x))


def y_gain(layer: SparseLinear, x: Tensor) -> Tensor:
    """What one step of SGD with rate 1 on the sum of outputs took from the outputs."""
    gained = nn.functional.linear(x, layer.pattern.to_mask() * x.sum(0))
    return gained + len(x)


@SIZES
def test_signs_that_torch_left_for_later(size: int) -> None:
    layer, x = SparseLinear(64, size, density=0.5, bias=False), torch.randn(16, 64)
    assert torch.equal(layer(torch._neg_view(x)), -layer(x))
    assert not layer(torch._efficientzerotensor(16, 64)).any()
    dense = layer.to_dense()
    for module in (layer, dense):
        y = module(x)
        (torch.complex(torch.ones_like(y), y).conj() * (2 + 3j)).real.sum().backward()
    expected = dense.weight.grad[layer.pattern.to_mask()]
    torch.testing.assert_close(layer.values.grad, expected)


@SIZES
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_by_torch_jit(size: int) -> None:
    layer, x = SparseLinear(64, size, density=0.5), torch.randn(16, 64)
    traced = torch.jit.trace(layer, x)
    assert "sparsecore::spmm" in str(traced.inlined_graph)
    other = torch.randn(16, 64)
    torch.testing.assert_close(traced(other), layer(other))


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_refused_not_dropped(grad: bool) -> None:
    layer = SparseLinear(64, 8, density=0.5).requires_grad_(grad)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(2, 64), torch.ones(2, 64))
        with pytest.raises(NotImplementedError, match="jvp"):
            layer(x)
        assert layer(torch.ones(2, 64)).shape == (2, 8)


@pytest.mark.parametrize("in_backward", [False, True])
def test_moments_of_another_type_are_torchs_to_refuse(in_backward: bool) -> None:
    table = SparseEmbedding(50, 8, density=0.5, sparse=True)
    optimizer = optim.Adam(table.parameters(), in_backward=in_backward)

    def step() -> None:
        table(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    table.double()
    with pytest.raises(RuntimeError, match="dtype"):
        step()


def test_results_stay_apart_where_a_tracer_reads_frames() -> None:
    """A look at a frame's names counts as one more reference to what they name."""
    code = """
import sys
sys.setprofile(lambda frame, *_: frame.f_locals)
import sparsecore.backends.numba.memory
sys.setprofile(None)
import torch, sparsecore
layer = sparsecore.SparseLinear(100, 2000, density=0.1, bias=False)
with torch.no_grad():
    first = layer(torch.ones(2000, 100))
    copy = first.clone()
    layer(-torch.ones(2000, 100))
assert torch.equal(first, copy)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
