"""What a step and a recommendation cost, dense and sparse, measured in turns in one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recsys.config import Config
from recsys.recommender import SavedRecommender
from recsys.training.probe import StepProbe, time_recommendations, time_steps, typical_user
from recsys.training.session import load_dataset

__all__ = ["measure_cells"]


def measure_cells(cells: Mapping[str, tuple[Config, Path]], seconds: float) -> dict[str, dict[str, Any]]:
    """Multiply-adds, bytes, time of a step and of a recommendation of the cells of one row of a table.

    Cells of one density are timed in turns with the dense one, and a ratio is of these; so few are in memory at once.

    Args:
        cells: {name: (settings, folder of a run that has ended)}.
        seconds: to spend on the steps of each density; a third of it goes to recommendations.

    Returns:
        {name: {"macs", "bytes", "step_ms", "recommend_ms", and "step_vs_dense" and "recommend_vs_dense" where a dense
        cell is among the cells}}. MACs and step are of one step, with its share of an exploration.
    """
    dense = {name: cell for name, cell in cells.items() if cell[0].sparsity.method == "dense"}
    densities = dict.fromkeys(c.sparsity.density for name, (c, _) in cells.items() if name not in dense)
    groups = [
        dense | {name: cell for name, cell in cells.items() if cell[0].sparsity.density == density}
        for density in densities
    ] or [dense]
    dataset = load_dataset(next(iter(cells.values()))[0])
    user = typical_user(dataset)
    reference = next(iter(dense), None)
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        probes = {name: StepProbe(config, dataset) for name, (config, _) in group.items()}
        # Counted before anything is timed: all of them then see the same batch.
        costs = {name: (probe.macs(), probe.resident_bytes().total) for name, probe in probes.items()}
        steps = time_steps(probes, seconds)
        del probes
        servers = {name: SavedRecommender.load(folder) for name, (_, folder) in group.items()}
        answers = time_recommendations(servers, user, seconds / 3)
        for name in group:
            macs, size = costs[name]
            one = {
                "macs": macs,
                "bytes": size,
                "step_ms": 1e3 * steps[name].mean,
                "recommend_ms": answers[name],
            }
            if reference is not None:
                one["step_vs_dense"] = steps[name].mean / steps[reference].mean
                one["recommend_vs_dense"] = answers[name] / answers[reference]
            found.setdefault(name, one)
    return found
