"""Operations and training steps on a GPU; without one all figures are missing."""

from __future__ import annotations

from harness.suite import asv


@asv.tracked(*asv.GROUPS["device"])
class Device:
    """Operations and training steps on a GPU."""

    params = asv.cells("device", quick=False)
    param_names = ("workload", "form")
    timeout = 1800

    def setup_cache(self) -> asv.Cache:
        return asv.measured(self.params[0])

    setup_cache.timeout = 1800  # type: ignore[attr-defined]
