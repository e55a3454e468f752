"""What the optimizers share: which implementation takes a parameter, and how sparse gradients are handed to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsecore.backends import backend_name, load
from sparsecore.errors import SparsecoreError
from sparsecore.ops import in_backward
from sparsecore.ops.embedding import sparse_vector, touched

__all__ = ["ElementwiseOptimizer", "step_tensor"]

State = dict[str, Any]

# Options of torch's optimizers that have no counterpart here, and the value under which they do nothing.
_NEUTRAL: State = {"amsgrad": False, "maximize": False, "capturable": False, "differentiable": False}
_IMPLEMENTATIONS = {"foreach", "fused"}  # which of torch's implementations is to run: here there is one


def step_tensor() -> Tensor:
    """A step count as torch's optimizers keep it."""
    return torch.zeros((), dtype=torch.float32)


class ElementwiseOptimizer(Optimizer):
    """An optimizer that treats every element by itself.

    With the option ``in_backward`` of a group, its tables with sparse gradients are updated while the backward pass
    runs, see `sparsecore.optim`.

    A subclass makes the state (``_begin``) and runs one step: of one parameter with a kernel (``_fused``), of several
    with torch's functions (``_plain``).
    """

    _state_names: tuple[str, ...]  # the state that is shaped like the parameter
    _decoupled = False  # whether weight decay is AdamW's

    def _begin(self, parameter: Tensor, group: State, state: State) -> None:
        """Make what is missing of a parameter's state."""

    def _fused(
        self, kernels: Any, parameter: Tensor, grad: Tensor, spans: Any, group: State, state: State
    ) -> None:
        raise NotImplementedError

    def _fused_rows(
        self, kernels: Any, parameter: Tensor, lookup: tuple[Any, ...], group: State, state: State
    ) -> None:
        """`_fused` with the gradient that `touched` makes of a lookup."""
        spans, grad = kernels.touched_spans(*lookup)
        self._fused(kernels, parameter, grad, spans, group, state)

    def _plain(
        self, parameters: list[Tensor], grads: list[Tensor], group: State, states: list[State]
    ) -> None:
        raise NotImplementedError

    def __setstate__(self, state: State) -> None:
        super().__setstate__(state)
        for kept in self.state.values():
            _as_ours(kept, self._state_names)
        for group in self.param_groups:
            self._check(group)
            for option, default in self.defaults.items():
                group.setdefault(option, default)
            self._watch(group)

    def _check(self, group: State) -> None:
        """Refuse options of torch's that would be ignored."""
        name = type(self).__name__
        for option, neutral in _NEUTRAL.items():
            if group.get(option, neutral) != neutral:
                raise SparsecoreError(f"{name} does not support {option}={group[option]!r}")
        if group.get("decoupled_weight_decay", self._decoupled) != self._decoupled and group["weight_decay"]:
            other = "Adam" if self._decoupled else "AdamW"
            raise SparsecoreError(
                f"the weight decay of this group is that of {other}, not of {name}: use {other}"
            )

    def add_param_group(self, param_group: State) -> None:
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._watch(self.param_groups[-1])

    def _take(self, torchs: State, weight_decay: float) -> None:
        """Arguments of torch's optimizers that have no counterpart here: nothing, or refused.

        Raises:
            SparsecoreError: for one that would change the rule.
            TypeError: for one that torch has not.
        """
        of_adam = {"decoupled_weight_decay"} if "exp_avg" in self._state_names else set()
        for option in torchs.keys() - _NEUTRAL.keys() - _IMPLEMENTATIONS - of_adam:
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {option!r}")
        self._check({"weight_decay": weight_decay, **torchs})

    def _watch(self, group: State) -> None:
        change = in_backward.register if group["in_backward"] else in_backward.forget
        for parameter in group["params"]:
            change(parameter, self)

    @torch._disable_dynamo  # as `step`, where a compiled function calls backward()
    @torch.no_grad()
    def update_rows(
        self,
        parameter: Tensor,
        crow: Tensor,
        col: Tensor | None,
        ids: Tensor,
        grad: Tensor,
        sources: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """One step of a table's values with the gradient of a lookup: what the backward pass calls.

        Args: as `sparsecore.ops.embedding.touched`, whose sums of rows of ``grad`` (entries, cols) are the gradient.
        """
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        state = self.state[parameter]
        self._begin(parameter, group, state)
        self._expect_sizes(parameter, state)
        fits = self._fits(parameter, grad, state)
        if fits and not torch._C._len_torch_dispatch_stack():
            lookup = (crow, col, ids, grad, sources, weights)
            self._fused_rows(load(parameter.device), parameter, lookup, group, state)
            torch.autograd.graph.increment_version(parameter)
            return
        # Other devices, and whoever watches operators (a counter of multiply-adds): with the gradient as a tensor.
        places, values = touched(crow, col, ids, grad, parameter.shape[0], sources, weights)
        gradient = sparse_vector(places, values, parameter.shape[0])
        if fits:
            self._with_kernels(parameter, gradient, group, state)
        else:
            self._touched_rows(parameter, gradient, group)

    @torch._disable_dynamo  # kernels are handed addresses; a compiled step of training breaks here
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss anew; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            others = []
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                state = self.state[parameter]
                self._begin(parameter, group, state)
                if grad.shape != parameter.shape:
                    raise SparsecoreError(
                        f"a gradient of shape {tuple(grad.shape)} for a parameter of shape {tuple(parameter.shape)}: "
                        "it is from before the parameter was replaced; call zero_grad() then"
                    )
                self._expect_sizes(parameter, state)
                if not self._fits(parameter, grad, state):
                    others.append(parameter)
                    continue
                self._with_kernels(parameter, grad, group, state)
            self._others(others, group)
        return loss

    def _with_kernels(self, parameter: Tensor, grad: Tensor, group: State, state: State) -> None:
        kernels, spans = load(parameter.device), None
        if grad.layout is torch.sparse_coo:
            spans, grad = _spans(kernels, parameter, grad)
        self._fused(kernels, parameter, grad, spans, group, state)
        torch.autograd.graph.increment_version(parameter)

    def _fits(self, parameter: Tensor, grad: Tensor, state: State) -> bool:
        """Whether kernels can do it: numba's floating-point types, in memory one after another; no DTensor."""
        return (
            type(parameter) in (Tensor, nn.Parameter)
            and parameter.dtype in (torch.float32, torch.float64)
            and grad.dtype == parameter.dtype
            and parameter.device.type == "cpu"
            and backend_name(parameter.device) == "numba"
            and parameter.is_contiguous()
            and all(
                state[name].is_contiguous() and state[name].dtype == parameter.dtype
                for name in self._kept(state)
            )
        )

    def _others(self, parameters: Iterable[Tensor], group: State) -> None:
        dense = []
        for parameter in parameters:
            grad = parameter.grad
            if grad is not None and grad.layout is torch.sparse_coo:
                self._touched_rows(parameter, grad, group)
            elif grad is not None:
                dense.append((parameter, grad))
        if dense:
            targets, grads = [p for p, _ in dense], [g for _, g in dense]
            self._plain(targets, grads, group, [self.state[p] for p in targets])

    def _touched_rows(self, parameter: Tensor, grad: Tensor, group: State) -> None:
        """The same rule for the elements (or rows) that the gradient names, taken out and put back."""
        grad, state = grad.coalesce(), self.state[parameter]
        rows = _rows_of(grad)
        part = parameter.index_select(0, rows)
        inner = state | {name: state[name].index_select(0, rows) for name in self._kept(state)}
        self._plain([part], [grad.values()], group, [inner])
        parameter.index_copy_(0, rows, part)
        for name in self._kept(inner):
            if state.get(name) is None:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state[name].index_copy_(0, rows, inner[name])

    def _expect_sizes(self, parameter: Tensor, state: State) -> None:
        """Kernels read and write without bounds checks."""
        for name in self._kept(state):
            if state[name].shape != parameter.shape:
                raise SparsecoreError(
                    f"the optimizer's {name} has shape {tuple(state[name].shape)}, the parameter "
                    f"{tuple(parameter.shape)}: the state is of another model, or of the same at another density; "
                    "build the model as it was when the state was saved, or the optimizer anew"
                )

    def _kept(self, state: State) -> list[str]:
        return [name for name in self._state_names if state.get(name) is not None]


def _as_ours(state: State, names: Iterable[str]) -> None:
    """State of torch's optimizers that is not as ours: counts that are plain numbers (SparseAdam's, old checkpoints'),
    and sparse momentum (SGD's, of sparse gradients).
    """
    if "step" in state and not isinstance(state["step"], Tensor):
        state["step"] = step_tensor() + float(state["step"])
    for name in names:
        if isinstance(state.get(name), Tensor) and state[name].layout != torch.strided:
            state[name] = state[name].to_dense()


def _rows_of(grad: Tensor) -> Tensor:
    if grad.sparse_dim() != 1:
        raise SparsecoreError(
            f"a sparse gradient must be sparse in the first dimension alone, got {grad.sparse_dim()} sparse dimensions"
        )
    return grad._indices()[0]


def _spans(kernels: Any, parameter: Tensor, grad: Tensor) -> tuple[Any, Tensor]:
    """Spans of the elements that a sparse gradient names, and its numbers there."""
    rows, values = _rows_of(grad), grad._values()
    if values.dim() == 1:
        return kernels.spans_of_places(rows, values, parameter.numel())
    width = parameter.numel() // parameter.shape[0]
    rows, values = kernels.sum_rows(rows, values.reshape(-1, width), parameter.shape[0])
    if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < parameter.shape[0]):
        raise IndexError(f"a sparse gradient names rows outside 0 .. {parameter.shape[0] - 1}")
    return kernels.spans_of_rows(rows, width), values
