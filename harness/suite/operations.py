"""Every operation of sparsecore, in every encoding: the kernels themselves, without autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import sparsecore
from harness.suite import frozen
from harness.suite.workload import Form, Workload

__all__ = ["operations"]

DENSITIES = (0.5, 0.25, 0.1)
ENCODINGS = ("bitmap", "csr")
_FORMS = tuple(f"{encoding}@{density:g}" for encoding in ENCODINGS for density in DENSITIES)


def _macs(run: Callable[[], object]) -> int:
    counter = sparsecore.MacCounter()
    with counter.phase("call"):
        run()
    return counter.total


def _build(
    name: str, size: Mapping[str, int], reference: Callable[[], frozen.Run]
) -> Callable[[], dict[str, Form]]:
    def build() -> dict[str, Form]:
        from harness import kernel_forms, update_forms

        make: Callable[..., Any] = update_forms.update if name == "adam" else getattr(kernel_forms, name)
        forms: dict[str, Form] = {}
        for encoding in _known_encodings():
            for density in DENSITIES:
                made = make(density, **size, encoding=encoding)
                if not forms:
                    first, *others = made.dense.items()
                    forms["dense"] = Form(first[1], _counts(first[1], made.dense_resident))
                    forms |= {f"dense/{other}": Form(run) for other, run in others}
                forms[f"{encoding}@{density:g}"] = Form(made.ours, _counts(made.ours, made.resident))
        forms["frozen"] = Form(reference())
        return forms

    return build


def _known_encodings() -> tuple[str, ...]:
    """Those of the imported revision: before there were bitmaps, an operator could not do without columns."""
    return ENCODINGS if "Tensor? col" in str(torch.ops.sparsecore.spmm.default._schema) else ("csr",)


def _counts(run: Callable[[], object], resident: int) -> Callable[[], dict[str, float]]:
    return lambda: {"macs": _macs(run), "resident_bytes": resident}


def _propagate() -> dict[str, Form]:
    from harness import graph_forms

    made = graph_forms.propagate(1.0, dim=64, users=2000, items=3000)
    first, *others = made.dense.items()
    return {
        "dense": Form(first[1]),
        **{f"dense/{other}": Form(run) for other, run in others},
        "csr": Form(made.ours, lambda: {"macs": _macs(made.ours)}),
        "frozen": Form(frozen.products(5000, 5000, 0.024, 64)),
    }


def _operation(
    name: str,
    shape: str,
    what: str,
    size: Mapping[str, int],
    reference: Callable[[], frozen.Run],
    quick: bool,
) -> Workload:
    return Workload(
        f"{name}-{shape}",
        "operation",
        what,
        ("dense", *_FORMS),
        _build(name, size, reference),
        needs=("sparsecore.MacCounter", "sparsecore.encoding.encode", "sparsecore.ops." + _OPERATORS[name]),
        quick=quick,
    )


# What of `sparsecore.ops` a form calls.
_OPERATORS = {
    **{name: name for name in ("gather", "gather_dot", "spmm", "spmm_t", "sddmm", "score_topk", "explore")},
    "adam": "scatter_grad",
}


def operations() -> list[Workload]:
    """All of them: small shapes, which a quick run takes, and those of real tables and layers."""
    found = [
        Workload(
            "propagate-5000x64",
            "operation",
            "one hop of a graph of 2,000 users and 3,000 items, 300,000 edges, 64 columns; dense is torch.sparse",
            ("dense", "csr"),
            _propagate,
            needs=("sparsecore.MacCounter", "sparsecore.normalized_bipartite", "sparsecore.pages"),
            quick=True,
        )
    ]
    for rows, batch, quick in ((20_000, 512, True), (1_000_000, 16_384, False)):
        table = {"rows": rows, "cols": 64, "batch": batch}
        shape = f"{rows}x64-b{batch}"

        lookups = partial(frozen.rows, rows, 64, batch)
        pass_over = partial(frozen.stream, 16 * rows)
        found += [
            _operation("gather", shape, "embedding rows", table, lookups, quick),
            _operation("gather_dot", shape, "scores of pairs of two tables", table, lookups, quick),
            _operation("adam", shape, "embedding gradient and Adam over all values", table, pass_over, quick),
            _operation(
                "explore",
                f"{rows}x64",
                "prune, grow and rewrite 30 % of the weights; dense is topk on masks",
                {"rows": rows, "cols": 64},
                pass_over,
                quick,
            ),
            _operation(
                "score_topk",
                f"{rows}x64-b{64 if quick else 256}",
                "the 20 best of a catalogue",
                {"rows": rows, "cols": 64, "batch": 64 if quick else 256, "k": 20},
                partial(frozen.products, rows // 10, 64, 0.25, 64),
                quick,
            ),
        ]
    for rows, cols, batch, quick in (
        (2000, 300, 64, True),
        (20_000, 600, 64, False),
        (20_000, 600, 512, False),
    ):
        layer = {"rows": rows, "cols": cols, "batch": batch}
        for name, what in (
            ("spmm", "X W^T, the forward pass of a layer"),
            ("spmm_t", "dY W, the gradient of its input"),
            ("sddmm", "dY^T X at the nonzeros, the gradient of its weights"),
        ):
            found.append(
                _operation(
                    name,
                    f"{rows}x{cols}-b{batch}",
                    what,
                    layer,
                    partial(frozen.products, rows, cols, 0.1, min(batch, 64)),
                    quick,
                )
            )
    return found
