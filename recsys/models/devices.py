"""Tensors that are made on the CPU and used where a model is.

Batches, negatives and noise are drawn on the CPU wherever the model is: the same seed gives the same ones on every
device. But not in a graph, which `torch.compile` or CUDA records once: it knows torch's default generator only.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

from recsys.errors import ConfigError

__all__ = ["find_device", "in_graph", "moved", "sent"]

B = TypeVar("B")


def find_device(name: str) -> torch.device:
    """The device of that name, such as "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError: there is no such device here.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds shapes and no numbers; expected cpu, cuda or cuda:N")
        if device.type != "cpu":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def in_graph() -> bool:
    """Whether what runs now is recorded, to be run again as it is: by torch.compile, or as a CUDA graph."""
    return torch.compiler.is_compiling() or (
        torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on that device; to a GPU by way of pinned memory, so that neither side waits for the other."""
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def moved(batch: B, device: torch.device) -> B:
    """A batch, a dataclass of tensors and such dataclasses, with all its tensors `sent`."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(batch):  # type: ignore[arg-type]
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            value = sent(value, device)
        elif dataclasses.is_dataclass(value):
            value = moved(value, device)
        fields[field.name] = value
    return type(batch)(**fields)
