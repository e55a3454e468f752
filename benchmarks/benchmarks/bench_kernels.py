"""Operations against their best dense form: time ratio, lower is better."""

from __future__ import annotations

import os

from harness.ceilings import measure_ceilings
from harness.kernel_cases import CASES, LOSING, densities_of
from harness.kernels import measure

# Tiny shapes, every form once: a smoke test of the suite.
_QUICK = bool(os.environ.get("SPARSECORE_BENCH_QUICK"))
_ALL = {case.name: case for case in (*CASES, *LOSING)}


class Kernels:
    params = tuple(_ALL)
    param_names = ("operation",)
    timeout = 900
    version = "1"

    def setup_cache(self) -> dict[str, dict[float, float]]:
        ceilings = {1: measure_ceilings(1, quick=True)}
        return {
            name: {
                density: 1 / measure(case, density, ceilings, 0.0 if _QUICK else 0.5, _QUICK)[0]["ratio"]
                for density in densities_of(case)
            }
            for name, case in _ALL.items()
            if not case.missing()
        }

    def track_time_vs_dense_at_half(self, found: dict, operation: str) -> float:
        return found[operation][0.5] if operation in found else float("nan")

    def track_time_vs_dense_at_a_tenth(self, found: dict, operation: str) -> float:
        return found[operation].get(0.1, float("nan")) if operation in found else float("nan")

    track_time_vs_dense_at_half.unit = "of dense"  # type: ignore[attr-defined]
    track_time_vs_dense_at_a_tenth.unit = "of dense"  # type: ignore[attr-defined]
