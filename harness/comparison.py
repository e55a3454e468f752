"""Measures functions of your own against each other: times in turns, multiply-adds, memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

import sparsecore
from harness.suite.measure import peak_bytes
from sparsecore.errors import SparsecoreError
from sparsecore.measure import Timing, interleaved

__all__ = ["Comparison", "Measured", "compare"]


@dataclass(frozen=True)
class Measured:
    """Of one function.

    Attributes:
        time: fastest and middle call, s.
        ratio: fastest time / that of the baseline: below 1 is faster.
        low, high: of 90 % of the ratios that resampled calls give: how far to trust it.
        macs: multiply-adds of a call, exact (`sparsecore.MacCounter`).
        peak_bytes: most that a call holds beyond what was held before it, of torch's memory.
    """

    time: Timing
    ratio: float
    low: float
    high: float
    macs: int
    peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Functions by name; printed, it is a table."""

    baseline: str
    measured: dict[str, Measured]

    def __getitem__(self, name: str) -> Measured:
        return self.measured[name]

    def __str__(self) -> str:
        width = max(len(name) for name in self.measured)
        lines = [f"{'':{width}}  time of {self.baseline}     90 % of it      ms       MACs       peak"]
        lines += [
            f"{name:{width}}  {m.ratio:{8 + len(self.baseline)}.3f}  {m.low:6.3f}-{m.high:.3f} "
            f"{1e3 * m.time.minimum:8.3f} {m.macs:10,} {m.peak_bytes:10,}"
            for name, m in self.measured.items()
        ]
        return "\n".join(lines)


def compare(
    functions: Mapping[str, Callable[[], object]],
    *,
    baseline: str | None = None,
    seconds: float = 2.0,
    rounds: int = 5,
) -> Comparison:
    """Compare functions that do the same thing.

    They run in one process, in turns, without garbage collection; a ratio is that of the fastest calls. Its spread
    comes from `rounds` parts of the time, resampled.

    Args:
        functions: by name; each is a call without arguments, such as a training step.
        baseline: what ratios are held against; by default ``"dense"`` if there is one, else the first.
        seconds: of timing in all.
        rounds: parts, at least 2.

    Raises:
        SparsecoreError: fewer than two functions or rounds, or no such baseline.

    Example:
        >>> print(harness.compare({"dense": dense_step, "sparse": sparse_step}))
    """
    if len(functions) < 2 or rounds < 2:
        raise SparsecoreError(
            f"expected at least two functions and two rounds, got {len(functions)} and {rounds}"
        )
    base = baseline or ("dense" if "dense" in functions else next(iter(functions)))
    if base not in functions:
        raise SparsecoreError(f"baseline {base!r}: expected one of {', '.join(functions)}")
    run = {name: _awaited(function) for name, function in functions.items()}
    parts = [interleaved(run, seconds / rounds, least=3, warm=1) for _ in range(rounds)]
    counted = {name: _count(function) for name, function in functions.items()}
    found = {}
    for name in functions:
        low, high = _spread([part[name].minimum for part in parts], [part[base].minimum for part in parts])
        time = Timing(
            min(part[name].minimum for part in parts),
            median(part[name].median for part in parts),
            sum(part[name].samples for part in parts),
        )
        fastest = min(part[base].minimum for part in parts)
        found[name] = Measured(time, time.minimum / fastest, low, high, *counted[name])
    return Comparison(base, found)


def _awaited(function: Callable[[], object]) -> Callable[[], object]:
    """What a call started on a GPU has ended when it returns."""
    if not torch.cuda.is_available():
        return function

    def call() -> None:
        function()
        torch.cuda.synchronize()

    return call


def _count(function: Callable[[], object]) -> tuple[int, int]:
    counter = sparsecore.MacCounter()
    with counter.phase("call"):
        function()
    return counter.total, peak_bytes(function)


def _spread(own: list[float], base: list[float]) -> tuple[float, float]:
    """5th and 95th of a hundred ratios of minima over parts drawn with replacement, the same for both."""
    draw = random.Random(0)
    ratios = []
    for _ in range(100):
        chosen = draw.choices(range(len(own)), k=len(own))
        ratios.append(min(own[i] for i in chosen) / min(base[i] for i in chosen))
    ratios.sort()
    return ratios[4], ratios[94]
