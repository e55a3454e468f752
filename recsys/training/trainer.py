"""Model, optimizer and explorer of a run, and the steps and epochs that change them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparsecore
from recsys.config import Config
from recsys.data import Dataset, EvalSet
from recsys.errors import RecsysError
from recsys.evaluation import Ranking
from recsys.machine import usable_cores
from recsys.models.base import Batch, Recommender
from recsys.models.devices import find_device, moved
from recsys.models.fitted import Fitted
from recsys.training.densities import density_of, nnz_per_tensor
from recsys.training.evaluator import Evaluator
from recsys.training.initial import make_model
from recsys.training.parts import make_explorer, make_optimizer, make_schedule, steps_of_epoch
from recsys.training.prefetch import prefetch

__all__ = ["Trainer"]

_AHEAD = 4  # batches that are made in advance: enough that two threads seldom wait for one another


class Trainer:
    """Trains one model on one data set, epoch by epoch; its state can be saved between any two of them.

    Dense, masked, static and dsl differ in two lines: the density of the layers, and the explorer. Everything
        random follows from `config.train.seed`, in three separate streams (model, order of the data,
        exploration), so that two methods with the same seed see the same batches with the same dropout. Masked
        begins with the index sets and values that static and dsl begin with.

    The model is on `config.train.device`; batches and noise are drawn on the CPU all the same.

    Args:
        config, dataset: what to train, and on what.
        fresh: take the initial weights that `config.train.pretrained` names, as a new run does; false for a trainer
            that is given its weights (a run that is resumed or evaluated).

    Attributes:
        model, optimizer, explorer: explorer is None for dense; a model that is `Fitted` has no optimizer either.
        epoch, step: how many are complete.
        best_epoch, best_value, best_weights: by validation `config.train.metric`; None before the first
            evaluation. Without validation users, the last epoch.
        seconds: spent on training steps so far, without evaluation.
        resident: bytes that training holds between two steps, by what they are for; see
            `sparsecore.resident_bytes`.
        macs: multiply-adds of a step, {"forward", "backward", "exploration"}: counted in the first step, and in the
            first exploration, of which a step has its share, 1 / `config.sparsity.interval`.
    """

    def __init__(self, config: Config, dataset: Dataset, *, fresh: bool = True) -> None:
        self.config, self.dataset = config, dataset
        sparsity, train = config.sparsity, config.train
        model_seed, order_seed, explorer_seed = np.random.SeedSequence(train.seed).generate_state(3)
        self.order = torch.Generator().manual_seed(int(order_seed))
        self.density = density_of(config)
        self.model: Recommender
        self.model, masks = make_model(config, dataset, int(model_seed), fresh)
        # Initial values and index sets are drawn on the CPU: the same ones for every device.
        self.device = torch.device("cpu") if isinstance(self.model, Fitted) else find_device(train.device)
        self.model.to(self.device)
        self.steps_per_epoch = steps_of_epoch(self.model, dataset, train.batch_size)
        self.optimizer: torch.optim.Optimizer | None = None
        self.schedule: torch.optim.lr_scheduler.LRScheduler | None = None
        self.explorer: sparsecore.DynamicSparsity | sparsecore.MaskedSparsity | None = None
        if not isinstance(self.model, Fitted):
            steps = train.epochs * self.steps_per_epoch
            self.optimizer = make_optimizer(self.model, train)
            self.schedule = make_schedule(self.optimizer, train, steps)
            exploring = torch.Generator().manual_seed(int(explorer_seed))
            self.explorer = make_explorer(
                self.model, self.optimizer, sparsity, self.density, steps, exploring, masks
            )
        self.epoch = self.step = 0
        self.best_epoch: int | None = None
        self.best_value = -math.inf
        self.best_metrics: dict[str, float] = {}
        self.best_weights: dict[str, Tensor] | None = None
        self.seconds = 0.0
        self.resident: dict[str, int] = {}
        self.macs: dict[str, float] = {}
        self._report: Any = None
        self.evaluator = Evaluator(config, dataset)

    @property
    def selects(self) -> bool:
        """Whether there are validation users to choose an epoch by; without them the last epoch is taken."""
        return len(self.dataset.validation.rows_with_targets) > 0

    @property
    def last_epoch(self) -> int:
        """The number of epochs to train at most; one, the fit, for a model that is `Fitted`."""
        train = self.config.train
        return 1 if isinstance(self.model, Fitted) else train.stop_epoch or train.epochs

    @property
    def finished(self) -> bool:
        """All epochs done, or at an evaluation none was better than the best for `patience` epochs."""
        train = self.config.train
        evaluated = self.epoch - self.epoch % train.evaluate_every
        stalled = 0 < train.patience <= evaluated - (self.best_epoch or evaluated)
        return stalled or self.epoch >= self.last_epoch

    def train_step(
        self, batch: Batch, phase: Callable[[str], AbstractContextManager] = nullcontext
    ) -> Tensor:
        """One update, with exploration when it is due; returns the loss before it.

        `phase("forward")` and likewise "backward", "update" and "exploration" are entered around the parts,
        for somebody who counts or times them.
        """
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        rounded = self.config.train.precision == "bfloat16"
        with phase("forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=rounded):
            loss = self.model.loss(batch, self.step)
        with phase("backward"):
            loss.backward()
        with phase("update"):
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
        self.step += 1
        if self.explorer is not None:
            try:
                with phase("exploration"):
                    report = self.explorer.step()
            except sparsecore.TopologyError as error:
                if all(bool(p.isfinite().all()) for p in (loss, *self.model.parameters())):
                    raise
                raise self._diverged("weights are NaN or infinite", self.epoch + 1) from error
            if report is not None:
                self._report = report
        return loss.detach()

    def _counted_step(self, batch: Batch) -> Tensor:
        """`train_step`, and its multiply-adds where they are not known yet."""
        first, exploration = self.step == 0, "exploration" not in self.macs and self.explorer is not None
        if not first and not exploration:
            return self.train_step(batch)
        counter = sparsecore.MacCounter()
        counted = {"forward", "backward"} if first else set()
        counted |= {"exploration"} if exploration else set()
        before = self._report
        loss = self.train_step(batch, lambda name: counter.phase(name) if name in counted else nullcontext())
        if first:
            self.macs = {name: float(counter.macs[name]) for name in ("forward", "backward")}
        if exploration and self._report is not before:
            self.macs["exploration"] = counter.macs["exploration"] / self.config.sparsity.interval
        return loss

    def _diverged(self, what: str, epoch: int) -> RecsysError:
        return RecsysError(
            f"{what} in epoch {epoch}: training has diverged; lower train.lr (it was {self.config.train.lr}) or choose "
            "another train.seed"
        )

    def batches(self) -> closing[Generator[Batch, None, None]]:
        """One epoch of batches; closing them ends it.

        They are made in a thread of their own where training leaves it a core (as if nothing else were running), or
        runs on another device. Where torch's threads fill the cores, steps would take longer beside one more thread:
        every operation waits for the one that has none.

        `order` is ahead of the batches until they are exhausted. If they are left before, it is put back to where it
        was: an epoch counts as a whole or not at all.
        """
        return closing(self._batches())

    def _batches(self) -> Generator[Batch, None, None]:
        before = self.order.get_state()
        made = self.model.batches(self.dataset, self.config.train.batch_size, self.order)
        try:
            if self.device.type != "cpu":
                made = (moved(batch, self.device) for batch in made)
            elif torch.get_num_threads() >= usable_cores():
                yield from made
                return
            with closing(prefetch(made, _AHEAD)) as batches:
                yield from batches
        except BaseException:
            self.order.set_state(before)
            raise

    def run_epoch(self, on_step: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Train on every batch once, or fit a model that is `Fitted`, and evaluate if it is time; returns the record
        for the log.

        Raises:
            RecsysError: if the loss is no longer finite.
        """
        train = self.config.train
        self.model.train()
        self._report = None
        started = time.perf_counter()
        if isinstance(self.model, Fitted):
            self.model.fit(self.dataset.train)
        total, count, explorations = torch.zeros((), dtype=torch.float64, device=self.device), 0, 0
        with self.batches() as batches:
            for batch in batches:
                before = self._report
                total += self._counted_step(batch) * batch.size
                count += batch.size
                explorations += self._report is not before
                on_step()
        self.epoch += 1
        # Counted here, where gradients and optimizer state exist; a resumed run that is over has none.
        counted = sparsecore.resident_bytes(self.model, self.optimizer or (), self.explorer)
        self.resident = {**dataclasses.asdict(counted), "total": counted.total}
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        report: dict[str, Any] = {"epoch": self.epoch, "step": self.step}
        if count:
            report["loss"] = loss = float(total) / count
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}", self.epoch)
        last = self.epoch >= self.last_epoch
        if not self.selects:
            if last:
                self.best_epoch, self.best_weights = self.epoch, _copied(self.model)
        elif last or self.epoch % train.evaluate_every == 0:
            report["validation"] = self.evaluate_validation()
        report["nnz"] = nnz_per_tensor(self.model, self.explorer)
        report["explorations"] = explorations
        if self._report is not None:
            report["drop_fraction"] = self._report.drop_fraction
            report["grown"], report["regrown"] = self._report.grown, self._report.regrown
            report["ever_active"] = self._report.ever_active
        report["seconds"] = round(elapsed, 4)
        return report

    def evaluate_validation(self) -> dict[str, float]:
        """Validation metrics of the weights as they are; remembers weights that are the best so far."""
        metrics = self.evaluate(self.dataset.validation)
        if metrics[self.config.train.metric] > self.best_value:
            self.best_value, self.best_epoch = metrics[self.config.train.metric], self.epoch
            self.best_metrics = metrics
            self.best_weights = _copied(self.model)
        return metrics

    def evaluate(self, eval_set: EvalSet) -> dict[str, float]:
        """Metrics of the weights as they are on the users of an EvalSet."""
        return self.rank(eval_set).means(self.config.train.ks)

    def rank(self, eval_set: EvalSet) -> Ranking:
        """What `evaluate` averages, by the protocol of `config.evaluation`."""
        training = self.model.training
        self.model.eval()
        try:
            return self.evaluator.rank(self.model, eval_set)
        finally:
            self.model.train(training)

    def load_best(self) -> None:
        """Give the model the weights of the best epoch, for evaluation on test and for saving."""
        assert self.best_weights is not None
        self.model.load_state_dict(self.best_weights)
        self.model.eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but the settings, the data and the best weights."""
        return {
            "config": self.config.hash,
            "split": self.dataset.fingerprint,
            # Whatever a fitted model holds is with the best weights, or can be computed anew.
            "model": None if self.optimizer is None else self.model.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "explorer": None if self.explorer is None else self.explorer.state_dict(),
            "order": self.order.get_state(),
            "noise": {name: noise.get_state() for name, noise in _generators(self.model).items()},
            "epoch": self.epoch,
            "step": self.step,
            "best_epoch": self.best_epoch,
            "best_value": self.best_value,
            "best_metrics": self.best_metrics,
            "seconds": self.seconds,
            "resident": self.resident,
            "macs": self.macs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called.

        Raises:
            RecsysError: if the state was made with other settings, or on other data.
        """
        if state["config"] != self.config.hash:
            raise RecsysError(
                f"the checkpoint was made with other settings ({state['config']}, now {self.config.hash}); "
                "a run can only be resumed with the settings that it was started with, and by a version that has the "
                "same ones: else begin anew (--overwrite; of a sweep, delete the run's folder)"
            )
        self.dataset.expect(state.get("split"), "this run")
        if self.optimizer is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        if self.explorer is not None:
            self.explorer.load_state_dict(state["explorer"])
        self.order.set_state(state["order"])
        for name, noise in _generators(self.model).items():
            noise.set_state(state["noise"][name])
        self.epoch, self.step = state["epoch"], state["step"]
        self.best_epoch, self.best_value = state["best_epoch"], state["best_value"]
        self.best_metrics, self.seconds = state["best_metrics"], state["seconds"]
        self.resident, self.macs = state["resident"], state["macs"]


def _copied(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, Fitted):
        return model.state_dict()  # large, and once fitted it does not change
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _generators(model: nn.Module) -> dict[str, torch.Generator]:
    """The generators that a model's loss draws from."""
    return {name: value for name, value in vars(model).items() if isinstance(value, torch.Generator)}
