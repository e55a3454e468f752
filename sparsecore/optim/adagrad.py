"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.optimizer import ParamsT

from sparsecore.errors import SparsecoreError
from sparsecore.optim.base import ElementwiseOptimizer, State, step_tensor

__all__ = ["Adagrad"]


class Adagrad(ElementwiseOptimizer):
    """``torch.optim.Adagrad``, in one pass; sparse gradients update the elements that they name.

    Args: as in torch, and
        in_backward: update tables with sparse gradients during the backward pass (see `sparsecore.optim`).
        torchs: torch's ``foreach`` and ``fused``, which change nothing, and options left at their False.

    Raises:
        SparsecoreError: for an argument out of range or an option that is not supported (``maximize=True``).
    """

    _state_names = ("sum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        in_backward: bool = False,
        **torchs: Any,
    ) -> None:
        self._take(torchs, weight_decay)
        options = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        for name, option in options.items():
            if not option >= 0:
                raise SparsecoreError(f"{name} must not be negative, got {option}")
        super().__init__(params, options | {"in_backward": in_backward})
        for group in self.param_groups:  # as torch does: a state dict from before the first step has it
            for parameter in group["params"]:
                self._begin(parameter, group, self.state[parameter])

    def _begin(self, parameter: Tensor, group: State, state: State) -> None:
        if "sum" not in state:
            state["step"] = step_tensor()
            state["sum"] = torch.full_like(
                parameter, group["initial_accumulator_value"], memory_format=torch.preserve_format
            )

    def _fused(
        self, kernels: Any, parameter: Tensor, grad: Tensor, spans: Any, group: State, state: State
    ) -> None:
        state["step"] += 1
        kernels.adagrad_(
            parameter,
            grad,
            state["sum"],
            lr=float(group["lr"]) / (1 + (state["step"].item() - 1) * group["lr_decay"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            spans=spans,
        )

    def _plain(
        self, parameters: list[Tensor], grads: list[Tensor], group: State, states: list[State]
    ) -> None:
        adagrad(
            parameters,
            grads,
            [state["sum"] for state in states],
            [state["step"] for state in states],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            maximize=False,
        )
