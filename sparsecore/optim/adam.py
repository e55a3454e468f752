"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from sparsecore.errors import SparsecoreError
from sparsecore.optim.base import ElementwiseOptimizer, State, step_tensor
from sparsecore.pages import ask_huge_pages

__all__ = ["Adam", "AdamW"]


class Adam(ElementwiseOptimizer):
    """``torch.optim.Adam``, in one pass; sparse gradients update the elements that they name.

    Args:
        params, lr, betas, eps, weight_decay: as in torch.
        per_weight_step: correct every weight's bias by the number of its own steps (state ``step_per_weight``), so that
            regrown weights start anew.
        in_backward: update tables with sparse gradients during the backward pass (see `sparsecore.optim`).
        torchs: torch's ``foreach`` and ``fused``, which change nothing, and options left at their False.

    Raises:
        SparsecoreError: for an argument out of range or an option that is not supported (``amsgrad=True``); at a step,
            for per_weight_step with 16-bit parameters.
    """

    _state_names = ("exp_avg", "exp_avg_sq", "step_per_weight")
    _decoupled = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        per_weight_step: bool = False,
        in_backward: bool = False,
        **torchs: Any,
    ) -> None:
        self._take(torchs, weight_decay)
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0):
            raise SparsecoreError(
                f"lr, eps and weight_decay must not be negative, got {lr}, {eps} and {weight_decay}"
            )
        if not all(0 <= beta < 1 for beta in betas):
            raise SparsecoreError(f"betas must be in [0, 1), got {betas}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "per_weight_step": per_weight_step,
            "in_backward": in_backward,
        }
        super().__init__(params, defaults)

    def _begin(self, parameter: Tensor, group: State, state: State) -> None:
        if "step" not in state:
            state["step"] = step_tensor()
            for name in ("exp_avg", "exp_avg_sq"):
                zeros = torch.empty_like(parameter, memory_format=torch.preserve_format)
                state[name] = ask_huge_pages(zeros).zero_()
        if group["per_weight_step"] and parameter.dtype in (torch.float16, torch.bfloat16):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise SparsecoreError(
                f"per_weight_step=True counts in the parameter's type, and {kind} cannot count a run's steps: keep the "
                "weights in float32 (and compute in 16 bits by autocast), or leave per_weight_step out"
            )
        if group["per_weight_step"] and "step_per_weight" not in state:
            # A floating-point count: load_state_dict casts all state to the parameter's type. float32 counts to 2^24.
            state["step_per_weight"] = torch.full_like(parameter, float(state["step"]))

    def _fused(
        self, kernels: Any, parameter: Tensor, grad: Tensor, spans: Any, group: State, state: State
    ) -> None:
        moments = (state["exp_avg"], state["exp_avg_sq"])
        kernels.adam_(parameter, grad, *moments, spans=spans, **self._counted_step(group, state))

    def _fused_rows(
        self, kernels: Any, parameter: Tensor, lookup: tuple[Any, ...], group: State, state: State
    ) -> None:
        moments = (state["exp_avg"], state["exp_avg_sq"])
        kernels.adam_rows_(parameter, *moments, *lookup, **self._counted_step(group, state))

    def _counted_step(self, group: State, state: State) -> dict[str, Any]:
        """Count a step; what kernels are told of it."""
        state["step"] += 1
        return {
            "lr": float(group["lr"]),
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled": self._decoupled,
            "step": state["step"].item(),
            "step_per_weight": state["step_per_weight"] if group["per_weight_step"] else None,
        }

    def _plain(
        self, parameters: list[Tensor], grads: list[Tensor], group: State, states: list[State]
    ) -> None:
        if group["per_weight_step"]:
            for parameter, grad, state in zip(parameters, grads, states, strict=True):
                self._counted(parameter, grad, group, state)
            return
        first, second = group["betas"]
        run = adamw if self._decoupled else adam
        fused, steps = all(map(_in_one_kernel, parameters)), [state["step"] for state in states]
        if fused:  # that kernel reads the count on the device, and counts there
            steps = [
                torch.full((), float(n), dtype=torch.float32, device=p.device)
                for p, n in zip(parameters, steps, strict=True)
            ]
        run(
            parameters,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            fused=fused,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if fused:
            for state in states:
                state["step"] += 1

    def _counted(self, parameter: Tensor, grad: Tensor, group: State, state: State) -> None:
        (first, second), lr = group["betas"], group["lr"]
        count, m, v = state["step_per_weight"], state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        count += 1
        steps = count.double()  # 1 - beta^1 in float32 would have lost four digits
        if self._decoupled:
            parameter.mul_(1 - lr * group["weight_decay"])
        else:
            grad = grad.add(parameter, alpha=group["weight_decay"])
        m.lerp_(grad, 1 - first)
        v.mul_(second).addcmul_(grad, grad, value=1 - second)
        scale = v.div((1 - second**steps).to(v.dtype)).sqrt_().add_(group["eps"])
        parameter.sub_(m.div((1 - first**steps).to(m.dtype)).div_(scale).mul_(lr))


def _in_one_kernel(parameter: Tensor) -> bool:
    """Whether torch's fused kernel takes it; several functions instead would each pass over all numbers."""
    return parameter.is_cuda and type(parameter) in (Tensor, nn.Parameter)


class AdamW(Adam):
    """``torch.optim.AdamW``: Adam with decoupled weight decay. Arguments as ``Adam``, ``weight_decay`` 0.01."""

    _decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        per_weight_step: bool = False,
        in_backward: bool = False,
        **torchs: Any,
    ) -> None:
        options: State = {"per_weight_step": per_weight_step, "in_backward": in_backward}
        super().__init__(params, lr, betas, eps, weight_decay, **options, **torchs)
