"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from sparsecore.errors import SparsecoreError
from sparsecore.optim.base import ElementwiseOptimizer, State

__all__ = ["SGD"]


class SGD(ElementwiseOptimizer):
    """``torch.optim.SGD``, in one pass; sparse gradients update the elements that they name, with momentum too.

    Args: as in torch, and
        in_backward: update tables with sparse gradients during the backward pass (see `sparsecore.optim`).
        torchs: torch's ``foreach`` and ``fused``, which change nothing, and options left at their False.

    Raises:
        SparsecoreError: for an argument out of range, an option that is not supported (``maximize=True``), or Nesterov
            momentum with dampening or without momentum.
    """

    _state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        in_backward: bool = False,
        **torchs: Any,
    ) -> None:
        self._take(torchs, weight_decay)
        if not (lr >= 0 and momentum >= 0 and weight_decay >= 0):
            raise SparsecoreError(
                f"lr, momentum and weight_decay must not be negative, got {lr}, {momentum} and {weight_decay}"
            )
        if nesterov and (momentum == 0 or dampening != 0):
            raise SparsecoreError("Nesterov momentum needs momentum > 0 and dampening = 0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "in_backward": in_backward,
        }
        super().__init__(params, defaults)

    def _fused(
        self, kernels: Any, parameter: Tensor, grad: Tensor, spans: Any, group: State, state: State
    ) -> None:
        first = state.get("momentum_buffer") is None
        if first and group["momentum"]:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        kernels.sgd_(
            parameter,
            grad,
            state["momentum_buffer"] if group["momentum"] else None,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=0.0 if first else group["dampening"],  # torch's first buffer is the gradient itself
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            spans=spans,
        )

    def _plain(
        self, parameters: list[Tensor], grads: list[Tensor], group: State, states: list[State]
    ) -> None:
        buffers = [state.get("momentum_buffer") for state in states]
        sgd(
            parameters,
            grads,
            buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=False,
        )
        if group["momentum"]:
            for state, buffer in zip(states, buffers, strict=True):
                state["momentum_buffer"] = buffer
