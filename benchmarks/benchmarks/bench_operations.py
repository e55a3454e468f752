"""Every operator of `sparsecore.ops`, in every encoding and at every density; an exploration and optimizers' steps."""

from __future__ import annotations

from harness.suite import asv


@asv.tracked(*asv.GROUPS["operation"])
class OperationsSmall:
    """Small shapes: part of a quick run."""

    params = asv.cells("operation", quick=True)
    param_names = ("workload", "form")
    timeout = 1800

    def setup_cache(self) -> asv.Cache:
        return asv.measured(self.params[0])

    setup_cache.timeout = 1800  # type: ignore[attr-defined]


@asv.tracked(*asv.GROUPS["operation"])
class OperationsReal:
    """Shapes of published work."""

    params = asv.cells("operation", quick=False)
    param_names = ("workload", "form")
    timeout = 1800

    def setup_cache(self) -> asv.Cache:
        return asv.measured(self.params[0])

    setup_cache.timeout = 1800  # type: ignore[attr-defined]
