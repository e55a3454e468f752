"""What kernels do differently on different processors. It depends on the processor's name and features, and on what
numba was told of them, never on a timing: the same machine must choose the same sums in every run.

Measured on Zen 5 and on Zen 4, whose choices hold for all others.
"""

from __future__ import annotations

from llvmlite.binding import get_host_cpu_features, get_host_cpu_name
from numba.core import config

__all__ = ["FAR", "INDEX_AHEAD", "PORTABLE", "VALUES_AHEAD", "ZEN_5", "has_avx2", "has_avx512"]

PORTABLE = (
    "haswell",
    "",
)  # numba's name and features of a processor without AVX-512, for `SPARSECORE_SIMD=portable`

ZEN_5 = get_host_cpu_name() == "znver5"

# Rows between asking for a row's index, asking for its values, and reading them.
INDEX_AHEAD, VALUES_AHEAD = (64, 32) if ZEN_5 else (32, 16)

# The cache that is asked to hold a row of a large table, as LLVM counts: 3 the nearest, 2 the second. With 3 lookups,
# products of pairs and hops took longer on Zen 4, most likely because the nearest has fewer requests under way. 2 was
# not tried on Zen 5; Zen 3 has it unmeasured.
FAR = 3 if ZEN_5 else 2


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
