"""Every operator of `sparsecore.ops` in every encoding, an exploration and the optimizers' steps: without autograd.

Operators of a graph alone have no encoding; `gather_touched` and `gather_dot_touched` are two of the others each.
"""

from __future__ import annotations

import importlib
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
    name: str, size: Mapping[str, Any], reference: Callable[[], frozen.Run]
) -> Callable[[], dict[str, Form]]:
    def build() -> dict[str, Form]:
        from harness.operands import same_ids_again

        same_ids_again()
        make = _maker(name)
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


def _maker(name: str) -> Callable[..., Any]:
    """Imported when it is needed: an older revision may lack what such a module imports."""
    module, maker = _MAKERS[name][0].split(".")
    return getattr(importlib.import_module(f"harness.{module}"), maker)


def _needs(name: str) -> tuple[str, ...]:
    return "sparsecore.MacCounter", f"sparsecore.{_MAKERS[name][1]}"


def _over_graph(
    name: str, shape: str, what: str, size: Mapping[str, int], nodes: int, density: float
) -> Workload:
    """What depends on no table, and so on no encoding."""

    def build() -> dict[str, Form]:
        from harness.operands import same_ids_again

        same_ids_again()
        made = _maker(name)(1.0, **size)
        first, *others = made.dense.items()
        return {
            "dense": Form(first[1]),
            **{f"dense/{other}": Form(run) for other, run in others},
            "csr": Form(made.ours, lambda: {"macs": _macs(made.ours)}),
            "frozen": Form(frozen.products(nodes, nodes, density, 64)),
        }

    needs = (*_needs(name), "sparsecore.normalized_bipartite", "sparsecore.pages")
    return Workload(f"{name}-{shape}", "operation", what, ("dense", "csr"), build, needs, quick=True)


def _operation(
    name: str,
    shape: str,
    what: str,
    size: Mapping[str, Any],
    reference: Callable[[], frozen.Run],
    quick: bool,
) -> Workload:
    return Workload(
        f"{name}-{shape}",
        "operation",
        what,
        ("dense", *_FORMS),
        _build(name, size, reference),
        needs=(*_needs(name), "sparsecore.encoding.encode"),
        quick=quick,
    )


# What makes the forms, in `harness`, and what of sparsecore they call.
_MAKERS = {
    **{
        name: (f"kernel_forms.{name}", f"ops.{name}")
        for name in ("gather", "gather_dot", "spmm", "spmm_t", "sddmm", "score_topk", "explore")
    },
    **{name: (f"bag_forms.{name}", f"ops.{name}") for name in ("bag", "bag_grad", "bag_dot")},
    **{
        name: (f"graph_forms.{name}", f"ops.{name}")
        for name in (
            "propagate",
            "propagate_rows",
            "propagate_rows_t",
            "propagate_mean",
            "propagate_mean_grad",
        )
    },
    "score_topk_seen": ("kernel_forms.score_topk", "ops.score_topk"),
    "touched": ("lazy_forms.touched", "ops.touched"),
    "lazy_adam": ("lazy_forms.lazy_adam_alone", "optim.Adam.update_rows"),
    "adam": ("update_forms.update", "ops.scatter_grad"),
    "adam_counted": ("update_forms.update", "optim.Adam"),
    "adamw": ("update_forms.update", "optim.AdamW"),
    "sgd": ("update_forms.update", "optim.SGD"),
    "adagrad": ("update_forms.update", "optim.Adagrad"),
}


def operations() -> list[Workload]:
    """All of them: small shapes, which a quick run takes, and for the most used those of real tables and layers."""
    graph = {"dim": 64, "users": 2000, "items": 3000}
    found = [
        _over_graph(
            "propagate",
            "5000x64",
            "one hop of a graph of 2,000 users and 3,000 items, 300,000 edges, 64 columns; dense is torch.sparse",
            graph,
            5000,
            0.024,
        ),
        *_small(),
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


def _small() -> list[Workload]:
    """What is measured at small shapes alone."""
    table = {"rows": 20_000, "cols": 64, "batch": 512}
    lookups, pass_over = partial(frozen.rows, 20_000, 64, 512), partial(frozen.stream, 320_000)
    found = [
        _operation("touched", "20000x64-b512", "embedding gradient, each row once", table, lookups, True),
        _operation(
            "lazy_adam",
            "20000x64-b512",
            "embedding gradient and Adam over the rows of it",
            table,
            lookups,
            True,
        ),
        _operation(
            "score_topk_seen",
            "20000x64-b64",
            "the 20 best of a catalogue without 50 seen items each",
            {"rows": 20_000, "cols": 64, "batch": 64, "k": 20, "seen": 50},
            partial(frozen.products, 2000, 64, 0.25, 64),
            True,
        ),
    ]
    for name, said, options in (
        ("adam_counted", "Adam by each weight's steps", {"per_weight_step": True}),
        ("adamw", "AdamW", {"optimizer": "AdamW"}),
        ("sgd", "SGD with momentum", {"optimizer": "SGD"}),
        ("adagrad", "Adagrad", {"optimizer": "Adagrad"}),
    ):
        what = f"embedding gradient and {said} over all values"
        found.append(_operation(name, "20000x64-b512", what, {**table, **options}, pass_over, True))
    bags = {"rows": 2000, "cols": 300, "batch": 64, "length": 20}
    for name, what in (
        ("bag", "weighted sums of 20 rows each, the forward pass of an encoder's first layer"),
        ("bag_grad", "its gradient in the table"),
        ("bag_dot", "its gradient in the shares"),
    ):
        found.append(
            _operation(name, "2000x300-b64", what, bags, partial(frozen.rows, 2000, 300, 1280), True)
        )
    graph = {"dim": 64, "users": 400, "items": 600}
    products = partial(frozen.products, 1000, 1000, 0.024, 64)
    for name, what in (
        (
            "propagate_mean",
            "mean of a table and 2 hops of it over a graph of 12,000 edges; dense is torch.sparse",
        ),
        ("propagate_mean_grad", "its gradient in the table"),
    ):
        found.append(_operation(name, "1000x64", what, {**graph, "hops": 2}, products, True))
    for name, what in (
        ("propagate_rows", "128 nodes' rows of a hop over a graph of 12,000 edges; dense is torch.sparse"),
        ("propagate_rows_t", "its gradient"),
    ):
        found.append(_over_graph(name, "1000x64-b128", what, {**graph, "batch": 128}, 1000, 0.024))
    return found
