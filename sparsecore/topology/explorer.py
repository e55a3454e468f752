"""Dynamic sparse training: every so often, prune the smallest weights and grow where the gradient is largest."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparsecore.errors import TopologyError
from sparsecore.nn.base import SparseModule
from sparsecore.ops.explore import GradientSource
from sparsecore.ops.recording import forget, watch
from sparsecore.topology.accumulate import RowAccumulator
from sparsecore.topology.checks import (
    expect_held,
    expect_names,
    expect_state,
    expect_told,
    own_generator,
    realignable,
)
from sparsecore.topology.grow import plan_exchange
from sparsecore.topology.history import EverActive
from sparsecore.topology.ranks import Ranks, SummedGradient, expect_layout
from sparsecore.topology.report import ExplorationReport, LayerReport
from sparsecore.topology.rewrite import Exchange, rewrite
from sparsecore.topology.schedule import Timetable
from sparsecore.topology.use import Recorder

__all__ = ["DynamicSparsity"]


class DynamicSparsity:
    """Prune and grow the sparse weights of a model while it trains, at a constant number of nonzeros.

    Every ``interval`` steps, for each sparse weight on its own: with ``rho`` from the schedule and
    ``k = ceil(rho * nnz)``, the k weights of smallest magnitude are pruned, and the k positions of largest gradient
    among all that are not stored now (those just pruned included) are grown. Where fewer than k have a gradient,
    random free positions fill up, so nnz is the same after every step. A weight that was pruned and grown at once
    keeps its value and optimizer state; a new one starts at 0 with fresh state. The gradient is that of the last
    step's batch (all micro-batches of it), computed in blocks at explorations only.

    This is Dynamic Sparse Learning (arXiv 2402.02855) with its budget drift removed. RigL (Evci et al., 2020) is
    ``drop_fraction=0.3, end_drop_fraction=0`` with ``total_steps`` three quarters of the run (no step after them
    explores); SET (Mocanu et al., 2018) ``grow="random", schedule="constant", drop_fraction=0.3``.

    Args:
        model: any model with at least one sparse module.
        optimizer: the optimizer (or several) that holds the values.
        interval: steps between explorations; None never explores (static sparsity).
        drop_fraction: rho at the start.
        end_drop_fraction: rho at ``total_steps``.
        total_steps: length of the run, in calls of ``step()``; may be left out if ``interval`` is None.
        schedule: ``"cosine"``, ``"linear"`` or ``"constant"``.
        stop_fraction: explorations end after this fraction of ``total_steps``. At 1 the last one may be at the very
            last step, and what it grows stays 0: with ``schedule="constant"`` end earlier.
        grow: ``"gradient"`` or ``"random"``.
        track_ever_active: remember which positions were ever stored, one bit a position. At density 0.01 that is
            0.125 bytes beside 0.16 for weight, gradient and Adam's moments; without it the report says NaN.
        generator: CPU generator for random growth; the explorer owns it from then on. Seeded from torch's default
            generator if absent.
        process_group: the torch.distributed group whose ranks train copies of this model; the default group if one is
            initialised. Its ranks decide together (the gradient is that of all their batches), and what they decide is
            compared. All of them must build the explorer and take the same steps. Rows of
            tables that are split over the ranks (`sparsecore.shard_rows`) are explored by each rank for itself.

    Raises:
        TopologyError: for a model without sparse weights, an optimizer that does not hold them, or a setting out of
            range; for ranks that do not hold the same index sets, values that FSDP has cut up, and tables that are
            split over other ranks than those of ``process_group``.

    Example:
        >>> explorer = DynamicSparsity(model, optimizer, interval=100, total_steps=10_000)
        >>> for batch in batches:
        ...     loss(model(batch)).backward()
        ...     optimizer.step()
        ...     explorer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        interval: int | None = 100,
        drop_fraction: float = 0.5,
        total_steps: int | None = None,
        end_drop_fraction: float = 0.005,
        schedule: str = "cosine",
        stop_fraction: float = 1.0,
        grow: str = "gradient",
        track_ever_active: bool = True,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        self.timetable = Timetable(
            interval, drop_fraction, total_steps, end_drop_fraction, schedule, stop_fraction, grow
        )
        if not isinstance(model, nn.Module):
            raise TopologyError(
                f"the first argument must be the model, a nn.Module, got {type(model).__name__}"
            )
        self.modules = {
            name: module for name, module in model.named_modules() if isinstance(module, SparseModule)
        }
        if not self.modules:
            raise TopologyError("the model has no sparse weight; call sparsify(model, density) first")
        self.optimizers = realignable(optimizer)
        expect_held(self.modules, self.optimizers)
        self.generator = own_generator(generator)
        tracked = self.modules.items() if track_ever_active else ()
        self.history = {name: EverActive(module.index, module.shape) for name, module in tracked}
        self.steps = 0
        self.ranks = Ranks.find(process_group)
        expect_layout(self.modules, self.ranks)
        self._copies = {name: module for name, module in self.modules.items() if module.row_mesh is None}
        if self.ranks is not None:
            self.ranks.same_state(self.generator)
            self.ranks.check(self._copies)
        self.timetable.warn_if_idle()
        self._begin()

    def _begin(self) -> None:
        self._unreached: set[str] = set()
        self._armed: list[Recorder] = []
        weakref.finalize(self, close, self._armed, [weakref.ref(m) for m in self.modules.values()])
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        # What was recorded for the next exploration belongs to the modules of this explorer.
        return {key: value for key, value in self.__dict__.items() if key not in ("_armed", "_unreached")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @torch.no_grad()
    def step(self) -> ExplorationReport | None:
        """Count one training step; explore if one is due. Call it right after ``optimizer.step()``.

        Returns:
            What was exchanged, or None where no exploration was due.

        Raises:
            TopologyError: if weights or gradients are NaN or infinite. Then nothing has been rewritten: indices,
                values, optimizer state and generator are as they were; so it is for a gradient that came from the
                replay of a CUDA graph, which nobody sees. Also if ranks that train copies of the model came to
                different index sets.
        """
        self.steps += 1
        if not self.timetable.due(self.steps):
            self._arm()
            return None
        fraction = self.timetable.drop_fraction(self.steps)
        before = self.generator.get_state()
        try:
            plans = self._plans(fraction)
        except TopologyError:
            self.generator.set_state(before)
            self._begin_window()
            raise
        layers = {}
        for name, exchange in plans.items():
            module = self.modules[name]
            layers[name] = self._apply(name, module, exchange)
        if self.ranks is not None:
            self.ranks.check(self._copies)
        self._begin_window()
        return ExplorationReport(step=self.steps, drop_fraction=fraction, layers=layers)

    def _apply(self, name: str, module: SparseModule, exchange: Exchange | None) -> LayerReport:
        pruned = new = 0
        if exchange is not None:
            pruned, new = exchange.pruned, rewrite(module, exchange, self.optimizers)
            if name in self.history:
                self.history[name].add(module.index)
        return LayerReport(
            pruned=pruned,
            grown=pruned,
            regrown=pruned - new,
            nnz=module.nnz,
            numel=math.prod(module.shape),
            ever_active=self.history[name].fraction if name in self.history else math.nan,
        )

    @property
    def explores_next(self) -> bool:
        """Whether the step that comes next ends with an exploration: it must not be the replay of a CUDA graph."""
        return self.timetable.due(self.steps + 1)

    def rewind(self, steps: int) -> None:
        """Go on as if this many steps had been taken: to measure a step of a certain kind; not for training."""
        self.steps = steps
        self._arm()

    def _plans(self, fraction: float) -> dict[str, Exchange | None]:
        """Decide the exchanges of all weights; what one rank refuses, all refuse."""
        expect_layout(self.modules, self.ranks)
        expect_held(self.modules, self.optimizers)
        plans: dict[str, Exchange | None] = {}
        refused: TopologyError | None = None
        for (name, module), source in zip(self.modules.items(), self._sources(), strict=True):
            generator = self.generator
            if name not in self._copies and self.ranks is not None:
                generator = self.ranks.own(self.generator)
            try:
                plans[name] = self._plan(name, module, source, fraction, generator)
            except TopologyError as error:
                if name in self._copies:
                    raise  # so do all other ranks
                refused = error
        stop = refused is not None
        if self.ranks is not None and len(self._copies) < len(self.modules):
            stop = self.ranks.any([stop], next(iter(self.modules.values())).values.device)[0]
        if stop:
            raise refused or TopologyError("another rank refused to explore its rows: nothing was rewritten")
        return plans

    def _plan(
        self, name: str, module: SparseModule, source: GradientSource | str | None, fraction: float,
        generator: torch.Generator,
    ) -> Exchange | None:  # fmt: skip
        """Decide the exchange of one weight without touching it."""
        if source is None or not module.values.requires_grad or module.nnz == math.prod(module.shape):
            return None
        scores = None if isinstance(source, str) else source
        return plan_exchange(module, math.ceil(fraction * module.nnz), scores, generator, name or "the model")

    def _sources(self) -> list[GradientSource | str | None]:
        """Where each weight has its growth scores from; None if it has seen no gradient since the last exploration."""
        if self.timetable.grow == "random":
            return [_RANDOM for _ in self.modules]
        modules = list(self.modules.values())
        found = [getattr(module, "accumulator", None) or module._recorder for module in modules]
        mine = [source if source is not None and source.uses else None for source in found]
        used = [source is not None for source in mine]
        if self.ranks is not None:  # one that this rank's batch left out has a gradient from the others
            used = self.ranks.any(used, modules[0].values.device)
        for name, source, anyone in zip(self.modules, found, used, strict=True):
            if isinstance(source, Recorder) and not anyone:
                expect_told(source, self.modules[name].values, name or "the model")
                self._warn_of(name)
        if self.ranks is None:
            return list(mine)
        return [
            SummedGradient(source, self.ranks, module.values, module.shape[1])
            if anyone and module.row_mesh is None
            else source
            for source, module, anyone in zip(mine, modules, used, strict=True)
        ]

    def _warn_of(self, name: str) -> None:
        """Once for a weight: perhaps it is just not used by this batch, perhaps it never will be."""
        if self.modules[name].values.requires_grad and name not in self._unreached:
            self._unreached.add(name)
            warnings.warn(
                f"no gradient has come to {name or 'the model'} by its own forward pass in this step: it was not "
                "explored. If that is so at every step, something reads its weight past it (layer.weight is for "
                "reading, and trains nothing): leave that module dense (sparsify's exclude=)",
                stacklevel=6,  # whoever calls step(), which torch.no_grad wraps
            )

    def _begin_window(self) -> None:
        """An exploration is over, or was refused: what was gathered for it is used up."""
        for accumulator in self.accumulators().values():
            accumulator.reset()
        self._arm()

    def _arm(self) -> None:
        """Let modules record their uses exactly when the next step explores; drop older records."""
        by_gradient = self.timetable.grow == "gradient"
        record, to_come = by_gradient and self.explores_next, self.timetable.to_come(self.steps)
        for module in self.modules.values():
            if module._recorder is not None:
                module._recorder.close()
                module._recorder = None
        self._armed.clear()
        for module in self.modules.values():
            accumulator = getattr(module, "accumulator", None)
            if accumulator is not None and by_gradient:
                if to_come:  # sums over all steps of a window that an exploration ends
                    watch(module.index[0], accumulator)
                    accumulator.owner = id(self._armed)
                elif accumulator.owner == id(self._armed):
                    forget(module.index[0], accumulator)
            elif record:
                module._recorder = Recorder(module.values, module.index, module.shape, module.empty_row)
                self._armed.append(module._recorder)

    def accumulators(self) -> dict[str, RowAccumulator]:
        """The row accumulators of tables that have one, by module name."""
        found = {name: getattr(module, "accumulator", None) for name, module in self.modules.items()}
        return {name: accumulator for name, accumulator in found.items() if accumulator is not None}

    def state_dict(self) -> dict[str, Any]:
        """Everything that continuing needs: tensors, numbers and strings only."""
        accumulators = {name: a.state_dict() for name, a in self.accumulators().items()}
        return {
            "weights": self._shapes(),
            "steps": self.steps,
            "generator": self.generator.get_state(),
            "timetable": self.timetable.settings(),
            "ever_active": {name: history.bits for name, history in self.history.items()},
            "accumulators": accumulators,
        }

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(module.shape) for name, module in self.modules.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of an explorer of the same model and settings.

        Raises:
            TopologyError: if names, sizes or settings differ; then nothing is changed.
        """
        expect_state(state, self._shapes(), bool(self.history))
        self.timetable.expect(state["timetable"])
        expect_names(state["ever_active"], self.history)
        for name, bits in state["ever_active"].items():
            self.history[name].expect(bits, name)
        for name, accumulator in self.accumulators().items():
            accumulator.expect(state["accumulators"].get(name, {}), name, self.modules[name].shape[0])
        for name, bits in state["ever_active"].items():
            self.history[name].load(bits)
        for name, accumulator in self.accumulators().items():
            accumulator.load_state_dict(state["accumulators"].get(name, {}))
        self.generator.set_state(state["generator"].cpu())
        self.steps = int(state["steps"])
        self._arm()


_RANDOM = "random"


def close(armed: list[Recorder], modules: list[weakref.ref[SparseModule]]) -> None:
    """An explorer is gone: its modules record nothing more for it."""
    for module in filter(None, (reference() for reference in modules)):
        accumulator = getattr(module, "accumulator", None)
        if accumulator is not None and accumulator.owner == id(armed):
            forget(module.index[0], accumulator)
    for recorder in armed:
        recorder.close()
        recorder.discard()
