"""What must hold of the integer buffers of a module, which kernels read without looking twice."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsecore.errors import SparsecoreError

__all__ = ["NO_INDEX", "expect_index", "integers_kept", "keeps_contents", "no_longer_expect_index"]

NO_INDEX = (
    "no index set yet: after to_empty(), call reset_parameters() of the sparse modules, or load a state"
)


@contextmanager
def integers_kept(module: nn.Module) -> Iterator[None]:
    """Around ``nn.Module._apply``: integer buffers keep their type where everything is cast (``Module.type``)."""
    before = {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_floating_point()
    }
    yield
    for name, buffer in before.items():
        after = module._buffers[name]
        if after is not None and after.dtype != buffer.dtype:
            module._buffers[name] = buffer.to(after.device)


def keeps_contents(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether what ``nn.Module._apply`` is given copies what tensors hold. ``to_empty`` does not: where indices were,
    there is what happened to lie in memory, which kernels must not follow.
    """
    # Numbers that every type has, in an order that lies nowhere else.
    probe = torch.tensor([int(bit) for bit in format(secrets.randbits(64), "064b")], device="cpu")
    after = fn(probe)
    if after.is_meta or type(after) is not Tensor:
        return True  # nothing that could be read
    return torch.equal(after.cpu().to(probe.dtype), probe)


def expect_index(module: Any) -> None:
    """Let the next call raise where the module has no index set: it would return zeros, and nothing would train.

    As a hook until there is one, because a check in every call would cost every call.
    """
    if _expect not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_expect)


def no_longer_expect_index(module: nn.Module) -> None:
    """Take the hook away."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _expect:
            del module._forward_pre_hooks[key]


def _expect(module: Any, inputs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if not module.has_index:
        raise SparsecoreError(f"{type(module).__name__} has {NO_INDEX}")
    no_longer_expect_index(module)
