"""How an operator is defined, and what all of them check."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from sparsecore.backends import load
from sparsecore.errors import SparsecoreError
from sparsecore.ops.recording import in_transform, through_dispatcher, within_transform

__all__ = [
    "GRAPH",
    "INDEX",
    "WEIGHT",
    "add_in_float32",
    "check_ids",
    "check_rows",
    "define",
    "in_float32",
    "keep",
    "kept",
    "nonzeros_of",
    "operator",
    "plain",
    "same_dtype",
]

# Every eager call asks these.
_peek_transforms = torch._C._functorch.peek_interpreter_stack
_n_modes, _in_autocast = torch._C._len_torch_dispatch_stack, torch._C._is_any_autocast_enabled
_in_function_mode, _tracing = torch.overrides._is_torch_function_mode_enabled, torch._C._get_tracing_state
_KNOWS_AUTOCAST = hasattr(torch.library, "register_autocast")  # torch 2.6 does not
# Every reader of an operator's schema sees these as three and as six arguments.
_library = torch.library.Library("sparsecore", "DEF")
INDEX = "Tensor crow, Tensor? col"  # without columns, crow is a bitmap index (sparsecore.encoding)
WEIGHT = f"Tensor values, {INDEX}"
GRAPH = "Tensor crow, Tensor col, Tensor weight, Tensor crow_t, Tensor col_t, Tensor weight_t"


def operator(
    schema: str,
    run: Callable[..., Tensor],
    *,
    fake: Callable[..., Tensor],
    setup: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    macs: Callable[..., int],
) -> Any:
    """Define one operator: schema, implementation for every device, shapes, derivative, multiply-adds.

    Returns:
        A function with two ways to the same implementation. torch's dispatcher, with everything that hooks into it
        (torch.compile, counters and other modes, autocast, functional transforms), costs about 100 us for a forward and
        backward call; plain eager code takes a `torch.autograd.Function` instead, a fifth of that. Its attribute ``op``
        is the registered operator itself.
    """
    run = in_float32(schema, run)
    packet = define(schema, run, fake, macs)
    name = packet.__name__
    torch.library.register_autograd(f"sparsecore::{name}", backward, setup_context=setup, lib=_library)
    add_in_float32(name)
    return _with_direct_path(name, packet.default, run, setup, backward)


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any], macs: Callable[..., int]) -> Any:
    """Register an operator without derivative: schema, implementation, shapes, multiply-adds."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, through_dispatcher(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsecore::{name}", _on_one_device(name, fake), lib=_library)
    packet = getattr(torch.ops.sparsecore, name)

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * macs(*args, **kwargs)

    register_flop_formula(packet, get_raw=True)(flops)
    return packet


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Shapes of an operator whose operands lie together: else a weight without memory and an input that has some would
    give a result that nothing has computed.
    """

    @functools.wraps(fake)
    def checked(*args: Any, **kwargs: Any) -> Any:
        places = sorted({a.device.type for a in args if isinstance(a, Tensor)})
        if len(places) > 1:
            hint = "; a layer on the meta device has no values yet: to_empty(), then load or reset them"
            raise SparsecoreError(
                f"{name}: expected all operands on one device, got {' and '.join(places)}"
                + (hint if "meta" in places else "")
            )
        return fake(*args, **kwargs)

    return checked


def add_in_float32(name: str) -> None:
    """Kernels add up in float32: under autocast that is what they are given."""
    for device in ("cpu", "cuda") if _KNOWS_AUTOCAST else ():
        torch.library.register_autocast(f"sparsecore::{name}", device, torch.float32, lib=_library)


def _in_32_bits(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.dtype in _HALF else a for a in args)


def _with_direct_path(name: str, op: Any, run: Any, setup: Any, backward: Any) -> Any:
    def forward(ctx: Any, *args: Any) -> Tensor:
        output = run(*args)
        setup(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def call(*args: Any) -> Tensor:
        if torch.compiler.is_compiling():
            if not _KNOWS_AUTOCAST and torch.is_autocast_enabled(args[0].device.type):
                args = _in_32_bits(args)
            return op(*args)
        if not _KNOWS_AUTOCAST and _in_autocast():
            args = _in_32_bits(args)
        if _peek_transforms() is not None:
            return transformed.apply(*args)
        if within_transform():  # what torch.func.vjp returns is called when its level has ended
            args = tuple(torch._C._functorch.unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args)
        if args[0].is_meta or _watched():  # a weight or a graph comes first
            return op(*args)
        differentiable = False
        for a in args:
            kind = type(a)
            if kind is Tensor or kind is torch.nn.Parameter:
                differentiable = differentiable or a.requires_grad
            elif kind not in _OTHERS:  # a subclass of tensors
                return op(*args)
        if differentiable and torch.is_grad_enabled():
            return function.apply(*args)
        # Has no rule for forward-mode tangents, and says so where there are any.
        return function.apply(*args) if forward_ad._current_level >= 0 else run(*args)

    def backward_of_level(ctx: Any, *grads: Tensor) -> Any:
        with in_transform():
            return backward(ctx, *grads)

    # What torch.library derives has no rule for functional transforms. Here each level of them calls the next one.
    levels = {
        "forward": staticmethod(call),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward_of_level),
    }
    transformed: Any = type(name, (torch.autograd.Function,), levels)

    call.__name__ = call.__qualname__ = name
    call.op = op  # type: ignore[attr-defined]
    return call


def plain(*args: Any) -> bool:
    """Whether this is plain eager code: no compiler, transform, mode or subclass of tensors has a part in it."""
    if torch.compiler.is_compiling() or _peek_transforms() is not None or within_transform() or _watched():
        return False
    return all(type(a) is Tensor or type(a) is torch.nn.Parameter or type(a) in _OTHERS for a in args)


def keep(ctx: Any, *index: Tensor | None) -> None:
    """Keep index sets (each two arguments) for the backward pass: themselves, not what hooks on saved tensors make of
    them, such as copies elsewhere. Who watches a weight is found by where its index set lies.
    """
    ctx.index = index
    ctx.versions = [_version(first) for first in index[::2]]


def kept(ctx: Any) -> Any:
    """What was kept.

    Raises:
        RuntimeError: if an index set has been changed since.
    """
    index = ctx.index
    versions = zip(ctx.versions, map(_version, index[::2]), strict=True)
    # None: not known, in compiled code.
    if any(before is not None and before != now for before, now in versions):
        raise RuntimeError(
            "the index set of a sparse weight was changed between a forward pass and its backward pass: "
            "explore (and load) after the backward pass"
        )
    return index


def _version(first: Any) -> int | None:
    if torch.compiler.is_compiling():
        return None
    return first._version if type(first) is Tensor and not first.is_inference() else None


_HALF = frozenset((torch.float16, torch.bfloat16))
_FLOATING = ("values", "values_a", "dy", "grad", "weight", "queries")


def in_float32(schema: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation for 16-bit numbers too: they are widened for the call, the result is rounded at its end."""
    names = [
        argument.split()[-1] for argument in schema[schema.index("(") + 1 : schema.index(")")].split(", ")
    ]
    lead = next(place for place, name in enumerate(names) if name in _FLOATING)

    def is_floating(a: Any) -> bool:
        return isinstance(a, Tensor) and a.is_floating_point()

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        dtype = args[lead].dtype
        if dtype not in _HALF or {a.dtype for a in args if is_floating(a)} != {dtype}:
            return run(*args, **kwargs)
        found = run(*(a.float() if is_floating(a) else a for a in args), **kwargs)
        if isinstance(found, tuple):
            return tuple(a.to(dtype) if is_floating(a) else a for a in found)
        return found.to(dtype)

    return call


_IDS = (torch.int64, torch.int32)
_OTHERS = frozenset((type(None), bool, int, float))


def _watched() -> bool:
    """Whether something besides autograd wants to see every call: a mode, autocast, or torch.jit.trace."""
    return _n_modes() > 0 or _in_autocast() or _in_function_mode() or _tracing() is not None


def same_dtype(name: str, **tensors: Tensor) -> None:
    """Refuse a mix of types. (Callers compare first where a call's own cost matters.)"""
    kinds = {key: t.dtype for key, t in tensors.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{key} {str(dtype).removeprefix('torch.')}" for key, dtype in kinds.items())
        raise SparsecoreError(
            f"{name} needs one floating-point type, got {listed}; convert one of them with .to()"
        )


def check_ids(ids: Tensor, n_rows: int) -> None:
    """Kernels read without bounds checks; on other devices the check would wait for the device."""
    if ids.dtype not in _IDS:
        raise SparsecoreError(f"ids must be int64 or int32, got {ids.dtype}; convert them with .to()")
    if ids.is_cpu and ids.numel():
        low, high = load(ids.device).id_range(ids)
        if low < 0 or high >= n_rows:
            raise IndexError(f"ids must be in 0 .. {n_rows - 1}, got {low if low < 0 else high}")


def check_rows(name: str, crow: Tensor, grad: Tensor) -> None:
    """A gradient must have one column for each row of the weight."""
    if grad.dim() != 2 or grad.shape[1] != crow.shape[0] - 1:
        raise SparsecoreError(
            f"{name} needs dy of shape (batch, {crow.shape[0] - 1}), got {tuple(grad.shape)}"
        )


def nonzeros_of(crow: Tensor, ids: Tensor) -> int:
    """How many nonzeros these rows have, repeated ids counted each time."""
    crow = crow[:, 0] if crow.dim() == 2 else crow
    return int((crow[ids + 1].to(torch.int64) - crow[ids]).sum())
