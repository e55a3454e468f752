"""What kernels do differently on different processors. It depends on the processor's name and features, and on what
numba was told of them, never on a timing: the same machine must choose the same sums in every run.

Measured on Zen 5 and on Zen 4, whose choices hold for processors that were not measured.
"""

from __future__ import annotations

from llvmlite.binding import get_host_cpu_features, get_host_cpu_name
from numba.core import config

__all__ = ["INDEX_AHEAD", "MOST_ROW_LINES", "PORTABLE", "VALUES_AHEAD", "ZEN_5", "has_avx2", "has_avx512"]

PORTABLE = (
    "haswell",
    "",
)  # numba's name and features of a processor without AVX-512, for `SPARSECORE_SIMD=portable`

ZEN_5 = get_host_cpu_name() == "znver5"

# Rows between asking for a row's index, asking for its values, and reading them; and cache lines of values to ask for.
# Zen 4 has fewer requests under way: asking for more, or earlier, took 1.1 to 1.25 times as long there (1M x 64, 16384
# rows, densities 0.5 to 0.1), while Zen 5 wants every line that a row's last vector touches.
INDEX_AHEAD, VALUES_AHEAD, MOST_ROW_LINES = (64, 32, 8) if ZEN_5 else (16, 8, 3)


def has_avx512() -> bool:
    """Whether code is compiled for a processor with AVX-512: this one, unless numba was told another."""
    return not _told() and _features("avx512f", "bmi2")


def has_avx2() -> bool:
    """Whether code is compiled for one that has AVX2, and not AVX-512."""
    if _told():
        return (config.CPU_NAME, config.CPU_FEATURES) == PORTABLE
    return _features("avx2") and not has_avx512()


def _told() -> bool:
    return bool(config.CPU_NAME or config.CPU_FEATURES)


def _features(*names: str) -> bool:
    found = get_host_cpu_features()
    return all(found.get(name, False) for name in names)
