"""Recommendations of all six models."""

from __future__ import annotations

from harness.suite import asv


@asv.tracked(*asv.GROUPS["infer"])
class InferenceSmall:
    """Small shapes: part of a quick run."""

    params = asv.cells("infer", quick=True)
    param_names = ("workload", "form")
    timeout = 1800

    def setup_cache(self) -> asv.Cache:
        return asv.measured(self.params[0])

    setup_cache.timeout = 1800  # type: ignore[attr-defined]


@asv.tracked(*asv.GROUPS["infer"])
class InferenceReal:
    """Shapes of published work."""

    params = asv.cells("infer", quick=False)
    param_names = ("workload", "form")
    timeout = 1800

    def setup_cache(self) -> asv.Cache:
        return asv.measured(self.params[0])

    setup_cache.timeout = 1800  # type: ignore[attr-defined]
