"""What explorers demand of optimizers, gradients, generators and checkpoints before they change anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsecore.errors import TopologyError
from sparsecore.nn.base import SparseModule
from sparsecore.topology.use import Recorder

__all__ = ["expect_held", "expect_names", "expect_state", "expect_told", "own_generator", "realignable"]


def realignable(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers as a list.

    Raises:
        TopologyError: for one whose state is not element by element, so that it cannot follow a weight, and for what is
            no optimizer.
    """
    optimizers = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise TopologyError(
                f"expected a torch.optim.Optimizer or a list of them, got {type(one).__name__}; of a wrapper give the "
                "optimizer inside"
            )
        inner = [name for name, part in vars(one).items() if _another(part, one)]
        if inner:
            raise TopologyError(
                f"{type(one).__name__} keeps state in the optimizer in its {inner[0]}, which would be left behind: "
                "give that one"
            )
        if isinstance(one, torch.optim.LBFGS):
            raise TopologyError(
                "LBFGS keeps a history of whole steps that cannot be realigned; use another optimizer"
            )
    return optimizers


def _another(part: Any, optimizer: Optimizer) -> bool:
    """Whether it is an optimizer with state of its own; a wrapper may show that of the one inside as its own."""
    return isinstance(part, Optimizer) and part.state is not optimizer.state


def expect_held(modules: Mapping[str, SparseModule], optimizers: Sequence[Optimizer]) -> None:
    """Refuse values that no optimizer holds, whose state would be left behind, and values of two modules at once, whose
    places only one of them could say.

    Raises:
        TopologyError: naming the weights.
    """
    owners: dict[int, str] = {}
    for name, module in modules.items():
        other = owners.setdefault(id(module.values), name)
        if other != name:
            raise TopologyError(
                f"{other} and {name} share their values, but each has an index set of its own, and an exploration "
                "would mix them up: use one module at both places"
            )
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    missing = [name for name, m in modules.items() if m.values.requires_grad and id(m.values) not in held]
    if missing:
        raise TopologyError(
            f"the optimizer does not hold the values of {', '.join(name or 'the model' for name in missing)}: build it "
            "from the parameters of the sparse model, after sparsify() and after whatever replaces parameters "
            "(load_state_dict(assign=True), torch.nn.utils.prune); of several optimizers give all, as a list"
        )


def expect_told(recorder: Recorder, values: Tensor, name: str) -> None:
    """Refuse to take a weight for unused because what used it ran unseen.

    Raises:
        TopologyError: for a gradient of which neither an operator nor autograd told.
    """
    grad = values.grad
    if recorder.stored is not None or grad is None or not values.requires_grad:
        return
    if bool((grad._values() if grad.is_sparse else grad).any()):
        raise TopologyError(
            f"{name} has a gradient, but nothing that computed it ran in this step: a CUDA graph that is replayed "
            "runs no Python. Take steps that explore without a graph (torch.compile: another mode than "
            "'reduce-overhead'), or grow='random'; if the gradient is of earlier steps (or step() "
            "was called twice), call optimizer.zero_grad()"
        )


def own_generator(generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or a new one seeded from torch's default."""
    if generator is not None:
        return generator
    return torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))


def expect_state(state: Mapping[str, Any], shapes: dict[str, list[int]], tracked: bool) -> None:
    """Refuse what is no state of an explorer, and that of one of other weights (older states do not say which).

    Raises:
        TopologyError: saying what is missing, or which weights differ.
    """
    missing = [
        key for key in ("steps", "generator", "timetable", "ever_active", "accumulators") if key not in state
    ]
    if missing:
        raise TopologyError(f"this is no state of an explorer: it has no {', '.join(missing)}")
    saved = {name: list(shape) for name, shape in state.get("weights", shapes).items()}
    if saved != shapes:
        raise TopologyError(f"the saved explorer has weights {saved}, this model has {shapes}")
    if bool(state["ever_active"]) != tracked:
        raise TopologyError(
            f"the saved explorer has track_ever_active={not tracked}, this one {tracked}; "
            "build it with the saved settings"
        )


def expect_names(saved: dict[str, Tensor], present: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model."""
    if set(saved) != set(present):
        raise TopologyError(
            f"the saved explorer has weights {sorted(saved)}, this model has {sorted(present)}"
        )
