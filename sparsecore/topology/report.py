"""What an exploration did."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ExplorationReport", "LayerReport"]


@dataclass(frozen=True)
class LayerReport:
    """One weight's exploration.

    Attributes:
        pruned: weights of smallest magnitude that were taken out, k.
        grown: positions that were put in; always as many as were pruned.
        regrown: those of the grown that had been pruned a moment before: they never left.
        nnz: stored weights, before and after.
        numel: rows * cols.
        ever_active: share of the positions that were stored at some time.
    """

    pruned: int
    grown: int
    regrown: int
    nnz: int
    numel: int
    ever_active: float


@dataclass(frozen=True)
class ExplorationReport:
    """An exploration of all weights.

    Attributes:
        step: number of the training step that it followed, from 1.
        drop_fraction: rho, the fraction of the nonzeros that was pruned.
        layers: one report for each sparse module, by its name.
    """

    step: int
    drop_fraction: float
    layers: dict[str, LayerReport]

    @property
    def pruned(self) -> int:
        """Pruned weights of all layers."""
        return sum(layer.pruned for layer in self.layers.values())

    @property
    def grown(self) -> int:
        """Grown weights of all layers."""
        return sum(layer.grown for layer in self.layers.values())

    @property
    def regrown(self) -> int:
        """Weights of all layers that were pruned and grown at once."""
        return sum(layer.regrown for layer in self.layers.values())

    @property
    def nnz(self) -> int:
        """Stored weights of all layers."""
        return sum(layer.nnz for layer in self.layers.values())

    @property
    def ever_active(self) -> float:
        """Share of all positions that were stored at some time."""
        numel = sum(layer.numel for layer in self.layers.values())
        return sum(layer.ever_active * layer.numel for layer in self.layers.values()) / numel
