"""Modules against their dense torch counterparts: outputs, gradients, saving, copying, errors."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BACKENDS, DTYPES, masks, seeds
from torch import Tensor, nn

import sparsecore
from sparsecore import (
    ConversionError,
    DensityError,
    PatternError,
    SparseBias,
    SparseConv2d,
    SparsecoreError,
    SparseEmbedding,
    SparseEmbeddingBag,
    SparseLinear,
    SparseModule,
    weight_parameter,
)
from sparsecore.encoding import ENCODINGS, encode
from sparsecore.topology.accumulate import RowAccumulator
from sparsecore.topology.use import Recorder

pytestmark = pytest.mark.feature("layers")

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def modules() -> list[SparseModule]:
    """One of each kind, 8 rows or features."""
    return [
        SparseLinear(8, 6, density=0.4, generator=seeded(1)),
        SparseLinear(8, 6, density=0.4, bias_density=0.5, generator=seeded(2)),
        SparseEmbedding(8, 5, padding_idx=3, density=0.4, generator=seeded(3)),
        SparseEmbeddingBag(8, 5, density=0.4, generator=seeded(4)),
        SparseBias(8, density=0.5, generator=seeded(5)),
        SparseConv2d(2, 4, 2, density=0.4, bias_density=0.5, generator=seeded(6)),
    ]


every_module = pytest.mark.parametrize(
    "module", modules(), ids=["linear", "linear-sparse-bias", "embedding", "bag", "bias", "conv"]
)


def run(module: SparseModule) -> Tensor:
    if isinstance(module, (SparseLinear, SparseBias)):
        x = torch.randn(3, 8, generator=seeded(), dtype=torch.float64)
        return module(x.to(module.values.dtype))
    if isinstance(module, SparseConv2d):
        return module(
            torch.randn(3, 2, 4, 3, generator=seeded(), dtype=torch.float64).to(module.values.dtype)
        )
    ids = torch.tensor([[0, 7, 3], [3, 2, 2]])
    return module(ids)


def at_nonzeros(module: SparseModule, gradient: Tensor) -> Tensor:
    return gradient.reshape(-1)[module.pattern.positions()]


def close(a: Tensor, b: Tensor) -> None:
    tolerance = 1e-11 if a.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- against torch


@given(masks(max_rows=9), st.integers(0, 5), st.sampled_from(BACKENDS), st.booleans(), seeds)
def test_linear_equals_torch(mask: Tensor, batch: int, backend: str, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    rows, cols = mask.shape
    dense = nn.Linear(cols, rows, bias=bias, dtype=torch.float64)
    sparse = SparseLinear.from_dense(dense, mask=mask)
    with torch.no_grad():
        dense.weight.mul_(mask)
    x = torch.randn(2, batch, cols, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    with sparsecore.backend(backend):
        ours, theirs = sparse(x), dense(z)
        close(ours, theirs)
        weights = torch.randn_like(theirs)
        (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert x.grad is not None
    assert z.grad is not None
    close(x.grad, z.grad)
    close(sparse.values.grad, at_nonzeros(sparse, dense.weight.grad))  # type: ignore[arg-type]
    if bias:
        close(sparse.bias.grad, dense.bias.grad)  # type: ignore[arg-type, union-attr]


@every_backend
@every_dtype
@pytest.mark.parametrize("shape", [(5,), (1, 5), (0, 5), (2, 3, 5), (2, 0, 3, 5), (64, 5)])
def test_linear_input_of_any_rank(shape: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    layer = SparseLinear(5, 4, density=0.5, dtype=dtype, generator=seeded())
    x = torch.randn(shape, dtype=dtype)
    with sparsecore.backend(backend):
        close(layer(x), layer.to_dense()(x))


@every_backend
def test_sparse_bias(backend: str) -> None:
    layer = SparseLinear(5, 9, density=0.5, bias_density=0.4, dtype=torch.float64, generator=seeded())
    assert isinstance(layer.bias, SparseBias)
    assert layer.bias.nnz == 4
    dense = layer.to_dense()
    assert int((dense.bias != 0).sum()) == 4
    x = torch.randn(3, 5, dtype=torch.float64)
    with sparsecore.backend(backend):
        out = layer(x)
        close(out, dense(x))
        out.pow(2).sum().backward()
    dense(x).pow(2).sum().backward()
    close(layer.bias.values.grad, at_nonzeros(layer.bias, dense.bias.grad))  # type: ignore[arg-type]


@every_backend
@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 5), (2, 3, 4)])
def test_embedding_equals_torch(backend: str, padding_idx: int | None, shape: tuple[int, ...]) -> None:
    sparse = SparseEmbedding(6, 5, padding_idx, density=0.5, dtype=torch.float64, generator=seeded())
    dense = sparse.to_dense()
    assert sparse.padding_idx == dense.padding_idx
    ids = torch.randint(6, shape, generator=seeded(1))
    with sparsecore.backend(backend):
        ours = sparse(ids)
        assert torch.equal(ours, dense(ids))
        weights = torch.randn_like(ours)
        (ours * weights).sum().backward()
    (dense(ids) * weights).sum().backward()
    close(sparse.values.grad, at_nonzeros(sparse, dense.weight.grad))  # type: ignore[arg-type]


@every_backend
@every_dtype
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_bag_equals_torch(
    backend: str, dtype: torch.dtype, padding_idx: int | None, weighted: bool, flat: bool
) -> None:
    sparse = SparseEmbeddingBag(6, 5, padding_idx, density=0.5, dtype=dtype, generator=seeded())
    dense = sparse.to_dense()
    ids = torch.tensor([0, 1, 2, 2, 5, 2, 2, 1] if flat else [[0, 1, 2, 2], [5, 2, 2, 1]])
    offsets = (
        torch.tensor([0, 3, 3, 8, 8]) if flat else None
    )  # an empty bag, one that ends with the ids, one behind
    weights = torch.randn(ids.shape, dtype=dtype, generator=seeded(7)).requires_grad_() if weighted else None
    copy_ = weights.detach().clone().requires_grad_() if weights is not None else None
    with sparsecore.backend(backend):
        ours = sparse(ids, offsets, weights)
        out_weights = torch.randn(ours.shape, dtype=dtype, generator=seeded(8))
        (ours * out_weights).sum().backward()
    theirs = dense(ids, offsets, copy_)
    close(ours, theirs)
    (theirs * out_weights).sum().backward()
    close(sparse.values.grad, at_nonzeros(sparse, dense.weight.grad))  # type: ignore[arg-type]
    if weights is not None:
        assert copy_ is not None
        close(weights.grad, copy_.grad)  # type: ignore[arg-type]


def test_int32_ids_give_the_same_rows() -> None:
    table = SparseEmbedding(6, 5, density=0.5, generator=seeded())
    ids = torch.tensor([5, 0, 0])
    assert torch.equal(table(ids.int()), table(ids))


@every_backend
@pytest.mark.parametrize("rows", [0, 3])
def test_no_bags_and_empty_bags(backend: str, rows: int) -> None:
    bag = SparseEmbeddingBag(6, 5, density=0.5, generator=seeded())
    empty = torch.empty(0, dtype=torch.int64)
    with sparsecore.backend(backend):
        out = bag(empty, torch.zeros(rows, dtype=torch.int64))
        assert torch.equal(out, torch.zeros(rows, 5))
        assert torch.equal(bag(torch.empty(rows, 0, dtype=torch.int64)), torch.zeros(rows, 5))
        out.sum().backward()
    assert not bag.values.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(SparseLinear, nn.Linear), (SparseEmbedding, nn.Embedding), (SparseConv2d, nn.Conv2d)],
    ids=["linear", "embedding", "conv"],
)
def test_signatures_mirror_torch(ours: type, theirs: type) -> None:
    """Our positional parameters are torch's, in torch's order with torch's defaults; what is ours is keyword-only."""
    mine, torchs = (inspect.signature(c.__init__).parameters for c in (ours, theirs))
    positional = [p for p in mine.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    shared = [p for p in torchs.values() if p.name in mine]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in shared]
    assert mine["density"].kind is inspect.Parameter.KEYWORD_ONLY
    forwards = [list(inspect.signature(c.forward).parameters) for c in (ours, theirs)]
    assert forwards[0] == forwards[1]


def test_bag_forward_mirrors_torch() -> None:
    ours, theirs = (
        list(inspect.signature(c.forward).parameters) for c in (SparseEmbeddingBag, nn.EmbeddingBag)
    )
    assert ours == theirs


def test_initial_values_follow_torch() -> None:
    layer = SparseLinear(100, 400, density=0.5, generator=seeded())
    assert float(layer.values.detach().abs().max()) <= 0.1
    assert float(layer.values.detach().std()) == pytest.approx(0.1 / 3**0.5, rel=0.03)
    assert float(layer.bias.detach().abs().max()) <= 0.1  # type: ignore[arg-type, union-attr]
    table = SparseEmbedding(400, 100, density=0.5, generator=seeded())
    assert float(table.values.detach().std()) == pytest.approx(1.0, rel=0.03)
    assert not SparseBias(10, density=0.5).values.any()


def test_generator_fixes_indices_and_values() -> None:
    for make in (
        lambda g: SparseLinear(8, 6, density=0.4, generator=g),
        lambda g: SparseEmbedding(8, 6, density=0.4, generator=g),
    ):
        a, b, c = (make(seeded(s)).state_dict() for s in (1, 1, 2))
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert not torch.equal(a["values"], c["values"])


# ---------------------------------------------------------------- what is stored


@every_module
def test_invariants_and_size(module: SparseModule) -> None:
    module.check_invariants()
    assert module.nnz == module.values.numel() == module.col_indices.numel()
    assert module.density == module.nnz / (module.shape[0] * module.shape[1])
    assert f"nnz={module.nnz}, density={module.density:.4g}" in module.extra_repr()
    assert module.extra_repr() in repr(module)


def test_exact_nnz() -> None:
    assert SparseLinear(30, 7, density=0.1).nnz == 21
    assert SparseEmbedding(30, 7, density=0.1).nnz == 21
    assert SparseEmbedding(3, 7, padding_idx=0, density=1.0).nnz == 14


def test_padding_row_is_never_stored() -> None:
    table = SparseEmbedding(5, 4, padding_idx=2, density=0.7, generator=seeded())
    assert table.crow_indices[2] == table.crow_indices[3]
    assert not table(torch.tensor([2])).any()
    assert table.padding_idx == 2
    damaged = copy.deepcopy(table)
    damaged.set_encoding("csr")
    damaged.crow_indices[3:] += 0
    damaged.crow_indices[2] -= 1
    with pytest.raises(PatternError, match="the padding row 2 must be empty"):
        damaged.check_invariants()


@every_module
def test_weight_is_a_view_on_the_values(module: SparseModule) -> None:
    module = copy.deepcopy(module)
    weight = module.weight
    assert weight.layout == torch.sparse_csr
    assert not weight.requires_grad
    assert weight.values().data_ptr() == module.values.data_ptr()
    with torch.no_grad():
        module.values.fill_(5)
    assert bool((weight.values() == 5).all())


def test_weight_parameter() -> None:
    sparse, dense = SparseLinear(4, 3, density=0.5), nn.Linear(4, 3)
    assert weight_parameter(sparse) is sparse.values
    assert weight_parameter(dense) is dense.weight
    for module in (nn.ReLU(), nn.LayerNorm(3, elementwise_affine=False)):
        with pytest.raises(ConversionError, match="has no weight parameter"):
            weight_parameter(module)


def test_repr() -> None:
    assert repr(SparseLinear(8, 6, density=0.5)) == (
        "SparseLinear(in_features=8, out_features=6, bias=True, nnz=24, density=0.5)"
    )
    assert repr(SparseEmbedding(8, 6, padding_idx=1, density=0.5)) == (
        "SparseEmbedding(8, 6, padding_idx=1, nnz=24, density=0.5)"
    )
    assert repr(SparseEmbeddingBag(8, 6, density=0.5)) == "SparseEmbeddingBag(8, 6, nnz=24, density=0.5)"
    assert repr(SparseBias(8, density=0.5)) == "SparseBias(features=8, nnz=4, density=0.5)"


# ---------------------------------------------------------------- dense and back


def make_dense(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return {
        "linear": lambda: nn.Linear(7, 5, dtype=dtype),
        "linear-no-bias": lambda: nn.Linear(7, 5, bias=False, dtype=dtype),
        "embedding": lambda: nn.Embedding(7, 5, dtype=dtype),
        "embedding-padding": lambda: nn.Embedding(7, 5, padding_idx=2, dtype=dtype),
        "bag": lambda: nn.EmbeddingBag(7, 5, mode="sum", padding_idx=1, dtype=dtype),
    }[kind]()


KINDS = ("linear", "linear-no-bias", "embedding", "embedding-padding", "bag")
SPARSE = {nn.Linear: SparseLinear, nn.Embedding: SparseEmbedding, nn.EmbeddingBag: SparseEmbeddingBag}


@pytest.mark.parametrize("kind", KINDS)
@every_dtype
def test_round_trip_at_full_density_is_exact(kind: str, dtype: torch.dtype) -> None:
    dense = make_dense(kind, dtype).eval()
    sparse = SPARSE[type(dense)].from_dense(dense, density=1.0)
    sparse.check_invariants()
    back = sparse.to_dense()
    assert type(back) is type(dense)
    assert not sparse.training
    assert not back.training
    assert back.state_dict().keys() == dense.state_dict().keys()
    for key, tensor in dense.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor)
        assert back.state_dict()[key].dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_keeps_the_largest_magnitudes(kind: str) -> None:
    dense = make_dense(kind)
    sparse = SPARSE[type(dense)].from_dense(dense, density=0.4)
    assert sparse.nnz == 14
    sparse.check_invariants()
    kept, weight = sparse.pattern.to_mask(), dense.weight.detach()
    assert weight[kept].abs().min() > weight[~kept].abs().max()
    assert torch.equal(sparse.to_dense().weight.detach(), weight * kept)


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_with_a_mask(kind: str) -> None:
    dense = make_dense(kind)
    mask = torch.rand(dense.weight.shape, generator=seeded()) < 0.5
    sparse = SPARSE[type(dense)].from_dense(dense, mask=mask)
    sparse.check_invariants()
    if getattr(dense, "padding_idx", None) is not None:
        mask[dense.padding_idx] = False
    assert torch.equal(sparse.pattern.to_mask(), mask)
    assert torch.equal(sparse.to_dense().weight.detach(), dense.weight.detach() * mask)


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_copies_and_keeps_frozen_weights_frozen(kind: str) -> None:
    dense = make_dense(kind).requires_grad_(False)
    before = dense.weight.clone()
    sparse = SPARSE[type(dense)].from_dense(dense, density=1.0)
    assert not any(p.requires_grad for p in sparse.parameters())
    assert not any(p.requires_grad for p in sparse.to_dense().parameters())
    sparse.values.fill_(0)
    assert torch.equal(dense.weight, before)


def test_ties_with_the_padding_row_do_not_cost_nonzeros() -> None:
    """An all-zero table: the padding row ties with every other and must not take their places."""
    dense = nn.Embedding(4, 3, padding_idx=0)
    nn.init.zeros_(dense.weight)
    table = SparseEmbedding.from_dense(dense, density=0.5)
    assert table.nnz == 6
    table.check_invariants()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Embedding(4, 3, max_norm=1.0), "does not support max_norm=1.0"),
        (nn.Embedding(4, 3, scale_grad_by_freq=True), "does not support scale_grad_by_freq=True"),
        (nn.EmbeddingBag(4, 3, mode="sum", sparse=True), "does not support sparse=True"),
        (nn.EmbeddingBag(4, 3), "does not support mode='mean'"),
        (nn.EmbeddingBag(4, 3, mode="sum", include_last_offset=True), "include_last_offset"),
        (nn.Embedding.from_pretrained(torch.ones(4, 3), padding_idx=1), "padding row 1 must be zero"),
    ],
)
def test_options_without_a_sparse_form(module: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        SPARSE[type(module)].from_dense(module, density=0.5)


def test_from_dense_refuses() -> None:
    dense = nn.Linear(4, 3)
    for options in ({}, {"density": 0.5, "mask": torch.ones(3, 4)}):
        with pytest.raises(ConversionError, match=r"either density= .* or mask="):
            SparseLinear.from_dense(dense, **options)
    with pytest.raises(ConversionError, match=r"mask must have the weight's shape \(3, 4\), got \(4, 3\)"):
        SparseLinear.from_dense(dense, mask=torch.ones(4, 3))
    with pytest.raises(ConversionError, match="keeps no weight at all"):
        SparseLinear.from_dense(dense, mask=torch.zeros(3, 4))
    with pytest.raises(DensityError):
        SparseLinear.from_dense(dense, density=0.0)
    for kind, wrong in (
        (SparseLinear, "nn.Linear"),
        (SparseEmbedding, "nn.Embedding"),
        (SparseEmbeddingBag, "nn.EmbeddingBag"),
    ):
        with pytest.raises(ConversionError, match=f"needs an {wrong}, got ReLU"):
            kind.from_dense(nn.ReLU(), density=0.5)  # type: ignore[arg-type]
    with torch.no_grad():
        dense.weight[1, 2] = float("nan")
    with pytest.raises(ConversionError, match="the weight holds NaN"):
        SparseLinear.from_dense(dense, density=0.5)


# ---------------------------------------------------------------- saving, copying, moving


def another(module: SparseModule) -> SparseModule:
    """A module of the same sizes with other indices and values."""
    fresh = copy.deepcopy(module)
    for m in fresh.modules():
        if isinstance(m, SparseModule):
            pattern = sparsecore.Pattern.random(
                m.shape, nnz=m.nnz, skip_row=m.empty_row, generator=seeded(99)
            )
            m.write_index(pattern.crow, pattern.col)
            nn.init.normal_(m.values)
    return fresh


def encoded(module: SparseModule, encoding: str) -> SparseModule:
    """A copy with every weight in this encoding."""
    twin = copy.deepcopy(module)
    for m in twin.modules():
        if isinstance(m, SparseModule):
            m.set_encoding(encoding)
    return twin


every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)


@every_module
def test_encodings_hold_the_same_weight(module: SparseModule) -> None:
    csr, bitmap = encoded(module, "csr"), encoded(module, "bitmap")
    assert (csr.encoding, bitmap.encoding) == ("csr", "bitmap")
    assert set(csr.state_dict()) - set(bitmap.state_dict()) >= {"crow_indices", "col_indices"}
    assert "bitmap" in bitmap.state_dict()
    assert torch.equal(csr.crow_indices, bitmap.crow_indices)
    assert torch.equal(csr.col_indices, bitmap.col_indices)
    assert csr.col_indices.dtype == bitmap.col_indices.dtype
    assert torch.equal(csr.weight.to_dense(), bitmap.weight.to_dense())
    close(run(csr), run(bitmap))
    for loaded, source in ((csr, bitmap), (bitmap, csr)):
        changed = another(source)
        loaded.load_state_dict(changed.state_dict(), strict=True)
        loaded.check_invariants()
        close(run(loaded), run(changed))
    with pytest.raises(SparsecoreError, match="encoding must be one of csr, bitmap, got 'coo'"):
        csr.set_encoding("coo")


def test_a_bitmap_leaves_the_cpu_as_csr() -> None:
    module = encoded(SparseLinear(40, 30, density=0.5), "bitmap")
    nnz = module.nnz
    module.to("meta")
    assert module.encoding == "csr"
    assert module.col_indices.device.type == "meta"
    assert module.col_indices.shape == (nnz,)


@every_module
@every_encoding
def test_state_dict_round_trip(module: SparseModule, encoding: str) -> None:
    module = encoded(module, encoding)
    state = module.state_dict()
    assert {"values", "bitmap"} <= set(state) or {"values", "crow_indices", "col_indices"} <= set(state)
    assert all(t.layout == torch.strided and t.is_contiguous() for t in state.values())
    fresh = another(module)
    kept = fresh.values
    assert not torch.equal(run(fresh), run(module))
    fresh.load_state_dict(copy.deepcopy(state), strict=True)
    assert fresh.values is kept
    assert torch.equal(run(fresh), run(module))
    fresh.check_invariants()


@every_module
@every_encoding
def test_safetensors_and_weights_only_round_trip(module: SparseModule, encoding: str) -> None:
    from safetensors.torch import load, save

    module = encoded(module, encoding)

    for saved in (load(save(module.state_dict())), reload(module.state_dict())):
        fresh = another(module)
        fresh.load_state_dict(saved, strict=True)
        assert torch.equal(run(fresh), run(module))


def reload(state: dict[str, Tensor]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def damage_columns(state: dict[str, Tensor]) -> None:
    state["col_indices"][0] = 200


def damage_pointers(state: dict[str, Tensor]) -> None:
    state["crow_indices"][-1] += 1


def drop_columns(state: dict[str, Tensor]) -> None:
    del state["col_indices"]


def drop_indices(state: dict[str, Tensor]) -> None:
    del state["crow_indices"], state["col_indices"]


def other_density(state: dict[str, Tensor]) -> None:
    state.update(encoded(SparseEmbedding(8, 5, padding_idx=3, density=0.6), "csr").state_dict())


def other_shape(state: dict[str, Tensor]) -> None:
    state.update(encoded(SparseEmbedding(9, 5, padding_idx=3, density=0.4), "csr").state_dict())


def filled_padding(state: dict[str, Tensor]) -> None:
    state.update(encoded(SparseEmbedding.from_dense(nn.Embedding(8, 5), density=0.4), "csr").state_dict())


def bitmap_with(change: Any) -> Any:
    def damage(state: dict[str, Tensor]) -> None:
        bitmap = encode(state.pop("crow_indices"), state.pop("col_indices"), 5)
        state["bitmap"] = change(bitmap)

    return damage


def set_bit(bitmap: Tensor, row: int, bit: int) -> Tensor:
    bitmap[row, 1] |= 1 << bit
    return bitmap


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_columns, r"table: column indices must be in 0 \.\. 4, got 200"),
        (damage_pointers, "table: crow must run from 0 to nnz"),
        (
            drop_columns,
            "table: crow_indices, col_indices, values belong together, got only crow_indices, values",
        ),
        (drop_indices, "belong together, got only values"),
        (other_density, "table: expected nnz = 16 values, got 24: the densities differ"),
        (other_shape, r"table: crow must have rows \+ 1 = 9 entries, got 10"),
        (filled_padding, "table: the padding row 3 must be empty"),
        (bitmap_with(lambda b: b[1:]), r"bitmap must be int32 of shape \(9, 2\), got torch.int32 \(8, 2\)"),
        (bitmap_with(lambda b: b.long()), r"bitmap must be int32 of shape \(9, 2\), got torch.int64"),
        (bitmap_with(lambda b: set_bit(b, 8, 0)), "padding must be 0"),
        (bitmap_with(lambda b: set_bit(b, 2, 5)), "bits beyond column 4"),
        (bitmap_with(lambda b: set_bit(b, 3, 2)), "row pointers must count its bits"),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
@pytest.mark.parametrize("strict", [True, False])
@every_encoding
def test_damaged_state_is_refused_before_anything_is_copied(
    damage: Any, message: str, strict: bool, encoding: str
) -> None:
    torch.manual_seed(5)
    table = SparseEmbedding(8, 5, padding_idx=3, density=0.4, generator=seeded(3))
    model = nn.ModuleDict({"table": encoded(table, encoding)})
    before = copy.deepcopy(model["table"].state_dict())
    state = {name: t.clone() for name, t in encoded(another(table), "csr").state_dict().items()}
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({f"table.{name}": t for name, t in state.items()}, strict=strict)
    after = model["table"].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_module
def test_deepcopy_and_pickle_leave_the_recorder_behind(module: SparseModule) -> None:
    module = copy.deepcopy(module)
    module._recorder = Recorder(module.values, module.index, module.shape)
    run(module).sum().backward()
    assert module._recorder.uses
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin._recorder is None
        assert twin.values is not module.values
        assert torch.equal(run(twin), run(module))
        twin.check_invariants()
        with torch.no_grad():
            twin.values.add_(1)
            twin.index[0].zero_()
        module.check_invariants()
    assert module._recorder.uses


@every_module
def test_to_another_type(module: SparseModule) -> None:
    module = copy.deepcopy(module)
    values, expected = module.values, run(module)
    types = (module.crow_indices.dtype, module.col_indices.dtype)
    encoding = module.encoding
    module.to(torch.float64)
    assert module.encoding == encoding
    assert module.values is values
    assert module.values.dtype == torch.float64
    assert (module.crow_indices.dtype, module.col_indices.dtype) == types
    assert run(module).dtype == torch.float64
    close(run(module).float(), expected)


def test_device_and_dtype_arguments() -> None:
    layer = SparseLinear(4, 3, device="meta", dtype=torch.float64, density=0.5)
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer.bias.dtype == torch.float64  # type: ignore[union-attr]


# ---------------------------------------------------------------- wrong input


def test_linear_refuses_a_wrong_width_and_type() -> None:
    layer = SparseLinear(4, 3, density=0.5)
    with pytest.raises(SparsecoreError, match=r"expected input with 4 features .* got shape \(2, 5\)"):
        layer(torch.ones(2, 5))
    with pytest.raises(
        SparsecoreError, match="spmm needs one floating-point type, got values float32, x float64"
    ):
        layer(torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("kind", [SparseEmbedding, SparseEmbeddingBag])
def test_tables_refuse(kind: Any) -> None:
    table = kind(4, 3, density=0.5)
    with pytest.raises(IndexError, match=r"ids must be in 0 \.\. 3, got 4"):
        table(torch.tensor([[0, 4]]))
    with pytest.raises(SparsecoreError, match=r"ids must be int64 or int32, got torch\.float32"):
        table(torch.ones(1, 2))
    with pytest.raises(SparsecoreError, match="padding_idx must be within 4 rows, got 4"):
        kind(4, 3, 4, density=0.5)
    with pytest.raises(DensityError):
        kind(4, 3, density=1.5)
    with pytest.raises(PatternError, match="two positive integers"):
        kind(0, 3, density=0.5)


ids4 = torch.arange(4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((ids4,), "flat ids need offsets"),
        ((ids4.view(2, 2), torch.tensor([0, 2])), "offsets must be left out when the ids are 2-D"),
        ((ids4, torch.tensor([0.0, 2.0])), "offsets must be int64 or int32, got torch.float32"),
        ((ids4.view(1, 2, 2), torch.tensor([0])), "ids must be 1-D with offsets, or 2-D, got 3-D"),
        ((ids4, torch.tensor([1, 2])), "offsets must begin at 0"),
        ((ids4, torch.tensor([0, 3, 2])), "offsets must begin at 0, never fall"),
        ((ids4, torch.tensor([0, 5])), "end within the ids"),
        ((ids4, torch.empty(0, dtype=torch.int64)), "offsets must begin at 0"),
        (
            (ids4, torch.tensor([0]), torch.ones(3)),
            r"per_sample_weights must have the ids' shape \(4,\), got \(3,\)",
        ),
        ((ids4, torch.tensor([0]), torch.ones(4).double()), "bag needs one floating-point type"),
    ],
)
def test_bag_refuses(inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(SparsecoreError, match=message):
        SparseEmbeddingBag(4, 3, density=0.5)(*inputs)


def test_bias_density_out_of_range() -> None:
    with pytest.raises(DensityError):
        SparseLinear(4, 3, density=0.5, bias_density=0.0)


# ---------------------------------------------------------------- accumulated rows


def test_accumulator_sums_repeated_ids_and_keeps_rows_in_order() -> None:
    rows = RowAccumulator(10, 2)
    assert not rows.uses
    rows.add(torch.tensor([5, 1, 5]), torch.tensor([[1.0, 2], [10, 20], [3, 4]]))
    rows.add(torch.tensor([3, 1]), torch.tensor([[7.0, 7], [1, 1]]))
    assert rows.uses
    assert rows.rows().tolist() == [1, 3, 5]
    assert rows.block(torch.tensor([1, 3, 5])).tolist() == [[11, 21], [7, 7], [4, 6]]
    assert rows.block(torch.tensor([5])).tolist() == [[4, 6]]


def test_accumulator_block_is_a_copy() -> None:
    rows = RowAccumulator(10, 1)
    rows.add(torch.tensor([0]), torch.ones(1, 1))
    rows.block(rows.rows()).zero_()
    assert rows.block(rows.rows()).item() == 1


def test_accumulator_admits_rows_in_the_order_in_which_they_come() -> None:
    rows = RowAccumulator(3, 1)
    rows.add(torch.tensor([9, 2, 9, 7, 4]), torch.ones(5, 1))
    assert rows.rows().tolist() == [2, 7, 9]
    rows.add(torch.tensor([4, 7, 7, 1]), torch.ones(4, 1))
    assert rows.rows().tolist() == [2, 7, 9]
    assert rows.block(rows.rows()).view(-1).tolist() == [1, 3, 2]


def test_accumulator_ignores_padding_and_nothing() -> None:
    rows = RowAccumulator(3, 1, skip_row=4)
    rows.add(torch.tensor([4, 4]), torch.ones(2, 1))
    rows.add(torch.empty(0, dtype=torch.int64), torch.empty(0, 1))
    assert not rows.uses
    rows.add(torch.tensor([4, 0]), torch.ones(2, 1))
    assert rows.rows().tolist() == [0]


def test_accumulator_state_and_reset() -> None:
    rows, twin = RowAccumulator(3, 1), RowAccumulator(3, 1)
    assert rows.state_dict() == {}
    rows.add(torch.tensor([4, 0]), torch.ones(2, 1))
    twin.load_state_dict(copy.deepcopy(rows.state_dict()))
    assert torch.equal(twin.rows(), rows.rows())
    rows.reset()
    assert not rows.uses
    assert twin.uses
    twin.load_state_dict({})
    assert not twin.uses
    with pytest.raises(ValueError, match="accumulate_rows must be at least 1, got -1"):
        RowAccumulator(-1, 1)


@given(st.lists(st.lists(st.integers(0, 6), max_size=6), max_size=5), st.integers(1, 8))
def test_accumulator_equals_a_dictionary(batches: list[list[int]], capacity: int) -> None:
    rows, expected = RowAccumulator(capacity, 1), dict[int, float]()
    for n, batch in enumerate(batches):
        for i, r in enumerate(batch):
            if r in expected or len(expected) < capacity:
                expected[r] = expected.get(r, 0.0) + 10 * n + i
        rows.add(
            torch.tensor(batch, dtype=torch.int64),
            torch.tensor([[10.0 * n + i] for i in range(len(batch))]).view(-1, 1),
        )
    assert rows.rows().tolist() == sorted(expected)
    if expected:
        assert rows.block(rows.rows()).view(-1).tolist() == [expected[r] for r in sorted(expected)]


def test_embedding_accumulates_over_backward_passes() -> None:
    table = SparseEmbedding(6, 3, padding_idx=0, density=0.5, accumulate_rows=4, generator=seeded())
    assert table.accumulator is not None
    table(torch.tensor([3])).sum().backward()  # nobody explores yet
    assert not table.accumulator.uses
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    explorer = sparsecore.DynamicSparsity(table, optimizer, interval=5, total_steps=50)
    for ids in ([[1, 0], [2, 1]], [[2, 5], [0, 0]]):
        out = table(torch.tensor(ids))
        (out * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    with torch.no_grad():
        table(torch.tensor([4]))
    assert explorer.steps == 0
    assert table.accumulator.rows().tolist() == [1, 2, 5]
    assert table.accumulator.block(table.accumulator.rows()).tolist() == [[2, 4, 6], [2, 4, 6], [1, 2, 3]]
    assert SparseEmbedding(6, 3, density=0.5).accumulator is None
    with pytest.raises(ValueError, match="at least 1"):
        SparseEmbedding(6, 3, density=0.5, accumulate_rows=-1)


# ---------------------------------------------------------------- sparse gradients


@every_backend
@every_dtype
@every_encoding
def test_sparse_gradient_is_that_of_the_rows_looked_up(
    backend: str, dtype: torch.dtype, encoding: str
) -> None:
    """As a torch vector that is coalesced, adds up over lookups, and serves torch's own optimizers."""
    tables = [
        SparseEmbedding(30, 7, density=0.4, dtype=dtype, sparse=sparse, generator=seeded(1))
        for sparse in (True, False)
    ]
    ids = [torch.tensor([3, 29, 3, 0]), torch.tensor([[3, 5], [7, 7]]), torch.empty(0, dtype=torch.int64)]
    weights = torch.randn(4, 7, dtype=dtype, generator=seeded(2))
    with sparsecore.backend(backend):
        for table in tables:
            table.set_encoding(encoding)
            (table(ids[0]) * weights).sum().backward()
            first = table.values.grad.clone()  # type: ignore[union-attr]
            (table(ids[1]).square().sum() + table(ids[2]).sum()).backward()
            if table.sparse:
                places = first._indices()[0]
                assert torch.equal(places, places.unique())  # torch forgets that it is coalesced
                touched = table.pattern.row_indices()[places]
                assert set(touched.tolist()) == {0, 3, 29}
    grads = [t.values.grad for t in tables]
    assert grads[0].is_sparse  # type: ignore[union-attr]
    close(grads[0].to_dense(), grads[1])  # type: ignore[union-attr, arg-type]
    before = tables[0].values.detach().clone()
    torch.optim.SparseAdam([tables[0].values], lr=0.1).step()
    changed = (tables[0].values != before).nonzero().view(-1)
    assert set(tables[0].pattern.row_indices()[changed].tolist()) <= {0, 3, 29, 5, 7}


def test_sparse_option_survives_conversion() -> None:
    table = SparseEmbedding.from_dense(nn.Embedding(9, 4, sparse=True), density=0.5)
    assert table.sparse
    assert table.to_dense().sparse


def test_an_exploration_drops_a_sparse_gradient() -> None:
    """It names places of the index set before."""
    table = SparseEmbedding(50, 8, density=0.3, sparse=True, generator=seeded(1))
    optimizer = torch.optim.SparseAdam([table.values], lr=0.1)
    explorer = sparsecore.DynamicSparsity(table, optimizer, interval=2, total_steps=100)
    for step in range(4):
        optimizer.zero_grad()
        table(torch.arange(20)).square().sum().backward()
        optimizer.step()
        report = explorer.step()
        assert (report is not None) == (step % 2 == 1)
        table.check_invariants()
    assert table.values.grad is None


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_cast_of_everything_leaves_integers_alone(encoding: str) -> None:
    module = SparseLinear(20, 10, density=0.3)
    module.set_encoding(encoding)
    before = [t.clone() for t in module.index if t is not None]
    x = torch.randn(3, 20, dtype=torch.float64)
    expected = module.to_dense().double()(x)
    module.type(torch.float64)
    for old, new in zip(before, (t for t in module.index if t is not None), strict=True):
        assert old.dtype == new.dtype
        assert torch.equal(old, new)
    torch.testing.assert_close(module(x), expected)
