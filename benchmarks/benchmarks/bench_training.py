"""Training steps of all six models: dense, masked, static and dynamic sparse."""

from __future__ import annotations

from harness.suite import asv


@asv.tracked(*asv.GROUPS["train"])
class TrainingSmall:
    """Small shapes: part of a quick run."""

    params = asv.cells("train", quick=True)
    param_names = ("workload", "form")
    timeout = 1800

    def setup_cache(self) -> asv.Cache:
        return asv.measured(self.params[0])

    setup_cache.timeout = 1800  # type: ignore[attr-defined]


@asv.tracked(*asv.GROUPS["train"])
class TrainingReal:
    """Shapes of published work."""

    params = asv.cells("train", quick=False)
    param_names = ("workload", "form")
    timeout = 1800

    def setup_cache(self) -> asv.Cache:
        return asv.measured(self.params[0])

    setup_cache.timeout = 1800  # type: ignore[attr-defined]
