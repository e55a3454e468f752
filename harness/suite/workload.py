"""What a workload is: forms of one computation, and what is counted of each."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

__all__ = ["METRICS", "Form", "Group", "Lacks", "Metric", "Missing", "Workload", "density_of", "method_of"]

Group = Literal["operation", "layer", "train", "infer", "quality", "device", "other"]


class Missing(Exception):
    """The revision that is measured, or this machine, lacks what a workload needs; the text says what."""


class Lacks(Missing):
    """It is the revision."""


@dataclass(frozen=True)
class Metric:
    """A figure; of all of them, less is better.

    Attributes:
        unit: "MACs", "bytes", "s", "1" for shares.
        kind: "count" is exact, so that any increase is real; "ratio" is a ratio of times that decides when repeated;
            "quality" is exact for the same arithmetic, and noisy when the order of additions changes; "report" is for
            reading only.
        what: in words.
    """

    unit: str
    kind: Literal["count", "ratio", "quality", "report"]
    what: str


METRICS: dict[str, Metric] = {
    "macs": Metric("MACs", "count", "multiply-adds of a call, an exploration's share included"),
    "macs_forward": Metric("MACs", "count", "multiply-adds of the forward pass"),
    "macs_backward": Metric("MACs", "count", "multiply-adds of the backward pass"),
    "macs_exploration": Metric("MACs", "count", "multiply-adds of an exploration / steps between two"),
    "macs_vs_dense": Metric("1", "report", "macs / those of the dense form"),
    "resident_bytes": Metric("bytes", "count", "weights, indices, gradients, optimizer state, masks, graphs"),
    "state_bytes": Metric("bytes", "count", "optimizer state alone"),
    "bytes_vs_dense": Metric("1", "report", "resident_bytes / those of the dense form"),
    "peak_bytes": Metric(
        "bytes", "count", "most that a call holds beyond what was there before, of torch's memory"
    ),
    "peak_vs_dense": Metric("1", "report", "peak_bytes / those of the dense form"),
    "file_bytes": Metric("bytes", "count", "size of the saved model"),
    "time_vs_frozen": Metric("1", "ratio", "fastest time / that of a frozen kernel in the same process"),
    "time_vs_dense": Metric("1", "report", "fastest time / that of the dense form in the same process"),
    "time_vs_masked": Metric("1", "report", "fastest time / that of masked dense in the same process"),
    "seconds": Metric("s", "report", "fastest time"),
    "noise": Metric("1", "report", "median time / fastest time - 1"),
    "quality_loss": Metric("1", "quality", "1 - NDCG@20 after a fixed short training, mean over seeds"),
    **{
        f"quality_loss_{seed}": Metric("1", "report", f"quality_loss of seed {seed} alone")
        for seed in range(3)
    },
    "quality_gap": Metric("1", "report", "1 - NDCG@20 / that of the dense form"),
}


@dataclass(frozen=True)
class Form:
    """One way to compute a workload.

    Attributes:
        run: one call; what is timed. None if there is nothing to time.
        counts: exact figures, names of `METRICS` to values; called once, after `run` was called once. None if there is
            nothing to count, peak memory included.
        peak: what peak memory is taken of; None takes `run`.
    """

    run: Callable[[], object] | None
    counts: Callable[[], Mapping[str, float]] | None = dict
    peak: Callable[[], object] | None = None


@dataclass(frozen=True)
class Workload:
    """Something to measure.

    Attributes:
        name: unique. A shape is part of it, because figures of two shapes do not compare; neither do those before and
            after any other change of what is computed, which therefore takes a new name.
        group: of what kind.
        what: in words.
        forms: names of the forms that `build` makes, "frozen" left out: "dense", or method@density.
        build: makes the forms by name. "frozen" is the reference that never changes; "dense/..." are further ways to
            compute the dense form: the fastest of all is its time.
        needs: dotted names of sparsecore and recsys without which a revision cannot run it.
        data: folder of SPARSECORE_DATA that it needs, or None.
        quick: part of a quick run.
        device: where it runs; "cuda" is missing on a machine without one, and is timed by events, from cold caches.
        samples: calls of each form to time, at least; each comes after one that is not timed, unless this is below 5.
    """

    name: str
    group: Group
    what: str
    forms: tuple[str, ...]
    build: Callable[[], Mapping[str, Form]]
    needs: tuple[str, ...] = ()
    data: str | None = None
    quick: bool = False
    samples: int = 5
    device: str = "cpu"

    def check(self) -> None:
        """Raise Missing if the imported revision or this machine lacks something."""
        for name in self.needs:
            _resolve(name)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise Missing("no CUDA device")
        if self.data and not (Path(os.environ.get("SPARSECORE_DATA", "")) / self.data).is_dir():
            raise Missing(f"{self.data} is not in SPARSECORE_DATA")


def _resolve(name: str) -> None:
    """Raise Missing unless a module, or an attribute of one, has this dotted name."""
    parts = name.split(".")
    found: object | None = None
    for depth in range(len(parts), 0, -1):
        module = ".".join(parts[:depth])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            # A module of ours that imports what is not there is broken, not missing.
            if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
                raise
            continue
        for attribute in parts[depth:]:
            if not hasattr(found, attribute):
                raise Lacks(f"this revision has no {name}")
            found = getattr(found, attribute)
        return
    raise Lacks(f"this revision has no {name}")


def method_of(form: str) -> str:
    """ "dsl" of "dsl@0.25"; "dense" of "dense"."""
    return form.partition("@")[0]


def density_of(form: str) -> float:
    """0.25 of "dsl@0.25"; 1 of "dense"."""
    return float(form.partition("@")[2] or 1.0)
