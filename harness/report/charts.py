"""Charts as inline SVG: no script, no request, the same file from the same figures. Beside each stands a table."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from harness.report.figures import Row

__all__ = ["shares_chart", "trend_chart"]

# Dark enough for 4.5:1 on white, told apart by markers and dashes as well as by colour (Okabe and Ito's, darkened).
_STYLES = (
    ("#00507a", "o", "-"),
    ("#a33b00", "s", "--"),
    ("#00664d", "^", "-."),
    ("#7a3d66", "D", ":"),
    ("#333333", "v", "-"),
    ("#7a5a00", "P", "--"),
)


def _svg(figure: object, title: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "harness", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    start = text.index("<svg")
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg role="img" aria-label="{label}" ' + text[start + len("<svg ") :]


def shares_chart(rows: Sequence[Row], title: str) -> str:
    """Share of dense time by density: a line for the fastest sparse form of every workload, and MACs as the ideal.

    Masked and static forms are in the table only: masked is not sparse, and static steps cost what dynamic ones do.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[str, dict[float, float]] = {}
    ideal: dict[float, list[float]] = {}
    for row in rows:
        if row.method in ("masked", "static"):
            continue
        if math.isfinite(row.time_share):
            points = lines.setdefault(row.workload, {})
            points[row.density] = min(row.time_share, points.get(row.density, math.inf))
        if math.isfinite(row.macs_share):
            ideal.setdefault(row.density, []).append(row.macs_share)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (name, points) in enumerate(lines.items()):
        colour, marker, dash = _STYLES[place % len(_STYLES)]
        densities = sorted(points)
        axes.plot(
            densities, [points[d] for d in densities], color=colour, marker=marker, linestyle=dash, label=name
        )
    if ideal:
        densities = sorted(ideal)
        axes.plot(
            densities,
            [sum(ideal[d]) / len(ideal[d]) for d in densities],
            color="#777777",
            linestyle=(0, (1, 1)),
            label="multiply-adds (mean)",
        )
    axes.axhline(1.0, color="#000000", linewidth=0.8)
    axes.set_xlabel("density")
    axes.set_ylabel("share of dense time")
    axes.set_ylim(bottom=0)
    if lines or ideal:
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return _svg(figure, title)


def trend_chart(commits: Sequence[str], lines: Mapping[str, Sequence[float]], title: str, unit: str) -> str:
    """Values over commits, oldest first; where they are NaN the line is broken."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (name, values) in enumerate(lines.items()):
        colour, marker, dash = _STYLES[place % len(_STYLES)]
        axes.plot(
            range(len(values)), values, color=colour, marker=marker, markersize=4, linestyle=dash, label=name
        )
    shown = range(0, len(commits), max(1, len(commits) // 12))
    axes.set_xticks(list(shown), [commits[place][:7] for place in shown], rotation=45, ha="right")
    axes.set_ylabel(unit)
    if axes.get_lines():
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return _svg(figure, title)
