"""The ways of a product with a sparse weight (`sparsecore.backends.numba.linear`), for tests that ask for one."""

from __future__ import annotations

from typing import Any

import pytest

from sparsecore.backends.numba import (
    blockwise,
    few,
    lanes_csr,
    linear,
    one_csr,
    panel_sddmm,
    panel_spmm,
    panel_spmm_t,
    turned_spmm_t,
)

ALWAYS, NEVER = 1, 1 << 30
OPERATIONS = ("spmm", "spmm_t", "sddmm")
# For each operation, the module whose function must do it; and examples that the way is for.
WAYS: dict[str, tuple[tuple[Any, Any, Any], int]] = {
    "one": ((few, few, few), 1),
    "one from csr": ((one_csr, few, few), 1),
    "lanes": ((lanes_csr, lanes_csr, lanes_csr), 20),
    "panels": ((panel_spmm, panel_spmm_t, panel_sddmm), 70),
    "turned": ((panel_spmm, turned_spmm_t, panel_sddmm), 70),
    "blockwise": ((blockwise, blockwise, blockwise), 20),
}
CASES = [
    ("one", "bitmap"),
    ("one from csr", "csr"),
    ("lanes", "csr"),
    *((way, encoding) for way in ("panels", "turned", "blockwise") for encoding in ("csr", "bitmap")),
]


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Lower the limits that keep small weights from going this way (the fixture `vectors` has lifted those of the small
    kernels). Returns who did which operation, filled while products are computed: for `went`.
    """
    if way == "one from csr":
        monkeypatch.setattr(one_csr, "_MOST_NONZEROS", NEVER)
    elif way == "lanes":
        monkeypatch.setattr(lanes_csr, "_MOST_EXAMPLES", 96)
        monkeypatch.setattr(lanes_csr, "_LEAST_WORK", (-1, -1))
    elif way != "one":
        blocks = dict.fromkeys(OPERATIONS, (ALWAYS if way == "blockwise" else NEVER, 0.0, 0.0))
        monkeypatch.setattr(linear, "_FEW", dict.fromkeys(OPERATIONS, (0, 0)))
        monkeypatch.setattr(linear, "_TURN", (ALWAYS, ALWAYS) if way == "turned" else (NEVER, NEVER))
        monkeypatch.setattr(linear, "_BLOCKWISE", dict.fromkeys(linear._BLOCKWISE, blocks))
    used: set[tuple[str, str]] = set()
    modules = {module for chosen, _ in WAYS.values() for module in chosen}
    for module in modules:
        for operation in OPERATIONS:
            if hasattr(module, operation):
                monkeypatch.setattr(module, operation, _noted(module, operation, used))
    return used


def _noted(module: Any, operation: str, used: set[tuple[str, str]]) -> Any:
    run = getattr(module, operation)

    def noted(*arguments: Any) -> Any:
        used.add((operation, module.__name__))
        return run(*arguments)

    return noted


def went(way: str) -> set[tuple[str, str]]:
    """What `take` returns after all three operations have gone a way, and no other."""
    modules, _ = WAYS[way]
    return {(operation, module.__name__) for operation, module in zip(OPERATIONS, modules, strict=True)}
