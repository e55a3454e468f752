"""What the kernel benchmark measures, with the targets: operations where sparse should win, and where it may lose."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness import graph_forms, lazy_forms
from harness import kernel_forms as forms
from harness.operands import Forms

__all__ = ["CASES", "LOSING", "SKEWED", "Case", "densities_of"]


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        name: operation and shape.
        build: makes the forms for a density.
        size: arguments of ``build``; ``quick`` are those of a run that only has to run.
        targets: ratio dense / ours to reach, by density; what is not listed has no target.
        bound: what limits it: a rate of `harness.ceilings.Ceilings`.
        needs: a folder of data in SPARSECORE_DATA that a full run needs, or nothing.
    """

    name: str
    build: Callable[..., Forms]
    size: Mapping[str, Any]
    quick: Mapping[str, Any]
    targets: Mapping[float, float] = field(default_factory=dict)
    bound: str = "fma"
    needs: str | None = None

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.needs and not os.path.isdir(os.path.join(os.environ.get("SPARSECORE_DATA", ""), self.needs)):
            return f"{self.needs} is not in SPARSECORE_DATA"
        return None


def _by_density(half: float, quarter: float, tenth: float) -> dict[float, float]:
    return {0.5: half, 0.25: quarter, 0.1: tenth}


_TABLE = {"rows": 1_000_000, "cols": 64}
_SMALL_TABLE = {"rows": 300, "cols": 20}
_LAYER = {"rows": 20_000, "cols": 600}
_SMALL_LAYER = {"rows": 60, "cols": 33}
_PRODUCT, _GRADIENT = _by_density(1.7, 3.0, 5.0), _by_density(1.35, 2.4, 4.0)

CASES: tuple[Case, ...] = (
    Case(
        "gather 1M x 64, 16384 random rows",
        forms.gather,
        _TABLE | {"batch": 16384},
        _SMALL_TABLE | {"batch": 7},
        _by_density(1.3, 1.4, 1.8),
        "rows",
    ),
    Case(
        "gather_dot 1M x 64, 16384 pairs",
        forms.gather_dot,
        _TABLE | {"batch": 16384},
        _SMALL_TABLE | {"batch": 7},
        _by_density(2.0, 2.1, 3.0),
        "rows",
    ),
    # UltraGCN's batches: each user's item and its negatives. No target; where it stands is to be seen.
    Case(
        "gather_dot 1M x 64, 512 users with 33 items each",
        forms.gather_dot,
        _TABLE | {"batch": 512, "each": 33},
        _SMALL_TABLE | {"batch": 7, "each": 5},
        {},
        "rows",
    ),
    *(
        Case(
            f"{name} 20000 x 600, B = {batch}",
            build,
            _LAYER | {"batch": batch},
            _SMALL_LAYER | {"batch": 5},
            targets,
        )
        for name, build, targets in (
            ("spmm", forms.spmm, _PRODUCT),
            ("spmm_t", forms.spmm_t, _GRADIENT),
            ("sddmm", forms.sddmm, _GRADIENT),
        )
        for batch in (64, 512)
    ),
    Case(
        "spmm 20000 x 600, B = 1",
        forms.spmm,
        _LAYER | {"batch": 1},
        _SMALL_LAYER | {"batch": 1},
        _by_density(4, 7, 8),
        "read",
    ),
    Case(
        "score_topk 256 users x 100k items x 64",
        forms.score_topk,
        {"rows": 100_000, "cols": 64, "batch": 256, "k": 20},
        {"rows": 200, "cols": 20, "batch": 20, "k": 5},
        _by_density(4, 6, 7),
    ),
    Case(
        "embedding gradient + Adam, all values, 1M x 64, B = 2048",
        forms.adam,
        _TABLE | {"batch": 2048},
        _SMALL_TABLE | {"batch": 7},
        _by_density(1.8, 3, 8),
        "read",
    ),
    Case(
        "explore 6.4M positions",
        forms.explore,
        {"rows": 100_000, "cols": 64},
        _SMALL_TABLE,
        _by_density(15, 15, 10),
        "read",
    ),
    Case("explore 64M positions", forms.explore, _TABLE, _SMALL_TABLE, _by_density(15, 15, 10), "read"),
    Case(
        "embedding gradient + lazy Adam, 1M x 64, B = 2048",
        lazy_forms.lazy_adam,
        _TABLE | {"batch": 2048},
        _SMALL_TABLE | {"batch": 7},
        _by_density(11, 12, 14),
        "rows",
    ),
    Case(
        "embedding gradient + lazy Adam without autograd, 1M x 64, B = 2048",
        lazy_forms.lazy_adam_alone,
        _TABLE | {"batch": 2048},
        _SMALL_TABLE | {"batch": 7},
        _by_density(11, 12, 14),
        "rows",
    ),
    Case(
        "propagate gowalla, d = 64",
        graph_forms.propagate,
        {"dim": 64},
        {"dim": 20, "users": 30, "items": 40},
        {0.5: 3.2},
        "cached_rows",
        "gowalla",
    ),
    Case(
        "propagate gowalla, d = 64, neighbours close together",
        graph_forms.propagate,
        {"dim": 64, "reordered": True},
        {"dim": 20, "users": 30, "items": 40, "reordered": True},
        {},
        "cached_rows",
        "gowalla",
    ),
    Case(
        "propagate_mean gowalla, 3 hops from a table, d = 64",
        graph_forms.propagate_mean,
        {"dim": 64, "hops": 3},
        {"dim": 20, "hops": 2, "users": 30, "items": 40},
        {},
        "cached_rows",
        "gowalla",
    ),
)

_LOOKUPS = (("gather", forms.gather, "random rows"), ("gather_dot", forms.gather_dot, "pairs"))

LOSING: tuple[Case, ...] = (
    *(
        Case(
            f"{name} {rows} x {cols}, B = 64",
            build,
            {"rows": rows, "cols": cols, "batch": 64},
            _SMALL_LAYER | {"batch": 5},
        )
        for rows, cols in ((600, 200), (64, 64))
        for name, build in (("spmm", forms.spmm), ("spmm_t", forms.spmm_t), ("sddmm", forms.sddmm))
    ),
    *(
        Case(
            f"{name} 1024 x 1024, B = {batch}",
            build,
            {"rows": 1024, "cols": 1024, "batch": batch},
            _SMALL_LAYER | {"batch": 4},
        )
        for name, build in (("spmm", forms.spmm), ("spmm_t", forms.spmm_t), ("sddmm", forms.sddmm))
        for batch in (1, 4)
    ),
    Case(
        "spmm 20000 x 600, B = 64, subnormal values",
        forms.spmm,
        _LAYER | {"batch": 64, "subnormal": True},
        _SMALL_LAYER | {"batch": 5, "subnormal": True},
    ),
    *(
        Case(
            f"{name} 1M x {cols}, 16384 {what}",
            build,
            {"rows": 1_000_000, "cols": cols, "batch": 16384},
            {"rows": 300, "cols": cols, "batch": 7},
            {},
            "rows",
        )
        for name, build, what in _LOOKUPS
        for cols in (10, 50, 200)
    ),
    *(
        Case(
            f"{name} 1M x 64, {batch} {what}",
            build,
            _TABLE | {"batch": batch},
            _SMALL_TABLE | {"batch": batch},
            {},
            "rows",
        )
        for name, build, what in _LOOKUPS
        for batch in (1, 4)
    ),
    Case(
        "gather_dot 1M x 64, 16384 pairs, csr beside bitmap",
        forms.gather_dot,
        _TABLE | {"batch": 16384, "encoding": "csr", "other": "bitmap"},
        _SMALL_TABLE | {"batch": 7, "encoding": "csr", "other": "bitmap"},
        {},
        "rows",
    ),
    Case(
        "embedding gradient + lazy Adam, 1M x 64, B = 16",
        lazy_forms.lazy_adam,
        _TABLE | {"batch": 16},
        _SMALL_TABLE | {"batch": 7},
        {},
        "rows",
    ),
    *(
        Case(
            f"score_topk {batch} users x 100k items x {cols}",
            forms.score_topk,
            {"rows": 100_000, "cols": cols, "batch": batch, "k": 20},
            {"rows": 200, "cols": cols, "batch": batch, "k": 5},
        )
        for batch, cols in ((256, 10), (256, 50), (256, 200), (1, 64), (4, 64))
    ),
)

# All nonzeros in 1 % of the rows: the density is that of the whole weight.
SKEWED: tuple[Case, ...] = tuple(
    Case(
        f"{name} 20000 x 600, B = 64, all nonzeros in 1 % of the rows",
        build,
        _LAYER | {"batch": 64, "skewed": True},
        _SMALL_LAYER | {"batch": 5, "skewed": True},
    )
    for name, build in (("spmm", forms.spmm), ("spmm_t", forms.spmm_t), ("sddmm", forms.sddmm))
)


def densities_of(case: Case) -> tuple[float, ...]:
    """Densities at which a case is measured."""
    if case in SKEWED:
        return (0.01,)
    if case.build is graph_forms.propagate:
        return (0.5,)
    if case in LOSING:
        return (0.5, 0.1)
    # An exploration exchanges what is not stored for what is; hops read embeddings, whatever the table's density.
    few = (forms.explore, graph_forms.propagate_mean)
    return (0.5, 0.25, 0.1) if case.build in few else (0.9, 0.5, 0.25, 0.1)
