"""The tables of a run's settings, all but the model's: data, sparsity, training, evaluation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from recsys.settings import Section

__all__ = ["METRICS", "DataConfig", "EvaluationConfig", "SparsityConfig", "TrainConfig", "nearest"]

_LARGEST_BATCH = 2**31 - 1  # more than any data has; torch counts in 64 bits and fails late
METRICS = ("recall", "ndcg", "hr", "truncated_recall", "mrr", "map")


class DataConfig(Section):
    """What to train on: a name that `recsys.data.load` knows, and its options.

    name: "synthetic", a name of `recsys data list`, or a file or folder.
    dir: the folder of datasets, as --data-dir; none is SPARSECORE_DATA's.
    seed: of synthetic data and of a split that is made here.
    everything: train on validation and test, too, and measure nothing: for a model that is to serve.
    options: how to read and split it, as keyword arguments of `recsys.data.load`: the options of `recsys data prepare`.
    """

    name: str = "synthetic"
    dir: str | None = None
    seed: int = Field(default=0, ge=0)
    everything: bool = False
    options: dict[str, Any] = Field(default={})

    @field_validator("options")
    @classmethod
    def _finite(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key, value in options.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} must be a finite number, got {value}")
        return options


class SparsityConfig(Section):
    """How weights are stored and whether the index sets move.

    method: "dense" (density is not used); "masked": dense tensors times masks with DSL's decisions, the
        simulation that other libraries train with; "static": sparse storage, index sets fixed; "dsl": sparse
        storage and exploration.
    density: fraction of the weights that is kept, of those that are sparse.
    weights: which weights are sparse: "full", all weight matrices and tables; "paper", those that the DSL authors
        prune in this model (in MultVAE also the biases, in NeuMF two of four tables).
    include: in place of `weights`, patterns of the names that are sparse (`recsys.models.layers.Density`).
    exclude: patterns of the names that stay dense all the same.
    interval: updates between two explorations.
    drop_fraction: fraction of the weights kept that an exploration exchanges, at the first update.
    end_drop_fraction: the same at the last of all `epochs`.
    schedule: how the fraction goes from the one to the other; "constant" stays at `drop_fraction`.
    stop_fraction: after this fraction of all updates nothing is explored any more.
    grow: where weights are added: "gradient", where the loss's gradient is largest; "random", anywhere.
    """

    method: Literal["dense", "masked", "static", "dsl"] = "dsl"
    density: float = Field(default=0.25, gt=0, le=1)
    weights: Literal["full", "paper"] = "full"
    include: list[str] = Field(default=[])
    exclude: list[str] = Field(default=[])
    interval: int = Field(default=100, gt=0)
    drop_fraction: float = Field(default=0.5, ge=0, le=1)
    end_drop_fraction: float = Field(default=0.005, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    stop_fraction: float = Field(default=1.0, ge=0, le=1)
    grow: Literal["gradient", "random"] = "gradient"


class TrainConfig(Section):
    """How a model is trained.

    seed: decides initial values, index sets, order of data, dropout and exploration.
    epochs: passes over the data at most.
    batch_size: users, interactions or triples of an update, whatever the model is trained on.
    pretrained: folders of finished runs on the same data that a new run takes parts of its initial weights from, by the
        name of the part: {"gmf": ..., "mlp": ...} for NeuMF. A run that is resumed does not read them again.
    patience: training stops at the first evaluation this many epochs or more after the one with the best validation
        `metric`; 0 never stops early.
    stop_epoch: the epoch after which training ends, while schedules are still those of `epochs`; 0 trains them all. For
        a run that repeats the beginning of another, such as `recsys train --refit`.
    evaluate_every: epochs between two evaluations on validation.
    metric: by which the best epoch is chosen on validation.
    ks: cut-offs that metrics are computed at.
    tensorboard: also log to tensorboard/ in the run's folder (extra "tensorboard").
    optimizer: "adam", or "adagrad" as some models' authors do.
    lr: learning rate.
    lr_schedule: how the rate falls from `lr` at the first update to 0 at the last of `epochs`: "cosine", "linear", or
        "constant", not at all.
    precision: of the products of dense weights in a step, "float32" or "bfloat16" (`torch.autocast`), which is
        faster where the processor has instructions for it. Weights, gradients, optimizer state, losses,
        products of sparse weights and everything in evaluation are float32 all the same. So it has no effect where all
        products are of sparse weights (multvae, cdae, neumf with `sparsity.weights = "full"` by "static" or "dsl"), and
        is refused for models without such products: lightgcn, ultragcn, bprmf, and those that are fitted.
    device: where to train, "cpu" or such as "cuda".
    """

    seed: int = Field(default=0, ge=0)
    epochs: int = Field(default=50, gt=0)
    batch_size: int = Field(default=128, gt=0, le=_LARGEST_BATCH)
    optimizer: Literal["adam", "adagrad"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    pretrained: dict[str, str] = Field(default={})
    patience: int = Field(default=0, ge=0)
    stop_epoch: int = Field(default=0, ge=0)
    evaluate_every: int = Field(default=1, gt=0)
    metric: str = "ndcg@20"
    ks: list[Annotated[int, Field(gt=0)]] = Field(default=[20], min_length=1)
    tensorboard: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"

    @field_validator("ks")
    @classmethod
    def _sorted(cls, ks: list[int]) -> list[int]:
        return sorted(set(ks))

    @model_validator(mode="after")
    def _stops_within_epochs(self) -> TrainConfig:
        if self.stop_epoch > self.epochs:
            raise ValueError(f"stop_epoch {self.stop_epoch} comes after the last of {self.epochs} epochs")
        return self

    @model_validator(mode="after")
    def _metric_is_computed(self) -> TrainConfig:
        valid = [f"{name}@{k}" for k in self.ks for name in METRICS]
        if self.metric not in valid:
            raise ValueError(
                f"metric {self.metric!r} is not computed{nearest(self.metric, valid)}; "
                f"valid with ks = {self.ks}: {', '.join(valid)}"
            )
        return self


class EvaluationConfig(Section):
    """What targets are ranked against, in validation and test alike.

    protocol: "full", the whole catalogue; "sampled", few items for each target (`recsys.evaluation.sampled`).
    negatives: how many for each target ("sampled" only). Where the data comes with published candidates and they are
        this many for a user, those are taken.
    seed: of the draw ("sampled" only), apart from the seed of training.
    batch_size: users scored at once; fewer in full ranking where their scores would take more than 16 MiB or so.
    """

    protocol: Literal["full", "sampled"] = "full"
    negatives: int = Field(default=99, gt=0)
    seed: int = Field(default=0, ge=0)
    batch_size: int = Field(default=512, gt=0, le=_LARGEST_BATCH)

    def describe(self) -> str:
        """The protocol in words."""
        if self.protocol == "full":
            return "full ranking"
        return f"sampled ranking, {self.negatives} negatives a target"


def nearest(name: str, valid: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f", did you mean {match[0]!r}?" if match else ""
