"""Measures sparsecore, recsys and your own models: multiply-adds, memory, time as ratios; gate, history, report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.comparison import Comparison, Measured, compare

__all__ = ["Comparison", "Measured", "compare"]


def __getattr__(name: str) -> Any:
    # Not imported at once: the command's help, and pytest's plug-in, come without torch.
    if name in __all__:
        from harness import comparison

        return getattr(comparison, name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
