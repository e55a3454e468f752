"""Quality after a fixed short training, and its gap to dense."""

from __future__ import annotations

from harness.suite import asv


@asv.tracked(*asv.GROUPS["quality"])
class Quality:
    """Quality after a fixed short training, and its gap to dense."""

    params = asv.cells("quality", quick=True)
    param_names = ("workload", "form")
    timeout = 1800

    def setup_cache(self) -> asv.Cache:
        return asv.measured(self.params[0])

    setup_cache.timeout = 1800  # type: ignore[attr-defined]
