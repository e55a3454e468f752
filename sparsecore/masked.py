"""The masked-dense simulation of sparse training: dense tensors times 0/1 masks.

This is how dynamic sparse training is commonly simulated: dense weights, dense gradients, dense optimizer state *and*
a mask are stored, and all of it is multiplied. It is here as the baseline to compare with and as the reference
that proves ours right: under the same settings it takes the same decisions, so that in float64 a model trained with it
and one trained with `DynamicSparsity` hold the same index sets and values at every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsecore.errors import TopologyError
from sparsecore.nn.base import SparseModule
from sparsecore.nn.bias import SparseBias
from sparsecore.pattern import Pattern
from sparsecore.sampling import sample_ranks
from sparsecore.topology.checks import expect_names, own_generator, realignable
from sparsecore.topology.report import ExplorationReport, LayerReport
from sparsecore.topology.rewrite import fresh_state
from sparsecore.topology.schedule import Timetable
from sparsecore.topology.select import largest, smallest

__all__ = ["MaskedSparsity", "masks_of"]


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The index sets of a sparse model as boolean masks, by the names that its parameters have after ``densify()``."""
    masks: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseBias):
            masks[name] = module.pattern.to_mask().view(module.dense_shape)
        elif isinstance(module, SparseModule):
            mask = module.pattern.to_mask()
            masks[f"{name}.weight" if name else "weight"] = mask.view(module.dense_shape)
    return masks


class MaskedSparsity:
    """`DynamicSparsity` simulated on a dense model. Same settings, same ``step()``, same report; nothing is saved.

    Args:
        model: a dense model.
        optimizer: holds its parameters.
        masks: boolean mask of each parameter to sparsify, by the parameter's name.
        density: instead of masks: every parameter of 2 or 4 dimensions (matrices, tables, 2-D convolutions) gets a
            random mask of this density; or a density for each parameter to sparsify, by its name.
        bias_density: with ``density``: every 1-D parameter gets a random mask of this density too.
        interval, drop_fraction, total_steps, end_drop_fraction, schedule, stop_fraction, grow, generator: as in
            `DynamicSparsity`. With ``density`` the generator draws the masks first.

    Raises:
        TopologyError: for a model or settings that cannot be simulated.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        masks: Mapping[str, Tensor] | None = None,
        *,
        density: float | Mapping[str, float] | None = None,
        bias_density: float | None = None,
        interval: int | None = 100,
        drop_fraction: float = 0.5,
        total_steps: int | None = None,
        end_drop_fraction: float = 0.005,
        schedule: str = "cosine",
        stop_fraction: float = 1.0,
        grow: str = "gradient",
        generator: torch.Generator | None = None,
    ) -> None:
        self.timetable = Timetable(
            interval, drop_fraction, total_steps, end_drop_fraction, schedule, stop_fraction, grow
        )
        self.generator = own_generator(generator)
        self.optimizers = realignable(optimizer)
        parameters = dict(model.named_parameters())
        self._skip_row = {
            f"{name}.weight" if name else "weight": module.padding_idx
            for name, module in model.named_modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None
        }
        if (masks is None) == (density is None):
            raise TopologyError("give either masks or density, and not both")
        if masks is None:
            assert density is not None
            if not isinstance(density, Mapping):
                of_dim = {2: density, 4: density} | ({} if bias_density is None else {1: bias_density})
                density = {name: of_dim[p.dim()] for name, p in parameters.items() if p.dim() in of_dim}
            masks = {
                name: self._draw(name, parameters[name], share) if name in parameters else torch.empty(0)
                for name, share in density.items()
            }
        unknown = [name for name in masks if name not in parameters]
        if unknown or not masks:
            raise TopologyError(f"masks name no parameter of the model: {unknown or 'none given'}")
        for name, mask in masks.items():
            if mask.shape != parameters[name].shape:
                raise TopologyError(
                    f"the mask of {name} must have its shape {tuple(parameters[name].shape)}, got {tuple(mask.shape)}"
                )
        # In the model's order: random growth draws weight by weight, as `DynamicSparsity` does.
        self.parameters = {name: p for name, p in parameters.items() if name in masks}
        # In the weights' own type: a product with a boolean mask converts it every time and is three times slower.
        self.multipliers = {name: masks[name].to(p.device, p.dtype) for name, p in self.parameters.items()}
        self.ever_active = {name: mask.bool() for name, mask in self.multipliers.items()}
        self.steps = 0
        self._scores: dict[str, Tensor] = {}
        self._recording = False
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.mul_(self.multipliers[name])
                if parameter.requires_grad:
                    parameter.register_hook(self._mask_gradient(name))
        self._arm()

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks now, boolean, by parameter name; copies."""
        return {name: mask.bool() for name, mask in self.multipliers.items()}

    def _draw(self, name: str, parameter: Tensor, density: float) -> Tensor:
        rows = 1 if parameter.dim() == 1 else parameter.shape[0]
        shape = (rows, parameter.numel() // rows)
        pattern = Pattern.random(shape, density, skip_row=self._skip_row.get(name), generator=self.generator)
        return pattern.to_mask().view(parameter.shape)

    def _mask_gradient(self, name: str) -> Any:
        def hook(grad: Tensor) -> Tensor:
            if self._recording:
                seen = self._scores.get(name)
                self._scores[name] = grad.clone() if seen is None else seen + grad
            return grad * self.multipliers[name]

        return hook

    def _arm(self) -> None:
        self._scores = {}
        self._recording = self.timetable.grow == "gradient" and self.timetable.due(self.steps + 1)

    @torch.no_grad()
    def step(self) -> ExplorationReport | None:
        """Count one training step; explore if one is due.

        Gradients are masked in the backward pass, so weights and optimizer state outside the masks stay zero by
        themselves; the product of weights and masks that others spend on every step is needed at explorations only.

        Raises:
            TopologyError: if weights or gradients are NaN or infinite; nothing has been changed then.
        """
        self.steps += 1
        if not self.timetable.due(self.steps):
            self._arm()
            return None
        fraction = self.timetable.drop_fraction(self.steps)
        before = self.generator.get_state()
        try:
            plans = {name: self._plan(name, p, fraction) for name, p in self.parameters.items()}
        except TopologyError:
            self.generator.set_state(before)
            self._arm()
            raise
        layers = {}
        for name, (mask, pruned, regrown) in plans.items():
            parameter, survivors = self.parameters[name], self.multipliers[name].bool() & mask
            self._reset_state(parameter, survivors)
            parameter.mul_(survivors)
            self.multipliers[name].copy_(mask)
            self.ever_active[name] |= mask
            layers[name] = LayerReport(
                pruned=pruned, grown=pruned, regrown=regrown, nnz=int(torch.count_nonzero(mask)), numel=mask.numel(),
                ever_active=float(self.ever_active[name].float().mean()),
            )  # fmt: skip
        self._arm()
        return ExplorationReport(step=self.steps, drop_fraction=fraction, layers=layers)

    def rewind(self, steps: int) -> None:
        """Go on as if this many steps had been taken: to measure a step of a certain kind; not for training."""
        self.steps = steps
        self._arm()

    def _plan(self, name: str, parameter: Tensor, fraction: float) -> tuple[Tensor, int, int]:
        """New mask, number pruned, number of them grown at once; by plain sorts of dense tensors."""
        old, scores = self.multipliers[name].bool(), self._scores.get(name)
        nnz = int(torch.count_nonzero(old))
        random = self.timetable.grow == "random"
        if nnz == old.numel() or (scores is None and not random):
            return old, 0, 0
        active = torch.nonzero(old.view(-1)).view(-1)
        magnitude = parameter.detach().reshape(-1)[active].abs()
        if not bool(torch.isfinite(magnitude).all()):
            raise TopologyError(f"weights of {name} are NaN or infinite: nothing was rewritten")
        if scores is not None and not bool(torch.isfinite(scores).all()):
            raise TopologyError(f"the gradient of {name} is NaN or infinite: nothing was rewritten")
        k = math.ceil(fraction * nnz)
        pruned = active[smallest(magnitude, k)]
        mask = old.view(-1).clone()
        mask[pruned] = False
        if scores is not None:
            # A convolution's gradient may come in channels_last format.
            candidates = scores.abs().reshape(-1).masked_fill(mask, 0)
            if name in self._skip_row:
                candidates.view(old.shape)[self._skip_row[name]] = 0
            count = min(k, int(torch.count_nonzero(candidates > 0)))
            mask[largest(candidates, count)] = True
        fill = nnz - int(torch.count_nonzero(mask))
        if fill:
            free = ~mask
            row = self._skip_row.get(name)
            if row is not None:
                free.view(old.shape)[row] = False
            places = torch.nonzero(free).view(-1)
            ranks = torch.cat(list(sample_ranks(places.numel(), fill, self.generator)))
            mask[places[ranks.to(places.device)]] = True
        return mask.view(old.shape), k, int(torch.count_nonzero(mask[pruned]))

    def _reset_state(self, parameter: Tensor, survivors: Tensor) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if any(p is parameter for p in group["params"]):
                    for key, state in optimizer.state.get(parameter, {}).items():
                        if isinstance(state, Tensor) and state.dim() and state.shape == parameter.shape:
                            state[~survivors] = fresh_state(group, key)

    def state_dict(self) -> dict[str, Any]:
        """Everything that continuing needs."""
        return {
            "steps": self.steps,
            "generator": self.generator.get_state(),
            "timetable": self.timetable.settings(),
            "masks": self.masks,
            "ever_active": dict(self.ever_active),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.timetable.expect(state["timetable"])
        expect_names(state["masks"], self.multipliers)
        for name, multiplier in self.multipliers.items():
            multiplier.copy_(state["masks"][name])
            self.ever_active[name].copy_(state["ever_active"][name])
        self.generator.set_state(state["generator"].cpu())
        self.steps = int(state["steps"])
        self._arm()
