"""What the kernel benchmark measures, with the targets: operations where sparse should win."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness import graph_forms, lazy_forms, update_forms
from harness import kernel_forms as forms
from harness.operands import Forms

__all__ = ["CASES", "LAYER", "SMALL_LAYER", "SMALL_TABLE", "TABLE", "Case"]


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
        densities: at which it is measured.
    """

    name: str
    build: Callable[..., Forms]
    size: Mapping[str, Any]
    quick: Mapping[str, Any]
    targets: Mapping[float, float] = field(default_factory=dict)
    bound: str = "fma"
    needs: str | None = None
    densities: tuple[float, ...] = (0.9, 0.5, 0.25, 0.1)

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.needs and not os.path.isdir(os.path.join(os.environ.get("SPARSECORE_DATA", ""), self.needs)):
            return f"{self.needs} is not in SPARSECORE_DATA"
        return None


def _by_density(half: float, quarter: float, tenth: float) -> dict[float, float]:
    return {0.5: half, 0.25: quarter, 0.1: tenth}


TABLE = {"rows": 1_000_000, "cols": 64}
SMALL_TABLE = {"rows": 300, "cols": 20}
LAYER = {"rows": 20_000, "cols": 600}
SMALL_LAYER = {"rows": 60, "cols": 33}
# An exploration exchanges what is not stored for what is; hops read embeddings, whatever the table's density.
_UP_TO_HALF = (0.5, 0.25, 0.1)
_PRODUCT, _GRADIENT = _by_density(1.7, 3.0, 5.0), _by_density(1.35, 2.4, 4.0)

CASES: tuple[Case, ...] = (
    Case(
        "gather 1M x 64, 16384 random rows",
        forms.gather,
        TABLE | {"batch": 16384},
        SMALL_TABLE | {"batch": 7},
        _by_density(1.3, 1.4, 1.8),
        "rows",
    ),
    Case(
        "gather_dot 1M x 64, 16384 pairs",
        forms.gather_dot,
        TABLE | {"batch": 16384},
        SMALL_TABLE | {"batch": 7},
        _by_density(2.0, 2.1, 3.0),
        "rows",
    ),
    # UltraGCN's batches: each user's item and its negatives. No target; where it stands is to be seen.
    Case(
        "gather_dot 1M x 64, 512 users with 33 items each",
        forms.gather_dot,
        TABLE | {"batch": 512, "each": 33},
        SMALL_TABLE | {"batch": 7, "each": 5},
        {},
        "rows",
    ),
    *(
        Case(
            f"{name} 20000 x 600, B = {batch}",
            build,
            LAYER | {"batch": batch},
            SMALL_LAYER | {"batch": 5},
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
        LAYER | {"batch": 1},
        SMALL_LAYER | {"batch": 1},
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
        "score_topk 256 users x 100k items x 64, without 50 seen items each",
        forms.score_topk,
        {"rows": 100_000, "cols": 64, "batch": 256, "k": 20, "seen": 50},
        {"rows": 200, "cols": 20, "batch": 20, "k": 5, "seen": 7},
    ),
    Case(
        "embedding gradient + Adam, all values, 1M x 64, B = 2048",
        update_forms.update,
        TABLE | {"batch": 2048},
        SMALL_TABLE | {"batch": 7},
        _by_density(1.8, 3, 8),
        "read",
    ),
    *(
        Case(
            f"embedding gradient + {name}, all values, 1M x 64, B = 2048",
            update_forms.update,
            TABLE | {"batch": 2048, **options},
            SMALL_TABLE | {"batch": 7, **options},
            {},
            "read",
        )
        for name, options in (
            ("AdamW", {"optimizer": "AdamW"}),
            ("SGD with momentum", {"optimizer": "SGD"}),
            ("Adagrad", {"optimizer": "Adagrad"}),
            ("Adam by each weight's steps", {"per_weight_step": True}),
        )
    ),
    Case(
        "explore 6.4M positions",
        forms.explore,
        {"rows": 100_000, "cols": 64},
        SMALL_TABLE,
        _by_density(15, 15, 10),
        "read",
        densities=_UP_TO_HALF,
    ),
    Case(
        "explore 64M positions",
        forms.explore,
        TABLE,
        SMALL_TABLE,
        _by_density(15, 15, 10),
        "read",
        densities=_UP_TO_HALF,
    ),
    Case(
        "embedding gradient + lazy Adam, 1M x 64, B = 2048",
        lazy_forms.lazy_adam,
        TABLE | {"batch": 2048},
        SMALL_TABLE | {"batch": 7},
        _by_density(11, 12, 14),
        "rows",
    ),
    Case(
        "embedding gradient + lazy Adam without autograd, 1M x 64, B = 2048",
        lazy_forms.lazy_adam_alone,
        TABLE | {"batch": 2048},
        SMALL_TABLE | {"batch": 7},
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
        (0.5,),
    ),
    Case(
        "propagate gowalla, d = 64, neighbours close together",
        graph_forms.propagate,
        {"dim": 64, "reordered": True},
        {"dim": 20, "users": 30, "items": 40, "reordered": True},
        {},
        "cached_rows",
        "gowalla",
        (0.5,),
    ),
    Case(
        "propagate_mean gowalla, 3 hops from a table, d = 64",
        graph_forms.propagate_mean,
        {"dim": 64, "hops": 3},
        {"dim": 20, "hops": 2, "users": 30, "items": 40},
        {},
        "cached_rows",
        "gowalla",
        _UP_TO_HALF,
    ),
)
