"""Import, saving and loading."""

from __future__ import annotations

from harness.suite import asv


@asv.tracked(*asv.GROUPS["other"])
class Other:
    """Import, saving and loading."""

    params = asv.cells("other", quick=True)
    param_names = ("workload", "form")
    timeout = 1800

    def setup_cache(self) -> asv.Cache:
        return asv.measured(self.params[0])

    setup_cache.timeout = 1800  # type: ignore[attr-defined]
