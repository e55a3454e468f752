"""What kernels do differently on different processors. It depends on the processor's name alone, never on a timing:
the same machine must choose the same sums in every run.

Measured on Zen 5 and on Zen 4, whose choices hold for processors that were not measured.
"""

from __future__ import annotations

from llvmlite.binding import get_host_cpu_name

__all__ = ["INDEX_AHEAD", "MOST_ROW_LINES", "VALUES_AHEAD", "ZEN_5"]

ZEN_5 = get_host_cpu_name() == "znver5"

# Rows between asking for a row's index, asking for its values, and reading them; and cache lines of values to ask for.
# Zen 4 has fewer requests under way: asking for more, or earlier, took 1.1 to 1.25 times as long there (1M x 64, 16384
# rows, densities 0.5 to 0.1), while Zen 5 wants every line that a row's last vector touches.
INDEX_AHEAD, VALUES_AHEAD, MOST_ROW_LINES = (64, 32, 8) if ZEN_5 else (16, 8, 3)
