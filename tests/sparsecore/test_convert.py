"""Swapping the modules of an existing model for sparse ones, and back."""

from __future__ import annotations

import copy

import pytest
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsecore
from sparsecore import (
    ConversionError,
    DensityError,
    SparseBias,
    SparsecoreError,
    SparseEmbedding,
    SparseEmbeddingBag,
    SparseLinear,
    SparseModule,
    densify,
    sparsify,
)

pytestmark = pytest.mark.feature("sparsify and densify")


class Net(nn.Module):
    """Two towers, a table and a bag, with names to select by."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, padding_idx=0)
        self.bag = nn.EmbeddingBag(12, 8, mode="sum")
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.table(ids).sum(1) + self.bag(ids % 12)))


IDS = torch.tensor([[1, 0, 19], [3, 3, 0]])


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules()}


def swapped(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, SparseModule)}


def unchanged(model: nn.Module, before: nn.Module) -> bool:
    ours, theirs = model.state_dict(), before.state_dict()
    return kinds(model) == kinds(before) and all(torch.equal(ours[k], theirs[k]) for k in theirs | ours)


def test_everything_is_swapped_in_place() -> None:
    model = net()
    assert sparsify(model, 0.25, generator=torch.Generator().manual_seed(1)) is model
    assert isinstance(model.table, SparseEmbedding)
    assert isinstance(model.bag, SparseEmbeddingBag)
    assert isinstance(model.encoder[0], SparseLinear)
    assert isinstance(model.head, SparseLinear)
    assert isinstance(model.encoder[0].bias, nn.Parameter)
    for module in model.modules():
        if isinstance(module, SparseModule):
            module.check_invariants()
            assert module.nnz == round(0.25 * module.shape[0] * module.shape[1])
    assert len(list(model.parameters())) == 5 + 2  # values, and the two dense biases


@pytest.mark.parametrize("keep", ["random", "magnitude"])
def test_stored_weights_keep_their_values_and_densify_inverts(keep: str) -> None:
    dense, model = net(), net()
    sparsify(model, 0.5, keep=keep)
    expected = model(IDS)
    masks = {name: m.pattern.to_mask() for name, m in model.named_modules() if isinstance(m, SparseModule)}
    assert densify(model) is model
    assert not swapped(model)
    assert kinds(model) == kinds(dense)
    torch.testing.assert_close(model(IDS), expected)
    for name, mask in masks.items():
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight * mask)


def test_keep_magnitude_keeps_the_largest() -> None:
    model, dense = sparsify(net(), 0.3, keep="magnitude"), net()
    for name in swapped(model):
        kept = model.get_submodule(name).pattern.to_mask()  # type: ignore[operator, union-attr]
        weight = dense.get_submodule(name).weight.detach().abs()  # type: ignore[operator, union-attr]
        assert weight[kept].min() >= weight[~kept].max()


def test_keep_random_follows_its_generator() -> None:
    a, b, c = (
        sparsify(net(), 0.3, generator=torch.Generator().manual_seed(s)).state_dict() for s in (1, 1, 2)
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a if k.startswith("table.") and k != "table.values")


def test_full_density_computes_the_same() -> None:
    torch.testing.assert_close(sparsify(net(), 1.0)(IDS), net()(IDS))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("encoder.*", None, {"encoder.0", "encoder.2"}),
        (["encoder.0", "head"], None, {"encoder.0", "head"}),
        (None, "encoder.*", {"table", "bag", "head"}),
        (None, ["table", "bag"], {"encoder.0", "encoder.2", "head"}),
        ("encoder.*", "*.2", {"encoder.0"}),
        (("table",), (), {"table"}),
    ],
)
def test_include_and_exclude(
    include: str | list[str] | None, exclude: str | list[str] | None, expected: set[str]
) -> None:
    assert swapped(sparsify(net(), 0.5, include, exclude)) == expected


def test_distribution_keeps_the_overall_budget() -> None:
    uniform, er = sparsify(net(), 0.3), sparsify(net(), 0.3, distribution="er")
    count = {
        name: (uniform.get_submodule(name).nnz, er.get_submodule(name).nnz)  # type: ignore[union-attr]
        for name in swapped(er)
    }
    assert abs(sum(u for u, _ in count.values()) - sum(e for _, e in count.values())) <= len(count)
    assert count["head"][1] > count["head"][0], "the smallest layer is kept denser"


def test_several_calls_give_several_densities() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    for name, density in (("0", 0.1), ("2", 0.5)):
        sparsify(model, density, include=name)
    assert [getattr(m, "density", None) for m in model] == [0.1, None, 0.5]


def test_bias_density() -> None:
    model = sparsify(net(), 0.5, bias_density=0.25)
    assert isinstance(model.encoder[0].bias, SparseBias)  # type: ignore[index, union-attr]
    assert model.encoder[0].bias.nnz == 4  # type: ignore[index, union-attr]
    assert model.head.bias is None  # type: ignore[union-attr]
    expected = model(IDS)
    torch.testing.assert_close(densify(model)(IDS), expected)
    assert not swapped(model)


def test_a_model_that_is_itself_a_layer_is_returned_sparse() -> None:
    layer = nn.Linear(6, 4)
    sparse = sparsify(layer, 0.5)
    assert isinstance(sparse, SparseLinear)
    assert isinstance(layer, nn.Linear)
    assert type(densify(sparse)) is nn.Linear


def test_a_module_in_two_places_stays_one_module() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(4, 2))})
    sparsify(model, 0.5)
    assert isinstance(model["a"], SparseLinear)
    assert model["a"] is model["b"][0]  # type: ignore[index]
    densify(model)
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"][0]  # type: ignore[index]


def test_subclasses_are_left_alone() -> None:
    class Scaled(nn.Linear):
        pass

    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4))
    assert swapped(sparsify(model, 0.5)) == {"1"}
    assert type(model[0]) is Scaled


def test_training_mode_and_frozen_weights_carry_over() -> None:
    model = net().eval()
    model.encoder.requires_grad_(False)
    sparsify(model, 0.5)
    assert not any(m.training for m in model.modules())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.0.values", "encoder.0.bias", "encoder.2.values", "encoder.2.bias"}
    densify(model)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        "encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias",
    }  # fmt: skip


# ---------------------------------------------------------------- errors leave the model as it was


def tied() -> nn.Module:
    model = net()
    model.table = nn.Embedding(3, 8)
    model.head.weight = model.table.weight
    return model


def unsupported() -> nn.Module:
    model = net()
    model.bag = nn.EmbeddingBag(12, 8)
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (net, {"density": 0.0}, DensityError, "density must be a number"),
        (net, {"density": 1.5}, DensityError, "density must be a number"),
        (net, {"density": 0.003}, DensityError, "leaves no nonzero at all"),
        (net, {"density": 0.5, "bias_density": 2.0}, DensityError, "density must be a number"),
        (net, {"density": 0.5, "keep": "largest"}, ConversionError, "keep must be 'random' or 'magnitude'"),
        (net, {"density": 0.5, "distribution": "flat"}, DensityError, "distribution must be"),
        (
            net,
            {"density": 0.5, "include": "decoder.*"},
            ConversionError,
            "leave no module .* candidates are table, bag",
        ),
        (net, {"density": 0.5, "exclude": "*"}, ConversionError, "leave no module"),
        (net, {"density": 0.5, "include": nn.Linear}, ConversionError, "take names of modules.*got <class"),
        (net, {"density": 0.5, "exclude": ["head", 1]}, ConversionError, "take names of modules.*got 1"),
        (tied, {"density": 0.5}, ConversionError, "the modules table, head share one weight.*exclude them"),
        (tied, {"density": 0.5, "include": "head"}, ConversionError, "share one weight"),
        (unsupported, {"density": 0.5}, ConversionError, "bag: .*does not support mode='mean'"),
        (
            lambda: nn.ReLU(),
            {"density": 0.5},
            ConversionError,
            r"no nn\.Linear, nn\.Conv2d, nn\.Embedding or nn\.EmbeddingBag",
        ),
        (lambda: sparsify(net(), 0.5), {"density": 0.5}, ConversionError, "it is sparse already"),
    ],
)
def test_errors_leave_the_model_untouched(make, options, error, message) -> None:  # type: ignore[no-untyped-def]
    model = make()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        sparsify(model, **options)
    assert unchanged(model, before)


def test_tied_weights_can_be_excluded() -> None:
    model = tied()
    assert swapped(sparsify(model, 0.5, exclude=["table", "head"])) == {"bag", "encoder.0", "encoder.2"}
    assert model.head.weight is model.table.weight  # type: ignore[union-attr]


def test_densify_needs_something_sparse() -> None:
    with pytest.raises(ConversionError, match="no sparse module to make dense"):
        densify(net())


# ---------------------------------------------------------------- a model that we did not write


def transformer(**options: bool) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first", False))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("include", [None, "*.linear2"])
def test_transformer_encoder(training: bool, padded: bool, norm_first: bool, include: str | None) -> None:
    """In eval mode torch's encoder hands weights to one fused dense kernel; a sparse one must not go there."""
    model = sparsify(transformer(norm_first=norm_first), 0.5, include).train(training)
    assert len(swapped(model)) == (4 if include is None else 2)
    reference = densify(copy.deepcopy(model))
    x = torch.randn(3, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]) if padded else None
    with torch.set_grad_enabled(training):
        ours, theirs = model(x, src_key_padding_mask=mask), reference(x, src_key_padding_mask=mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    if training:
        ours.pow(2).sum().backward()
        theirs.pow(2).sum().backward()
        layer, dense = model.layers[0].linear2, reference.layers[0].linear2  # type: ignore[index, union-attr]
        expected = dense.weight.grad.view(-1)[layer.pattern.positions()]
        torch.testing.assert_close(layer.values.grad, expected, rtol=1e-4, atol=1e-4)


def test_a_single_encoder_layer() -> None:
    torch.manual_seed(0)
    model = sparsify(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 0.5).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x), densify(copy.deepcopy(model))(x), rtol=1e-5, atol=1e-5)


def test_computed_weights_and_hooks_are_refused() -> None:
    normed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    sparsecore.sparsify(normed, 0.5)  # parametrized modules are of another type: left alone
    assert isinstance(normed[1], sparsecore.SparseLinear)
    pruned = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(ConversionError, match="0: its weight is computed"):
        sparsecore.sparsify(pruned, 0.5)
    hooked = nn.Sequential(nn.Linear(8, 8))
    hooked[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ConversionError, match="0: hooks are registered"):
        sparsecore.sparsify(hooked, 0.5)
    sparse = sparsecore.sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5)
    sparse[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ConversionError, match=r"0: hooks are registered .* after densify\(\)"):
        sparsecore.densify(sparse)


def test_a_module_at_two_places_goes_by_either_name() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 8))
    sparsecore.sparsify(model, 0.5, exclude="2")
    assert model[0] is model[2] is shared
    assert isinstance(model[3], sparsecore.SparseLinear)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    sparsecore.sparsify(model, 0.5, include="2")
    assert isinstance(model[0], sparsecore.SparseLinear)
    assert model[0] is model[2]


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ConversionError, match="0 is on the meta device"):
        sparsecore.sparsify(model, 0.5)


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64"])
def test_a_matrix_of_no_real_numbers_is_refused(dtype: str) -> None:
    matrix = scipy.sparse.csr_array([[1, 0], [0, 1]], dtype=dtype)
    for layer in (sparsecore.SparseLinear, sparsecore.SparseEmbedding):
        with pytest.raises(ConversionError, match=f"floating-point values, got {dtype}"):
            layer.from_sparse(matrix)


def test_density_error_names_the_module() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(3, 2))
    with pytest.raises(sparsecore.DensityError, match=r"1: density 0.01 of a 2 x 3 weight"):
        sparsecore.sparsify(model, 0.01)
    assert type(model[0]) is nn.Linear


def test_autocast_gives_the_kernels_float32() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    sparsecore.sparsify(model, 0.5, include="2")
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.float32
    out.sum().backward()
    torch.testing.assert_close(out, model(x), rtol=0.05, atol=0.05)


def test_a_container_stands_for_what_is_in_it() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(9, 9)), "head": nn.Sequential(nn.Linear(9, 2))})
    sparsify(model, 0.5, exclude="head")
    assert type(model["head"][0]) is nn.Linear  # type: ignore[index]
    assert type(model["body"][0]) is SparseLinear  # type: ignore[index]
    assert type(sparsify(Net(), 0.5, include="encoder").head) is nn.Linear


@pytest.mark.parametrize("names", [{"exclude": "haed"}, {"include": ["encoder", "haed"]}], ids=str)
def test_a_name_that_is_no_modules_is_refused(names: dict[str, object]) -> None:
    model = Net()
    with pytest.raises(ConversionError, match="no module 'haed'; such as head"):
        sparsify(model, 0.5, **names)  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match=r"no module 'xyz'; such as [a-z]"):
        sparsify(model, 0.5, exclude="xyz")
    assert type(model.head) is nn.Linear
    sparsify(model, 0.5, exclude=["*norm*", "head"])  # a pattern may find nothing


def test_what_hangs_on_a_dense_module_is_not_lost() -> None:
    def patched(change: object) -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8))
        change(model[0])  # type: ignore[operator]
        return model

    for change, named in (
        (lambda layer: layer.register_parameter("lora", nn.Parameter(torch.ones(8))), "lora"),
        (lambda layer: layer.register_buffer("scale", torch.ones(8)), "scale"),
        (lambda layer: setattr(layer, "forward", lambda x: x), "forward"),
        (lambda layer: layer.weight.register_hook(lambda grad: grad), "hooks on its parameters"),
    ):
        with pytest.raises(
            ConversionError, match=f"{named}, which a plain Linear does not have, would be lost"
        ):
            sparsify(patched(change), 0.5)


def test_tied_biases_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    with pytest.raises(ConversionError, match="share one bias"):
        sparsify(model, 0.5)
    assert model[1].bias is model[0].bias


def test_densify_leaves_subclasses_alone() -> None:
    class Doubled(SparseLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(9, 9, density=0.5), SparseLinear(9, 9, density=0.5))
    x = torch.randn(3, 9)
    before = model(x)
    assert [type(m) for m in densify(model)] == [Doubled, nn.Linear]  # type: ignore[attr-defined]
    torch.testing.assert_close(model(x), before)
    with pytest.raises(ConversionError, match="no sparse module"):
        densify(model)


def test_an_empty_weight_is_left_dense() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 5)
    with pytest.raises(DensityError, match="nothing to store"):
        sparsify(empty, 0.5)


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_modules_in_a_plain_list_are_refused(kind: type) -> None:
    class Blocks(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            blocks = [SparseLinear(8, 8, density=0.5) if sparse else nn.Linear(8, 8) for _ in range(2)]
            self.blocks = dict(enumerate(blocks)) if kind is dict else kind(blocks)
            self.known = nn.ModuleList([*blocks, nn.Linear(8, 8)])

    for sparse, convert in ((False, lambda model: sparsify(model, 0.5)), (True, densify)):
        model = Blocks(sparse)
        before = [type(m) for m in model.known]
        with pytest.raises(ConversionError, match=rf"known\.0 is also in a plain {kind.__name__}, blocks"):
            convert(model)
        assert [type(m) for m in model.known] == before
    sparsify(model := Blocks(False), 0.5, exclude=["known.0", "known.1"])
    assert type(model.known[2]) is SparseLinear


def test_complex_weights_are_refused() -> None:
    with pytest.raises(
        SparsecoreError,
        match="0: a sparse weight needs a floating-point dtype of 64, 32 or 16 bits, got complex64",
    ):
        sparsify(nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64)), 0.5)
    with pytest.raises(SparsecoreError, match="got int32"):
        SparseLinear(8, 8, density=0.5, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_a_layer_is_not_cast_to_what_it_cannot_compute_with(dtype: torch.dtype) -> None:
    model = nn.Sequential(SparseLinear(8, 8, density=0.5), nn.Linear(8, 8))
    with pytest.raises(SparsecoreError, match=f"64, 32 or 16 bits, got {str(dtype)[6:]}"):
        model.to(dtype)
    assert model[0].values.dtype is torch.float32
    assert model[0](torch.ones(2, 8)).shape == (2, 8)
