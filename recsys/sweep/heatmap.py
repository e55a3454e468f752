"""A sweep over two settings as a picture: a field for every pair of values, its colour and number a metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recsys.errors import ConfigError
from recsys.files import replacing
from recsys.sweep.grid import Grid

__all__ = ["check_plot", "draw_heatmap"]

SUFFIXES = (".svg", ".pdf", ".png")


def check_plot(grid: Grid, path: Path) -> None:
    """Raise ConfigError, before anything is trained, if `draw_heatmap` could not draw."""
    if len(grid.varied) != 2:
        raise ConfigError(
            f"--plot draws a sweep over two settings, each with several values; this one varies "
            f"{', '.join(grid.varied) or 'nothing'}"
        )
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path}: expected a file ending in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            '--plot needs matplotlib, which is not installed; install it with: pip install "sparsecore[plot]"'
        ) from None


def draw_heatmap(
    grid: Grid, rows: Sequence[dict[str, Any]], metric: str, path: Path, title: str = ""
) -> None:
    """Write a picture of the mean of a test metric over seeds at all points of a grid; cells that failed stay blank.

    Args:
        grid: with two varied axes; the first goes down, the second to the right.
        rows: of `recsys.sweep.summary.summarise`.
        metric: such as "ndcg@20".
        path: .svg, .pdf or .png.
        title: above the picture, before the name of the metric.
    """
    check_plot(grid, path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    (down, ys), (right, xs) = grid.varied.items()
    values = heat_values(grid, rows, metric)
    figure = Figure(figsize=(2.2 + 0.95 * len(xs), 1.6 + 0.55 * len(ys)), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no state of pyplot
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(xs)), [str(x) for x in xs])
    axes.set_yticks(range(len(ys)), [str(y) for y in ys])
    axes.set_xlabel(right)
    axes.set_ylabel(down)
    axes.set_title(f"{title}: test {metric}" if title else f"test {metric}")
    finite = values[np.isfinite(values)]
    middle = (finite.min() + finite.max()) / 2 if finite.size else math.nan
    for (y, x), value in np.ndenumerate(values):
        if math.isfinite(value):
            colour = "black" if value > middle else "white"
            axes.text(x, y, f"{value:.4f}", ha="center", va="center", color=colour)
    if finite.size:
        figure.colorbar(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same figures give the same file: no date, no random names; text stays text.
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[path.suffix]
    with rc_context({"svg.hashsalt": "recsys", "svg.fonttype": "none"}), replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], metadata=metadata)


def heat_values(grid: Grid, rows: Sequence[dict[str, Any]], metric: str) -> np.ndarray:
    """(values of the first varied axis, of the second) means; NaN where a cell has none."""
    down, right = grid.varied
    places = [list(grid.axes).index(key) for key in (down, right)]
    means = {row["cell"]: row["test"].get(metric, {}).get("mean", math.nan) for row in rows}
    shape = (len(grid.axes[down]), len(grid.axes[right]))
    values = np.full(shape, np.nan)
    for point, name in grid.names:
        y, x = (grid.axes[key].index(point[place]) for key, place in zip((down, right), places, strict=True))
        values[y, x] = means.get(name, math.nan)
    return values
