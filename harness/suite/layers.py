"""Training steps of single layers, as a user of the library writes them: forward, backward, Adam."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sparsecore
from harness.suite import frozen
from harness.suite.workload import Form, Workload

__all__ = ["layers"]

DENSITIES = (0.5, 0.25, 0.1)
_FORMS = ("dense", *(f"sparse@{density:g}" for density in DENSITIES))

Maker = Callable[[float | None], tuple[nn.Module, Callable[[nn.Module], Tensor]]]


def _linear(rows: int, cols: int, batch: int) -> Maker:
    def make(density: float | None) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        x = torch.randn(batch, cols, requires_grad=True)
        layer: nn.Module = nn.Linear(cols, rows)
        if density is not None:
            layer = sparsecore.SparseLinear(cols, rows, density=density)
        return layer, lambda module: module(x).sum()

    return make


def _embedding(rows: int, dim: int, batch: int, **options: Any) -> Maker:
    def make(density: float | None) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        ids = torch.randint(0, rows, (batch,))
        table: nn.Module = nn.Embedding(rows, dim, **options)
        if density is not None:
            table = sparsecore.SparseEmbedding(rows, dim, density=density, **options)
        return table, lambda module: module(ids).sum()

    return make


def _bag(rows: int, dim: int, batch: int) -> Maker:
    def make(density: float | None) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        ids = torch.randint(0, rows, (batch * 20,))
        offsets = torch.arange(batch) * 20
        table: nn.Module = nn.EmbeddingBag(rows, dim, mode="sum")
        if density is not None:
            table = sparsecore.SparseEmbeddingBag(rows, dim, density=density)
        return table, lambda module: module(ids, offsets).sum()

    return make


def _convolution(channels: int, size: int, batch: int) -> Maker:
    def make(density: float | None) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        x = torch.randn(batch, channels, size, size, requires_grad=True)
        layer: nn.Module = nn.Conv2d(channels, channels, 3, padding=1)
        if density is not None:
            layer = sparsecore.SparseConv2d(channels, channels, 3, padding=1, density=density)
        return layer, lambda module: module(x).sum()

    return make


def _build(make: Maker, reference: Callable[[], frozen.Run], lazy: bool) -> Callable[[], dict[str, Form]]:
    def build() -> dict[str, Form]:
        forms = {}
        for name in _FORMS:
            density = None if name == "dense" else float(name.partition("@")[2])
            module, loss = make(density)
            if not lazy:
                optimizer: torch.optim.Optimizer = torch.optim.Adam(module.parameters(), fused=True)
            elif density is None:
                optimizer = torch.optim.SparseAdam(module.parameters())
            else:
                optimizer = sparsecore.optim.Adam(module.parameters())
            forms[name] = _form(module, loss, optimizer)
        forms["frozen"] = Form(reference())
        return forms

    return build


def _form(module: nn.Module, loss: Callable[[nn.Module], Tensor], optimizer: torch.optim.Optimizer) -> Form:
    def step() -> None:
        optimizer.zero_grad()
        loss(module).backward()
        optimizer.step()

    def counts() -> dict[str, float]:
        counter = sparsecore.MacCounter()
        optimizer.zero_grad()
        with counter.phase("macs_forward"):
            value = loss(module)
        with counter.phase("macs_backward"):
            value.backward()
        size = sparsecore.resident_bytes(module, optimizer)
        return {**counter.macs, "resident_bytes": size.total, "state_bytes": size.optimizer_state}

    return Form(step, counts)


def layers() -> list[Workload]:
    """All kinds of layers: small ones, which a quick run takes, and some of real size."""
    found = []

    def add(
        name: str,
        what: str,
        layer: str,
        make: Maker,
        reference: Callable[[], frozen.Run],
        quick: bool,
        lazy: bool = False,
    ) -> None:
        needs = (
            "sparsecore.MacCounter",
            f"sparsecore.{layer}",
            *(("sparsecore.optim.Adam",) if lazy else ()),
        )
        found.append(Workload(name, "layer", what, _FORMS, _build(make, reference, lazy), needs, quick=quick))

    for rows, cols, batch, quick in ((1000, 300, 64, True), (3654, 600, 16, False), (3654, 600, 256, False)):
        add(
            f"linear-{rows}x{cols}-b{batch}",
            "SparseLinear with Adam",
            "SparseLinear",
            _linear(rows, cols, batch),
            partial(frozen.products, rows, cols, 0.25, min(batch, 64)),
            quick,
        )
    for rows, batch, quick in ((20_000, 512, True), (1_000_000, 2048, False)):
        for lazy in (False, True):
            add(
                f"embedding-{rows}x64-b{batch}{'-lazy' if lazy else ''}",
                "SparseEmbedding with Adam" + (" over the rows that were looked up" if lazy else ""),
                "SparseEmbedding",
                _embedding(rows, 64, batch, **({"sparse": True} if lazy else {})),
                partial(frozen.rows, rows, 64, 4 * batch) if lazy else partial(frozen.stream, 16 * rows),
                quick,
                lazy,
            )
        add(
            f"bag-{rows}x64-b{batch // 16}",
            "SparseEmbeddingBag of 20 ids with Adam",
            "SparseEmbeddingBag",
            _bag(rows, 64, batch // 16),
            partial(frozen.stream, 16 * rows),
            quick,
        )
    for channels, size, batch, quick in ((16, 8, 16, True), (32, 32, 64, False)):
        add(
            f"conv-{channels}x{size}x{size}-b{batch}",
            "SparseConv2d, 3 x 3, with Adam",
            "SparseConv2d",
            _convolution(channels, size, batch),
            partial(frozen.products, channels * 32, 9 * channels, 0.25, 64),
            quick,
        )
    return found
