"""SparseConv2d against torch's convolution: outputs, gradients, growth scores, conversion, counts, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BACKENDS, DTYPES, seeds
from torch import Tensor, nn

import sparsecore
from sparsecore import (
    ConversionError,
    DensityError,
    DynamicSparsity,
    MacCounter,
    MaskedSparsity,
    PatternError,
    SparseBias,
    SparseConv2d,
    SparsecoreError,
    SparseModule,
    densify,
    explain,
    masks_of,
    resident_bytes,
    sparsify,
)
from sparsecore.nn.patches import Windows
from sparsecore.topology.use import Recorder

pytestmark = pytest.mark.feature("convolutions")

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(a: Tensor, b: Tensor) -> None:
    tolerance = 1e-11 if a.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def at_nonzeros(layer: SparseModule, gradient: Tensor) -> Tensor:
    return gradient.reshape(-1)[layer.pattern.positions()]


# ---------------------------------------------------------------- against torch

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's, of its own convolution
@settings(deadline=None)
@given(
    kernel=pairs, stride=pairs, dilation=pairs,
    padding=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])),
    disjoint=st.booleans(), extra=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    channels=st.tuples(st.integers(1, 3), st.integers(2, 4)), batch=st.integers(0, 3), last=st.booleans(),
    bias=st.sampled_from([False, True, 0.5]), density=st.sampled_from([0.3, 0.7, 1.0]),
    backend=st.sampled_from(BACKENDS), seed=seeds,
)  # fmt: skip
def test_equals_torch(
    kernel, stride, dilation, padding, disjoint, extra, channels, batch, last, bias, density, backend, seed
):  # type: ignore[no-untyped-def]
    """Kernel equal to stride (windows side by side) half of the time, and both memory formats."""
    if disjoint:
        stride, dilation = kernel, (1, 1)
    if padding == "same":
        stride = (1, 1)
    generator = seeded(seed)
    density = max(density, 1 / (channels[0] * channels[1] * kernel[0] * kernel[1]))
    layer = SparseConv2d(
        *channels, kernel, stride, padding, dilation, bias=bool(bias), dtype=torch.float64, density=density,
        bias_density=bias if bias == 0.5 else None, generator=generator,
    )  # fmt: skip
    dense = layer.to_dense()
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    shape = (batch, channels[0], spans[0] + extra[0], spans[1] + extra[1])
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    z = x.detach().clone().requires_grad_()
    theirs = F.conv2d(z, dense.weight, dense.bias, stride, padding, dilation)
    with sparsecore.backend(backend):
        ours = layer(x)
        close(ours, theirs)
        weights = torch.randn(theirs.shape, dtype=torch.float64, generator=generator)
        (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    close(x.grad, z.grad)
    close(layer.values.grad, at_nonzeros(layer, dense.weight.grad))
    if bias == 0.5:
        close(layer.bias.values.grad, at_nonzeros(layer.bias, dense.bias.grad))
    elif bias:
        close(layer.bias.grad, dense.bias.grad)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_input_without_a_batch_dimension(backend: str, dtype: torch.dtype) -> None:
    layer = SparseConv2d(2, 3, 2, density=0.5, dtype=dtype, generator=seeded())
    x = torch.randn(2, 5, 4, dtype=dtype, generator=seeded(1))
    with sparsecore.backend(backend):
        close(layer(x), layer.to_dense()(x))


def test_output_is_in_channels_last_format() -> None:
    out = SparseConv2d(2, 3, 2, density=0.5)(torch.randn(2, 2, 5, 4))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_a_kernel_of_one_reads_its_input_in_place() -> None:
    x = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    rows = Windows.of(1, 1, 0, 1).rows(x)
    assert rows.data_ptr() == x.data_ptr()
    assert rows.shape == (24, 5)


@every_backend
@pytest.mark.parametrize(
    "options", [(2, 2), (3, 1, 1), (2, 1, "same", 2)], ids=["disjoint", "overlapping", "dilated"]
)
def test_gradcheck(backend: str, options: tuple) -> None:
    layer = SparseConv2d(2, 3, *options, density=0.5, dtype=torch.float64, generator=seeded())
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, generator=seeded(1), requires_grad=True)

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in (layer.values, layer.bias)))
    with sparsecore.backend(backend):
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


@every_backend
def test_opcheck(backend: str) -> None:
    """Of the product that a convolution is."""
    layer = SparseConv2d(3, 4, 2, density=0.5, generator=seeded())
    rows = layer.windows.rows(torch.randn(2, 3, 4, 4)).requires_grad_()
    arguments = (layer.values, *layer.index, rows, layer.bias)
    with sparsecore.backend(backend):
        torch.library.opcheck(sparsecore.ops.spmm.op, arguments)


def test_compiled_graph_is_whole() -> None:
    layer = SparseConv2d(3, 4, 2, 2, density=0.5, generator=seeded())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 4, 4)
    close(compiled(x), layer(x))


@every_backend
def test_expand_is_the_dense_weight_with_its_gradient(backend: str) -> None:
    layer = SparseConv2d(2, 3, (2, 1), density=0.5, dtype=torch.float64, generator=seeded())
    with sparsecore.backend(backend):
        weight = layer.expand()
        assert torch.equal(weight, layer.to_dense().weight)
        factor = torch.randn(weight.shape, dtype=torch.float64, generator=seeded(1))
        (weight * factor).sum().backward()
    close(layer.values.grad, at_nonzeros(layer, factor))  # type: ignore[arg-type]


def test_initial_values_follow_torch() -> None:
    layer = SparseConv2d(25, 400, 2, density=0.5, generator=seeded())
    assert float(layer.values.detach().abs().max()) <= 0.1
    assert float(layer.values.detach().std()) == pytest.approx(0.1 / 3**0.5, rel=0.03)
    assert float(layer.bias.detach().abs().max()) <= 0.1  # type: ignore[arg-type, union-attr]
    again, other = (SparseConv2d(25, 400, 2, density=0.5, generator=seeded(s)) for s in (0, 1))
    assert torch.equal(layer.values, again.values)
    assert torch.equal(layer.pattern.positions(), again.pattern.positions())
    assert not torch.equal(layer.values, other.values)


# ---------------------------------------------------------------- growth scores


@every_backend
@pytest.mark.parametrize("options", [(2, 2), (3, 1, 1)], ids=["disjoint", "overlapping"])
def test_recorded_uses_give_the_gradient_of_the_dense_weight(backend: str, options: tuple) -> None:
    layer = SparseConv2d(2, 5, *options, density=0.4, dtype=torch.float64, generator=seeded())
    dense = layer.to_dense()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=seeded(1))
    layer._recorder = Recorder(layer.values, layer.index, layer.shape)
    with sparsecore.backend(backend):
        out = layer(x)
        loss = out.square().sum() + (layer.expand().sin()).sum() + 3 * layer.values.square().sum()
        loss.backward()
        plain = dense(x).square().sum() + dense.weight.sin().sum() + 3 * dense.weight.square().sum()
        plain.backward()
        close(loss, plain)
        close(layer.values.grad, at_nonzeros(layer, dense.weight.grad))
        expected = dense.weight.grad.view(5, -1)  # type: ignore[union-attr]
        close(layer._recorder.block(slice(0, 5)), expected)
        close(layer._recorder.block(torch.tensor([1, 4])), expected[[1, 4]])


class Net(nn.Module):
    """Convolutions of several kinds, one used twice, and a linear head."""

    def __init__(self, density: float) -> None:
        super().__init__()
        g = seeded(3)
        self.first = SparseConv2d(1, 4, 2, 2, density=density, generator=g)
        self.twice = SparseConv2d(4, 4, 3, padding="same", density=density, bias_density=0.5, generator=g)
        self.last = SparseConv2d(4, 3, 2, 2, bias=False, density=density, generator=g)
        self.head = sparsecore.SparseLinear(3, 2, density=0.7, generator=g)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(self.last(x).mean((2, 3)))


@every_backend
@pytest.mark.parametrize("grow", ["gradient", "random"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_masked_equals_sparse(backend: str, grow: str, last: bool) -> None:
    """Every index set and value, over explorations, with a penalty on the weights, whatever the memory format."""
    sparse = Net(0.4).double()
    dense = densify(copy.deepcopy(sparse))
    if last:
        dense = dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    masks = masks_of(sparse)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
        "first.weight": (4, 1, 2, 2), "twice.weight": (4, 4, 3, 3), "twice.bias": (4,),
        "last.weight": (3, 4, 2, 2), "head.weight": (2, 3),
    }  # fmt: skip
    x = torch.randn(5, 8, 1, 8, 8, dtype=torch.float64, generator=seeded(1))
    y = torch.randn(5, 8, 2, dtype=torch.float64, generator=seeded(2))
    models = (sparse, dense)
    optimizers = [torch.optim.Adagrad(m.parameters(), lr=0.05) for m in models]
    options = {"interval": 4, "total_steps": 40, "grow": grow}
    explorers = (
        DynamicSparsity(sparse, optimizers[0], generator=seeded(5), **options),  # type: ignore[arg-type]
        MaskedSparsity(dense, optimizers[1], masks, generator=seeded(5), **options),  # type: ignore[arg-type]
    )
    moved = 0
    with sparsecore.backend(backend):
        for step in range(40):
            reports = []
            for model, optimizer, explorer in zip(models, optimizers, explorers, strict=True):
                optimizer.zero_grad()
                penalty = sum(
                    sparsecore.weight_parameter(model.get_submodule(n)).square().sum()
                    for n in ("first", "twice", "head")
                )
                ((model(x[step % 5]) - y[step % 5]).square().sum() + 0.1 * penalty).backward()  # type: ignore[operator]
                optimizer.step()
                reports.append(explorer.step())
            for name, module in sparse.named_modules():
                if isinstance(module, SparseModule):
                    module.check_invariants()
                    key = name if isinstance(module, SparseBias) else f"{name}.weight"
                    mask = explorers[1].masks[key].view(module.shape)
                    assert torch.equal(module.pattern.to_mask(), mask), (step, name)
                    weight = dense.get_parameter(key).detach().reshape(module.shape)
                    torch.testing.assert_close(module.values.detach(), weight[mask], rtol=1e-9, atol=1e-13)
                    assert not weight[~mask].any()
            if reports[0] is not None:
                assert reports[0].grown == reports[1].grown
                moved += reports[0].grown - reports[0].regrown
    assert moved > 50


def test_masks_are_drawn_for_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(2, 5, 2), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 4))
    optimizer = torch.optim.Adam(model.parameters())
    masked = MaskedSparsity(model, optimizer, density=0.25, total_steps=10, generator=seeded())
    assert {name: (tuple(m.shape), int(m.sum())) for name, m in masked.masks.items()} == {
        "0.weight": ((5, 2, 2, 2), 10),
        "3.weight": ((4, 20), 20),
    }
    pattern = sparsecore.Pattern.random((5, 8), 0.25, generator=seeded())
    assert torch.equal(masked.masks["0.weight"], pattern.to_mask().view(5, 2, 2, 2))


# ---------------------------------------------------------------- conversion


def conv(**options: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, **{"kernel_size": (2, 3), **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"bias": False}, {"stride": (1, 2)}, {"padding": (2, 1)}, {"padding": "same"}, {"padding": "valid"},
        {"dilation": (2, 1)}, {"dtype": torch.float64},
    ],
)  # fmt: skip
def test_round_trip_at_full_density_is_exact(options: dict[str, object]) -> None:
    dense = conv(**options).eval()
    back = SparseConv2d.from_dense(dense, density=1.0).to_dense()
    assert repr(back) == repr(dense)
    assert not back.training
    assert back.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(back.state_dict()[key], t) for key, t in dense.state_dict().items())


def test_from_dense_keeps_the_largest_magnitudes_or_a_mask() -> None:
    dense = conv()
    sparse = SparseConv2d.from_dense(dense, density=0.25, bias_density=0.5)
    assert sparse.nnz == 18
    assert sparse.dense_shape == dense.weight.shape
    assert isinstance(sparse.bias, SparseBias)
    kept = sparse.pattern.to_mask().view(dense.weight.shape)
    assert dense.weight[kept].abs().min() > dense.weight[~kept].abs().max()
    mask = torch.rand(dense.weight.shape, generator=seeded()) < 0.5
    for form in (mask, mask.view(4, -1)):
        masked = SparseConv2d.from_dense(dense, mask=form)
        assert torch.equal(masked.to_dense().weight, dense.weight * mask)
    frozen = SparseConv2d.from_dense(conv().requires_grad_(False), density=0.5)
    assert not any(p.requires_grad for p in [*frozen.parameters(), *frozen.to_dense().parameters()])


def test_from_dense_of_a_channels_last_weight() -> None:
    dense = conv().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert torch.equal(SparseConv2d.from_dense(dense, density=1.0).to_dense().weight, dense.weight)


def test_from_sparse() -> None:
    layer = SparseConv2d(3, 4, (2, 3), (1, 2), 1, density=0.4, generator=seeded())
    twin = SparseConv2d.from_sparse(layer.weight, (2, 3), (1, 2), 1, bias=layer.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 5, 6)
    assert torch.equal(twin(x), layer(x))
    assert repr(twin) == repr(layer)
    assert SparseConv2d.from_sparse(layer.weight, 3).in_channels == 2
    with pytest.raises(ConversionError, match=r"18 columns, which is no multiple of the kernel \(4, 4\)"):
        SparseConv2d.from_sparse(layer.weight, 4)
    with pytest.raises(ConversionError, match=r"bias must have shape \(4,\), got \(3,\)"):
        SparseConv2d.from_sparse(layer.weight, 3, bias=torch.ones(3))
    with pytest.raises(PatternError):
        SparseConv2d.from_sparse(torch.ones(2, 4), 2)


def image_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 2, 2), nn.Flatten(), nn.Linear(32, 5)
    )


@pytest.mark.parametrize("keep", ["random", "magnitude"])
def test_sparsify_and_densify_a_model(keep: str) -> None:
    model, dense = sparsify(image_model(), 0.4, keep=keep, bias_density=0.5), image_model()
    assert [type(m).__name__ for m in model if not isinstance(m, (nn.ReLU, nn.Flatten))] == [  # type: ignore[attr-defined]
        "SparseConv2d", "SparseConv2d", "SparseLinear",
    ]  # fmt: skip
    x = torch.randn(2, 3, 4, 4)
    expected, masks = model(x), masks_of(model)
    assert densify(model) is model
    close(model(x), expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name) * masks[name])
    torch.testing.assert_close(sparsify(image_model(), 1.0)(x), image_model()(x))


def test_erk_counts_the_kernel() -> None:
    model = sparsify(image_model(), 0.3, distribution="erk")
    shares = sparsecore.allocate([(8, 3, 3, 3), (8, 8, 2, 2), (5, 32)], 0.3, "erk")
    assert [model[i].density for i in (0, 2, 4)] == pytest.approx(shares, abs=0.005)  # type: ignore[index]


# ---------------------------------------------------------------- saving, counts


def test_state_dict_copies_and_types() -> None:
    layer = SparseConv2d(3, 4, 2, 2, density=0.5, bias_density=0.5, generator=seeded(1))
    x = torch.randn(2, 3, 4, 4)
    fresh = SparseConv2d(3, 4, 2, 2, density=0.5, bias_density=0.5, generator=seeded(2))
    fresh.load_state_dict(layer.state_dict(), strict=True)
    twin = copy.deepcopy(layer)
    for other in (fresh, twin):
        assert torch.equal(other(x), layer(x))
        assert other.values is not layer.values
    twin.set_encoding("csr")
    assert torch.equal(twin.to_dense().weight, layer.to_dense().weight)
    close(twin.double()(x.double()).float(), layer(x))
    with pytest.raises(RuntimeError, match="expected nnz = 24 values, got 12"):
        layer.load_state_dict(SparseConv2d(3, 4, 2, 2, density=0.25, bias_density=0.5).state_dict())
    half = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), layer(x), rtol=0.02, atol=0.02)


def test_autocast_computes_in_float32() -> None:
    layer = SparseConv2d(3, 4, 2, 2, density=0.5, generator=seeded(1))
    x = torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.bfloat16())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, layer(x), rtol=0.02, atol=0.02)


def test_counts_and_explanation() -> None:
    layer = SparseConv2d(3, 4, 2, 2, density=0.5, generator=seeded(1))
    layer.set_encoding("csr")
    counter = MacCounter()
    x = torch.randn(5, 3, 6, 6, requires_grad=True)
    with counter.phase("forward"):
        out = layer(x)
    with counter.phase("backward"):
        out.sum().backward()
    assert counter.macs == {"forward": 5 * 9 * 24, "backward": 2 * 5 * 9 * 24}
    dense = MacCounter()
    with dense.phase("forward"):
        layer.to_dense()(x)
    assert dense.macs["forward"] == 2 * counter.macs["forward"]
    counted = resident_bytes(layer)
    assert (counted.weights, counted.gradients) == (4 * (24 + 4), 4 * (24 + 4))
    assert counted.indices == 4 * 5 + 24
    (line,) = explain(layer).layers
    assert (line.kind, line.shape, line.nnz, line.dense_bytes) == ("SparseConv2d", (4, 12), 24, 4 * 48)
    assert repr(layer) == "SparseConv2d(3, 4, kernel_size=(2, 2), stride=(2, 2), nnz=24, density=0.5)"
    assert "padding='same', dilation=(2, 2), bias=False" in repr(
        SparseConv2d(3, 4, 2, 1, "same", 2, bias=False, density=0.5)
    )


# ---------------------------------------------------------------- wrong input

wrong: list[tuple[type[Exception], Callable[[], object], str]] = [
    (SparsecoreError, lambda: SparseConv2d(4, 4, 2, groups=2, density=0.5), "no groups, got groups=2"),
    (
        SparsecoreError,
        lambda: SparseConv2d(4, 4, 2, padding_mode="reflect", density=0.5),
        "pads with zeros only, got padding_mode='reflect'",
    ),
    (ConversionError, lambda: sparsify(nn.Conv2d(4, 4, 2, groups=2), 0.5), "the model: .* no groups"),
    (
        ConversionError,
        lambda: SparseConv2d.from_dense(nn.ReLU(), density=0.5),
        "needs an nn.Conv2d, got ReLU",
    ),  # type: ignore[arg-type]
    (
        ConversionError,
        lambda: SparseConv2d.from_dense(nn.Conv2d(2, 3, 2), mask=torch.ones(3, 2)),
        r"mask must have the weight's shape \(3, 8\), got \(3, 2\)",
    ),
    (
        SparsecoreError,
        lambda: SparseConv2d(4, 4, 0, density=0.5),
        "kernel_size must be an integer of at least 1",
    ),
    (SparsecoreError, lambda: SparseConv2d(4, 4, 2, (1, 0), density=0.5), r"stride must be .* got \(1, 0\)"),
    (SparsecoreError, lambda: SparseConv2d(4, 4, 2, 1, -1, density=0.5), "padding must be .* got -1"),
    (SparsecoreError, lambda: SparseConv2d(4, 4, 2, 1, "full", density=0.5), "'same' or 'valid', got 'full'"),
    (SparsecoreError, lambda: SparseConv2d(4, 4, 2, 2, "same", density=0.5), r"needs stride 1, got \(2, 2\)"),
    (DensityError, lambda: SparseConv2d(4, 4, 2, density=0.0), "density"),
    (
        SparsecoreError,
        lambda: SparseConv2d(4, 4, 2, density=0.5)(torch.ones(2, 3, 5, 5)),
        r"expected input of shape \(B, 4, H, W\) or \(4, H, W\), got \(2, 3, 5, 5\)",
    ),
    (SparsecoreError, lambda: SparseConv2d(4, 4, 2, density=0.5)(torch.ones(4, 4)), r"got \(4, 4\)"),
    (
        SparsecoreError,
        lambda: SparseConv2d(4, 4, 3, dilation=2, padding=1, density=0.5)(torch.ones(2, 4, 2, 9)),
        r"input of 2 x 9 \(padded: 4 x 11\) is smaller than the kernel, which spans 5 x 5",
    ),
    (
        SparsecoreError,
        lambda: SparseConv2d(4, 4, 2, density=0.5)(torch.ones(1, 4, 4, 4).double()),
        "one floating-point type",
    ),
]


@pytest.mark.parametrize(("error", "call", "message"), wrong, ids=[str(n) for n in range(len(wrong))])
def test_refuses(error: type[Exception], call: Callable[[], object], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
