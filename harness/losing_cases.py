"""What the kernel benchmark measures where sparse loses or may lose: odd widths, small shapes, skewed rows."""

from __future__ import annotations

from dataclasses import replace

from harness import graph_forms, lazy_forms, update_forms
from harness import kernel_forms as forms
from harness.kernel_cases import CASES, LAYER, SMALL_LAYER, SMALL_TABLE, TABLE, Case

__all__ = ["LOSING", "SKEWED"]

_LOOKUPS = (("gather", forms.gather, "random rows"), ("gather_dot", forms.gather_dot, "pairs"))

_MAY_LOSE: tuple[Case, ...] = (
    *(
        Case(
            f"{name} {rows} x {cols}, B = 64",
            build,
            {"rows": rows, "cols": cols, "batch": 64},
            SMALL_LAYER | {"batch": 5},
        )
        for rows, cols in ((600, 200), (64, 64))
        for name, build in (("spmm", forms.spmm), ("spmm_t", forms.spmm_t), ("sddmm", forms.sddmm))
    ),
    *(
        Case(
            f"{name} 1024 x 1024, B = {batch}",
            build,
            {"rows": 1024, "cols": 1024, "batch": batch},
            SMALL_LAYER | {"batch": 4},
        )
        for name, build in (("spmm", forms.spmm), ("spmm_t", forms.spmm_t), ("sddmm", forms.sddmm))
        for batch in (1, 4)
    ),
    Case(
        "spmm 20000 x 600, B = 64, subnormal values",
        forms.spmm,
        LAYER | {"batch": 64, "subnormal": True},
        SMALL_LAYER | {"batch": 5, "subnormal": True},
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
            f"embedding gradient + {name}, 1M x {cols}, B = 2048",
            build,
            {"rows": 1_000_000, "cols": cols, "batch": 2048},
            {"rows": 300, "cols": cols, "batch": 7},
            {},
            bound,
        )
        for name, build, bound in (
            ("Adam, all values", update_forms.update, "read"),
            ("lazy Adam", lazy_forms.lazy_adam, "rows"),
        )
        for cols in (10, 50, 200)
    ),
    *(
        Case(
            f"propagate gowalla, d = {dim}",
            graph_forms.propagate,
            {"dim": dim},
            {"dim": dim, "users": 30, "items": 40},
            {},
            "cached_rows",
            "gowalla",
        )
        for dim in (10, 50, 200)
    ),
    *(
        Case(
            f"{name} 1M x 64, {batch} {what}",
            build,
            TABLE | {"batch": batch},
            SMALL_TABLE | {"batch": batch},
            {},
            "rows",
        )
        for name, build, what in _LOOKUPS
        for batch in (1, 4)
    ),
    Case(
        "gather_dot 1M x 64, 16384 pairs, csr beside bitmap",
        forms.gather_dot,
        TABLE | {"batch": 16384, "encoding": "csr", "other": "bitmap"},
        SMALL_TABLE | {"batch": 7, "encoding": "csr", "other": "bitmap"},
        {},
        "rows",
    ),
    Case(
        "embedding gradient + lazy Adam, 1M x 64, B = 16",
        lazy_forms.lazy_adam,
        TABLE | {"batch": 16},
        SMALL_TABLE | {"batch": 7},
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

# A graph has no density of its own here.
LOSING: tuple[Case, ...] = tuple(
    replace(case, densities=(0.5,) if case.build is graph_forms.propagate else (0.5, 0.1))
    for case in _MAY_LOSE
)

# All nonzeros in 1 % of the rows: the density is that of the whole weight.
_OF_ROWS = (
    "gather 1M x 64, 16384 random rows",
    "gather_dot 1M x 64, 16384 pairs",
    "spmm 20000 x 600, B = 64",
    "spmm_t 20000 x 600, B = 64",
    "sddmm 20000 x 600, B = 64",
    "score_topk 256 users x 100k items x 64",
    "embedding gradient + Adam, all values, 1M x 64, B = 2048",
)
SKEWED: tuple[Case, ...] = tuple(
    replace(
        case,
        name=f"{case.name}, all nonzeros in 1 % of the rows",
        size={**case.size, "skewed": True},
        quick={**case.quick, "skewed": True},
        targets={},
        densities=(0.01,),
    )
    for case in CASES
    if case.name in _OF_ROWS
)
