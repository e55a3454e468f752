"""One layer's training step, sparse against dense: multiply-adds, resident bytes, time ratio."""

from __future__ import annotations

from harness.layers import LAYERS, compare_layer

DENSITIES = (0.5, 0.25, 0.1)


class LayerTrain:
    params = (tuple(LAYERS), DENSITIES)
    param_names = ("layer", "density")
    timeout = 300
    version = "1"

    def setup_cache(self) -> dict[str, dict[str, float]]:
        return {f"{name}@{density}": compare_layer(name, density) for name in LAYERS for density in DENSITIES}

    def track_macs(self, found: dict, layer: str, density: float) -> float:
        return found[f"{layer}@{density}"]["macs"]

    def track_macs_vs_dense(self, found: dict, layer: str, density: float) -> float:
        return found[f"{layer}@{density}"]["macs_vs_dense"]

    def track_bytes_vs_dense(self, found: dict, layer: str, density: float) -> float:
        return found[f"{layer}@{density}"]["bytes_vs_dense"]

    def track_time_vs_dense(self, found: dict, layer: str, density: float) -> float:
        return found[f"{layer}@{density}"]["time_vs_dense"]

    track_macs.unit = "MACs"  # type: ignore[attr-defined]
    track_macs_vs_dense.unit = "of dense"  # type: ignore[attr-defined]
    track_bytes_vs_dense.unit = "of dense"  # type: ignore[attr-defined]
    track_time_vs_dense.unit = "of dense"  # type: ignore[attr-defined]
