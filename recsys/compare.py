"""Finished runs side by side: quality over seeds, significance, and what each cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from recsys.config import Config
from recsys.errors import RecsysError
from recsys.significance import Paired, paired
from recsys.training.run_folder import RunFolder

__all__ = ["Comparison", "Line", "Spread", "compare_runs"]

_NEEDED = ("split", "protocol", "test", "macs_per_step", "resident_bytes", "seconds", "beyond_accuracy")


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and standard deviation (n - 1); None for one seed."""

    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), sd)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.sd is None else f"±{self.sd:.4f}")


@dataclass(frozen=True)
class Line:
    """The runs that share all settings but the seed; costs are means over them.

    Attributes:
        label: model and method, with the folder where these do not tell.
        kept: fraction of all the model's weights that may differ from zero: more than `density`, which is that of the
            sparse ones, where some stay dense. Of a run by a version that did not count them, `density`.
        test, beyond_accuracy: what metrics.json has under these names.
        macs: multiply-adds of a training step, exploration's share included.
        resident_bytes: held between two training steps.
        seconds: of training, without evaluation.
        against: the metric's difference to the reference, user by user, each user's value averaged over the seeds;
            None for the reference itself.
    """

    label: str
    model: str
    method: str
    density: float
    kept: float
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    test: dict[str, Spread]
    beyond_accuracy: dict[str, float]
    macs: float
    resident_bytes: float
    seconds: float
    against: Paired | None


@dataclass(frozen=True)
class Comparison:
    """What `compare_runs` found; the first line is the reference."""

    dataset: str
    protocol: dict[str, Any]
    metric: str
    lines: tuple[Line, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """Quality, differences to the first line if there are others, cost; each fits a terminal of 80 columns."""
        protocol = f"{self.protocol['ranking']} ranking"
        if self.protocol["ranking"] == "sampled":
            protocol += f", {self.protocol['negatives']} negatives a target"
        k = self.metric.partition("@")[2]
        shown = list(dict.fromkeys([self.metric, f"recall@{k}", f"ndcg@{k}"]))
        quality = _new_table(
            f"{self.dataset}, test, {protocol}",
            "±: standard deviation over seeds.",
            ("density", "seeds", *shown),
        )
        cost = _new_table(
            "cost",
            "Multiply-adds with exploration's share, bytes between two steps, time without evaluation.",
            ("density", "weights kept", "M MACs a step", "resident MB", "seconds of training"),
        )
        for line in self.lines:
            same = (line.label, f"{line.density:g}")
            quality.add_row(*same, f"{len(line.seeds)}", *(str(line.test[name]) for name in shown))
            costs = line.macs / 1e6, line.resident_bytes / 1e6, line.seconds
            cost.add_row(*same, f"{line.kept:.4g}", *map(_short, costs))
        differences = _new_table(
            f"{self.metric} against {self.lines[0].label}",
            "Paired over users, each user's value averaged over seeds; interval: bootstrap. p values are not corrected "
            "for the number of comparisons and say nothing of other seeds.",
            ("density", "difference", "95 % interval", "p (t)", "p (Wilcoxon)"),
        )
        for line in self.lines:
            if line.against is not None:
                found = line.against
                differences.add_row(
                    line.label,
                    f"{line.density:g}",
                    f"{found.difference:+.4f}",
                    f"{found.low:+.4f} .. {found.high:+.4f}",
                    f"{found.t_p:.2g}",
                    f"{found.wilcoxon_p:.2g}",
                )
        return [quality, differences, cost] if differences.row_count else [quality, cost]


def _short(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _new_table(title: str, caption: str, headers: Sequence[str]) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


@dataclass(frozen=True, eq=False)
class _Run:
    path: Path
    config: Config
    metrics: dict[str, Any]
    user_ids: NDArray[Any]
    per_user: dict[str, NDArray[np.float64]]

    @property
    def settings(self) -> str:
        """What tells lines apart, as text, see `_deciding`; not where a refit stopped, which the run before decided."""
        content = _deciding(self.config)
        if not self.metrics["validation"]:
            del content["train"]["stop_epoch"]
        return json.dumps(content, sort_keys=True)


def _deciding(config: Config) -> dict[str, Any]:
    """The settings that decide what comes out, but for the seed and the data, which the hash of the split stands for.

    Runs that weights were taken from have these settings of their own in place of their folder; where that is gone,
    its path has to do.
    """
    content = config.to_dict()
    del content["data"], content["evaluation"]["batch_size"]
    for name in ("seed", "tensorboard", "device"):
        del content["train"][name]
    parts = content["train"].pop("pretrained", {})
    return {**content, "parts": {name: _part(Path(folder)) for name, folder in parts.items()}}


def _part(folder: Path) -> dict[str, Any] | str:
    run = folder if (folder / "config.toml").is_file() else folder.parent  # or its recommender/
    try:
        return _deciding(RunFolder.open(run).config())
    except RecsysError:
        return str(folder)


def compare_runs(paths: Sequence[str | Path], metric: str | None = None) -> Comparison:
    """Compare finished runs on the same test users.

    Runs with the same settings but the seed become one line. The first line, which the others are tested against,
    is the first dense one, or else the first that was given.

    Args:
        paths: folders of runs.
        metric: what to test; what the first run chose its epoch by, if None.

    Raises:
        RecsysError: a folder is not of a run that has ended; runs are on different data, splits or protocols, or
            one is there twice; a run does not have the metric.
    """
    if not paths:
        raise RecsysError("nothing to compare: expected folders of runs")
    runs = [_load(path) for path in paths]
    for run in runs[1:]:
        _expect_comparable(runs[0], run)
    metric = runs[0].config.train.metric if metric is None else metric
    for run in runs:
        if metric not in run.per_user:
            raise RecsysError(f"{run.path} has no {metric!r}; it has: {', '.join(run.per_user)}")
    groups: dict[str, list[_Run]] = {}
    for run in runs:
        groups.setdefault(run.settings, []).append(run)
    given = list(groups.values())
    reference = next((group for group in given if _method(group) == "dense"), given[0])
    ordered = [reference, *(group for group in given if group is not reference)]
    labels = _labels(ordered)
    old = _user_means(reference, metric)
    lines = []
    for label, group in zip(labels, ordered, strict=True):
        against = None if group is reference else paired(_user_means(group, metric), old)
        lines.append(_line(label, group, against))
    one = runs[0].metrics
    return Comparison(one["dataset"]["name"], one["protocol"]["test"], metric, tuple(lines))


def _load(path: str | Path) -> _Run:
    folder = RunFolder.open(path)
    metrics = folder.metrics()
    if metrics is None:
        raise RecsysError(f"{path} has not ended (no metrics.json); continue it with --resume")
    missing = [key for key in _NEEDED if key not in metrics]
    if missing:
        raise RecsysError(
            f"{path} was made by an older version: its metrics.json has no {', '.join(missing)}; "
            "train again with --overwrite"
        )
    if not metrics["test"]:
        raise RecsysError(
            f"{path} was trained on everything (data.everything): it has no test metrics to compare"
        )
    return _Run(Path(path), folder.config(), metrics, *folder.per_user())


def _expect_comparable(one: _Run, other: _Run) -> None:
    for what, key in (("data, or another split of it", "split"), ("protocol", "protocol")):
        ours, theirs = one.metrics[key], other.metrics[key]
        if key == "protocol":
            ours, theirs = ours["test"], theirs["test"]
        if ours != theirs:
            raise RecsysError(
                f"{one.path} and {other.path} cannot be compared: different {what} ({ours} and {theirs}); "
                "expected runs whose train, validation and test parts and ranking are the same (a refit has another "
                "train part than the run that it is of)"
            )
    if not np.array_equal(one.user_ids, other.user_ids):
        raise RecsysError(f"{one.path} and {other.path} cannot be compared: their test users differ")


def _method(group: Sequence[_Run]) -> str:
    return group[0].metrics["method"]


def _labels(groups: Sequence[Sequence[_Run]]) -> list[str]:
    named = [f"{group[0].config.model.name} {_method(group)}" for group in groups]
    densities = [group[0].metrics["density"] for group in groups]
    both = list(zip(named, densities, strict=True))
    return [
        name if both.count((name, density)) == 1 else f"{name} ({folder})"
        for (name, density), folder in zip(both, _folders([group[0].path for group in groups]), strict=True)
    ]


def _folders(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        ends = ["/".join(part[-count:]) for part in parts]
        if len(set(ends)) == len(set(parts)):
            return ends
    return [str(path) for path in paths]


def _user_means(group: Sequence[_Run], metric: str) -> NDArray[np.float64]:
    return np.mean([run.per_user[metric] for run in group], axis=0)


def _line(label: str, group: Sequence[_Run], against: Paired | None) -> Line:
    seeds = [run.config.train.seed for run in group]
    for run, seed in zip(group, seeds, strict=True):
        if seeds.count(seed) > 1:
            raise RecsysError(f"{run.path} is there twice: another run has the same settings and seed {seed}")
    found = [run.metrics for run in group]
    return Line(
        label=label,
        model=group[0].config.model.name,
        method=_method(group),
        density=found[0]["density"],
        kept=_kept(found[0]),
        seeds=tuple(seeds),
        runs=tuple(str(run.path) for run in group),
        test={name: Spread.of([m["test"][name] for m in found]) for name in found[0]["test"]},
        beyond_accuracy=_means([m["beyond_accuracy"] for m in found]),
        macs=math.fsum(_means([m["macs_per_step"] for m in found]).values()),
        resident_bytes=float(np.mean([m["resident_bytes"]["total"] for m in found])),
        seconds=float(np.mean([m["seconds"] for m in found])),
        against=against,
    )


def _kept(metrics: Mapping[str, Any]) -> float:
    if not metrics.get("dense_size"):  # of a fitted model there are none
        return float(metrics["density"])
    return sum(metrics["nnz"].values()) / int(metrics["dense_size"])


def _means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in values])) for name in values[0]}
