"""Quality against what it costs, as a figure. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from pathlib import Path

from recsys.compare import Comparison, Line
from recsys.errors import RecsysError
from recsys.files import replacing

__all__ = ["check_plot", "save_plot"]

FORMATS = ("png", "svg")


def check_plot(path: Path) -> None:
    """Raise RecsysError where `save_plot` could not work: another kind of file, or no matplotlib."""
    if path.suffix.removeprefix(".") not in FORMATS:
        raise RecsysError(f"--plot: expected a file ending in .png or .svg, got {path.name!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RecsysError(
            "plots need matplotlib: python -m pip install matplotlib, or sparsecore[plot]"
        ) from None


def save_plot(comparison: Comparison, path: Path) -> None:
    """Draw the metric against the fraction of weights kept, multiply-adds, memory and time, as .png or .svg.

    Lines of one model and method are joined by density; bars are standard deviations over seeds.

    Raises:
        RecsysError: see `check_plot`.
    """
    check_plot(path)
    # A figure of its own, without pyplot: no display is looked for, and no state of the caller's is touched.
    from matplotlib.figure import Figure

    series: dict[str, list[Line]] = {}
    for line in comparison.lines:
        # A label with a folder is one of several with the same density: each is a series of its own.
        series.setdefault(line.label, []).append(line)
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = {
        "fraction of weights kept": lambda line: line.kept,
        "million multiply-adds a step": lambda line: line.macs / 1e6,
        "resident MB in training": lambda line: line.resident_bytes / 1e6,
        "seconds of training": lambda line: line.seconds,
    }
    for axes, (title, cost) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for label, lines in series.items():
            lines = sorted(lines, key=lambda line: line.kept)
            quality = [line.test[comparison.metric] for line in lines]
            axes.errorbar(
                [cost(line) for line in lines],
                [q.mean for q in quality],
                yerr=[q.sd or 0.0 for q in quality],
                marker="o",
                capsize=3,
                label=label,
            )
        axes.set_xlabel(title)
        axes.set_ylabel(comparison.metric)
        right = axes.get_xlim()[1]
        axes.set_xlim(-0.03 * right, right)  # from 0, with room for a point there
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"{comparison.dataset}, {comparison.protocol['ranking']} ranking")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=150)
