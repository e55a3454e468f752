"""Sparse modules in place of dense ones, in an existing model, and back."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sparsecore.errors import ConversionError, SparsecoreError
from sparsecore.nn.base import SparseModule
from sparsecore.nn.conv import SparseConv2d
from sparsecore.nn.embedding import SparseEmbedding, SparseEmbeddingBag
from sparsecore.nn.linear import SparseLinear
from sparsecore.pattern import Pattern
from sparsecore.sizes import exact_nnz
from sparsecore.topology.init import allocate

__all__ = ["densify", "sparsify"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# What nn.Module itself keeps: swaps go through _modules.
_OF_TORCH = frozenset(vars(nn.Module()))

_CONVERTERS: dict[type[nn.Module], Callable[..., SparseModule]] = {
    nn.Linear: SparseLinear.from_dense,
    nn.Conv2d: SparseConv2d.from_dense,
    nn.Embedding: SparseEmbedding.from_dense,
    nn.EmbeddingBag: SparseEmbeddingBag.from_dense,
}
# Those that have a dense form.
_SPARSE = (SparseLinear, SparseConv2d, SparseEmbedding, SparseEmbeddingBag)


def sparsify(
    model: nn.Module,
    density: float,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    distribution: str = "uniform",
    keep: str = "random",
    bias_density: float | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Swap the linear layers, convolutions and tables of a model for sparse ones, in place; returns the model.

    Build the optimizer *afterwards*: the dense parameters are gone. Modules of exactly the types ``nn.Linear``,
    ``nn.Conv2d``, ``nn.Embedding`` and ``nn.EmbeddingBag`` are swapped; subclasses are left alone, since their code
    may read ``weight`` itself. Stored weights keep the values that the model has now. If the model *is* such a module,
    the sparse one is returned.

    Args:
        model: any module.
        density: overall fraction of the swapped weights that is stored, in (0, 1].
        include: names of modules, or shell patterns of names (``"encoder.*"``), to swap, with all that is in them; all
            if absent.
        exclude: names or patterns of modules to leave dense, with all that is in them; wins over ``include``.
        distribution: how the density is shared out between layers: ``"uniform"``, ``"er"`` or ``"erk"``
            (see `sparsecore.topology.allocate`).
        keep: which weights stay: ``"random"`` (for training from the start) or ``"magnitude"`` (for a trained model).
        bias_density: store biases of linear layers and convolutions sparse at this density; they stay dense if absent.
        generator: CPU generator for ``keep="random"``.

    Raises:
        DensityError: density outside (0, 1], or so low that a weight would store nothing.
        ConversionError: if no module is left to swap, a name is no module's, a module has an option without a sparse
            form, hooks, or parts of its own that would be lost, a weight or bias is shared between modules, or a
            module also lies in a plain list or dict (exclude them). Nothing is swapped in any of these cases.

    Example:
        >>> model = sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), 0.25, exclude="2")
    """
    if keep not in ("random", "magnitude"):
        raise ConversionError(f"keep must be 'random' or 'magnitude', got {keep!r}")
    chosen = list(_choose(model, include, exclude))
    _refuse_unknown(model, [*_patterns(include, []), *_patterns(exclude, [])])
    if not chosen:
        raise ConversionError(_nothing(model, include, exclude))
    _refuse_shared(model, chosen)
    _refuse_unreachable(model, {id(module): name for name, module in chosen})
    densities = allocate([tuple(_weight(module).shape) for _, module in chosen], density, distribution)
    swapped: dict[int, SparseModule] = {}
    for (name, module), share in zip(chosen, densities, strict=True):
        rows = _weight(module).shape[0]
        shape = (rows, _weight(module).numel() // rows)
        options: dict[str, float] = {}
        if isinstance(module, (nn.Linear, nn.Conv2d)) and bias_density is not None:
            options["bias_density"] = bias_density
        convert = _CONVERTERS[type(module)]
        try:
            if keep == "magnitude":
                swapped[id(module)] = convert(module, density=share, **options)
            else:
                pattern = Pattern.random(
                    shape,
                    nnz=exact_nnz(shape, share),
                    skip_row=getattr(module, "padding_idx", None),
                    generator=generator,
                )
                swapped[id(module)] = convert(
                    module, mask=pattern.to_mask().to(_weight(module).device), **options
                )
        except SparsecoreError as error:
            raise type(error)(f"{name or 'the model'}: {error}") from None
    return _swap(model, lambda module: swapped.get(id(module)))


def densify(model: nn.Module) -> nn.Module:
    """Swap every sparse module of a model for its dense form, in place; returns the model.

    Subclasses are left alone, since the dense form would lose their code.

    Raises:
        ConversionError: if the model has no sparse module, a table whose rows are split over ranks, hooks on a
            sparse module, which would be lost, or one in a plain list or dict. Nothing is swapped then.
    """
    if not any(type(module) in _SPARSE for module in model.modules()):
        raise ConversionError("the model has no sparse module to make dense")
    for name, module in model.named_modules():
        if isinstance(module, SparseModule) and module.row_mesh is not None:
            raise ConversionError(
                f"{name} holds one rank's rows of a table: put table.unshard() in its place first"
            )
        if isinstance(module, SparseModule):
            _refuse_hooks(name, module, "densify()")
    _refuse_unreachable(
        model, {id(module): name for name, module in model.named_modules() if type(module) in _SPARSE}
    )
    dense: dict[int, nn.Module] = {}

    def replacement(module: nn.Module) -> nn.Module | None:
        if type(module) not in _SPARSE:
            return None
        if id(module) not in dense:
            dense[id(module)] = module.to_dense()  # type: ignore[operator]
        return dense[id(module)]

    return _swap(model, replacement)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _choose(
    model: nn.Module, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> Iterator[tuple[str, nn.Module]]:
    wanted, unwanted = _patterns(include, ["*"]), _patterns(exclude, [])
    names: dict[nn.Module, list[str]] = {}  # a module may be used at several places
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in _CONVERTERS:
            names.setdefault(module, []).append(name)
    for module, places in names.items():
        chosen = [name for name in places if _named(name, wanted)]
        if chosen and not any(_named(name, unwanted) for name in places):
            yield chosen[0], module


def _named(name: str, patterns: list[str]) -> bool:
    """Whether a pattern is that of a module or of one that it is in."""
    parts = name.split(".")
    places = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(fnmatchcase(place, pattern) for place in places for pattern in patterns)


def _refuse_unknown(model: nn.Module, patterns: list[str]) -> None:
    """A name without wildcards is meant to be somebody's; a pattern may find nothing in this model."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in patterns:
        if not any(mark in pattern for mark in "*?[") and pattern not in names:
            near = difflib.get_close_matches(pattern, names, n=3) or [n for n in names if n][:20] or ["''"]
            raise ConversionError(f"the model has no module {pattern!r}; such as {', '.join(near)}")


def _patterns(given: str | Iterable[str] | None, default: list[str]) -> list[str]:
    if given is None:
        return default
    patterns = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    for one in patterns:
        if not isinstance(one, str):
            raise ConversionError(
                f"include= and exclude= take names of modules, as named_modules() has them, or patterns, got {one!r}"
            )
    return patterns


def _nothing(model: nn.Module, include: object, exclude: object) -> str:
    names = [name or "(the model itself)" for name, m in model.named_modules() if type(m) in _CONVERTERS]
    if any(isinstance(module, SparseModule) for module in model.modules()):
        return "the model has no dense linear layer, convolution or table left to make sparse; it is sparse already"
    if not names:
        return "the model has no nn.Linear, nn.Conv2d, nn.Embedding or nn.EmbeddingBag to make sparse"
    return (
        f"include={include!r} and exclude={exclude!r} leave no module to make sparse; "
        f"candidates are {', '.join(names[:20])}"
    )


def _refuse_shared(model: nn.Module, chosen: list[tuple[str, nn.Module]]) -> None:
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module_name)
    for name, module in chosen:
        if "weight" not in module._parameters:
            raise ConversionError(
                f"{name or 'the model'}: its weight is computed (weight_norm, a parametrization, pruning); "
                "remove that first, or exclude this module"
            )
        if module.weight.is_meta:
            raise ConversionError(
                f"{name or 'the model'} is on the meta device and has no values to keep: build it on a real device, "
                "or construct its sparse form there (SparseLinear(..., device='meta'))"
            )
        _refuse_hooks(name, module, "sparsify()")
        for kind, parameter in module.named_parameters(recurse=False):
            names = owners[id(parameter)]
            if len(names) > 1:
                raise ConversionError(
                    f"the modules {', '.join(names)} share one {kind}; making one sparse would part them: exclude them"
                )
        _refuse_additions(name, module)


def _refuse_unreachable(model: nn.Module, names: dict[int, str]) -> None:
    """What a module finds in a list of its own it would go on calling, but nobody would train it any more."""
    for place, module in model.named_modules():
        for attribute, held in vars(module).items():
            if attribute in _OF_TORCH or not isinstance(held, list | tuple | dict):
                continue
            for one in held.values() if isinstance(held, dict) else held:
                if id(one) in names:
                    raise ConversionError(
                        f"{names[id(one)]} is also in a plain {type(held).__name__}, {attribute} of "
                        f"{place or 'the model'}, where nothing takes its place: keep it in nn.ModuleList or "
                        "nn.ModuleDict alone, or exclude it"
                    )


def _refuse_additions(name: str, module: nn.Module) -> None:
    """What has been hung on a dense module would be lost with it."""
    found = [p for p in module._parameters if p not in ("weight", "bias")]
    found += [*module._buffers, *module._modules, *(["forward"] if "forward" in vars(module) else [])]
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters(recurse=False)):
        found.append("hooks on its parameters")
    if found:
        raise ConversionError(
            f"{name or 'the model'}: {', '.join(found)}, which a plain {type(module).__name__} does not have, would be "
            "lost; add them after sparsify(), or exclude this module"
        )


def _refuse_hooks(name: str, module: nn.Module, call: str) -> None:
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise ConversionError(
            f"{name or 'the model'}: hooks are registered on it and would be lost; register them after {call}, "
            "or leave this module as it is"
        )


def _swap(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    whole = replacement(model)
    if whole is not None:
        return whole
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            new = replacement(child) if child is not None else None
            if new is not None:
                setattr(parent, name, new)
                if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(new, SparseModule):
                    # Its inference fast path hands the layers' weights to one fused dense kernel.
                    parent.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, SparseModule) for m in module.modules()
        ):
            # With a padding mask it hands its layers nested tensors, for that fused kernel.
            module.use_nested_tensor = False
    return model
