"""Single training steps and recommendations of a model, for somebody who counts or times them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

import sparsecore
from recsys.config import Config
from recsys.data import Dataset
from recsys.models.base import Batch
from recsys.recommender import SavedRecommender
from recsys.training.trainer import Trainer
from sparsecore.measure import Timing, interleaved

__all__ = ["StepProbe", "StepTime", "time_recommendations", "time_steps", "typical_user"]


class StepProbe:
    """A fresh trainer that takes one full batch at a time, with or without an exploration at its end.

    Attributes:
        trainer: the trainer; its gradients and optimizer state exist from the beginning.
        interval: steps between explorations, as configured.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.trainer = Trainer(config, dataset)
        self.trainer.model.train()
        self.interval = config.sparsity.interval
        self._batches = self._endless(config.train.batch_size)
        self.step()

    @property
    def explores(self) -> bool:
        """Whether the method moves its weights at all."""
        return self.trainer.explorer is not None

    def step(self) -> None:
        """A training step on the next batch, without exploration."""
        if self.trainer.explorer is not None:
            self.trainer.explorer.rewind(0)
        self.trainer.train_step(next(self._batches))

    def exploring_step(self, phase: Callable[[str], AbstractContextManager] = nullcontext) -> None:
        """A training step that ends with an exploration, at the drop fraction of the middle of the run."""
        assert self.trainer.explorer is not None
        run = self.trainer.config.train.epochs * self.trainer.steps_per_epoch
        self.trainer.explorer.rewind(max(1, run // 2 // self.interval) * self.interval - 1)
        self.trainer.train_step(next(self._batches), phase)

    def macs(self) -> dict[str, float]:
        """Multiply-adds of a step, {"forward", "backward", "exploration"}, with its share of one exploration."""
        counter = sparsecore.MacCounter()
        if self.explores:
            self.exploring_step(counter.phase)
        else:
            self.trainer.train_step(next(self._batches), counter.phase)
        found = {name: float(counter.macs.get(name, 0)) for name in ("forward", "backward", "exploration")}
        found["exploration"] /= self.interval
        return found

    def resident_bytes(self) -> sparsecore.ResidentBytes:
        """What stays allocated between steps."""
        return sparsecore.resident_bytes(
            self.trainer.model, self.trainer.optimizer or (), self.trainer.explorer
        )

    def epoch_seconds(self) -> float:
        """Wall-clock seconds of one whole epoch, sampling and explorations included."""
        trainer, begin = self.trainer, time.perf_counter()
        if trainer.explorer is not None:
            trainer.explorer.rewind(0)
        with trainer.batches() as batches:
            for batch in batches:
                trainer.train_step(batch)
        return time.perf_counter() - begin

    def _endless(self, size: int) -> Iterator[Batch]:
        """Full batches (all batches, if there is but one)."""
        trainer = self.trainer
        while True:
            for batch in trainer.model.batches(trainer.dataset, size, trainer.order):
                if batch.size == size or trainer.steps_per_epoch == 1:
                    yield batch


@dataclass(frozen=True)
class StepTime:
    """Seconds: of a step without exploration, and what one exploration adds (0 if there is none)."""

    step: Timing
    exploration: float
    interval: int

    @property
    def mean(self) -> float:
        """A step with its share of the exploration, from the fastest samples: for ratios."""
        return self.step.minimum + self.exploration / self.interval


def time_steps(probes: Mapping[str, StepProbe], seconds: float) -> dict[str, StepTime]:
    """Time the probes' steps in turns, each as the second of two in a row, and then their explorations."""
    steps = interleaved({name: probe.step for name, probe in probes.items()}, seconds=seconds, warm=1)
    explorers = {name: probe.exploring_step for name, probe in probes.items() if probe.explores}
    exploring = interleaved(explorers, seconds=seconds / 2) if explorers else {}
    times = {}
    for name, probe in probes.items():
        extra = max(0.0, exploring[name].minimum - steps[name].minimum) if name in exploring else 0.0
        times[name] = StepTime(steps[name], extra, probe.interval)
    return times


def time_recommendations(
    servers: dict[str, SavedRecommender], user: int | str, seconds: float
) -> dict[str, float]:
    """Milliseconds from a raw user id to ten raw item ids, in turns."""

    def asker(server: SavedRecommender) -> Callable[[], object]:
        return lambda: server.recommend(user)

    timings = interleaved({name: asker(server) for name, server in servers.items()}, seconds=seconds)
    return {name: 1e3 * timing.minimum for name, timing in timings.items()}


def typical_user(dataset: Dataset) -> int | str:
    """Raw id of a user of median activity."""
    counts = np.diff(dataset.train.indptr)
    row = int(np.argsort(counts, kind="stable")[len(counts) // 2])
    return dataset.user_ids[row].item()
