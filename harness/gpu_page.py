"""The page of `harness.gpu_check`: what was measured as tables in Markdown, and what was not."""

from __future__ import annotations

from typing import Any

from harness.gpu_worker import Row

__all__ = ["SECTIONS", "left_out", "page", "shown_density"]

SECTIONS = (
    "operations",
    "training steps",
    "memory",
    "further operations",
    "further training steps",
)  # in the order of the measurements
_TARGETS, _AT_DENSITY = ("gather ", "gather_dot ", "score_topk "), 0.25
_NOT_MEASURED = "not measured"


def left_out(document: dict[str, Any]) -> list[str]:
    """What there was no time for, or no process left to measure it, in the order of the measurements."""
    rows = [row for section in SECTIONS for row in document[section]]
    late = [row for row in rows if row.get("error", "").startswith(_NOT_MEASURED)]
    return [" @ ".join(part for part in (row["name"], shown_density(row)) if part) for row in late]


def _number(row: Row, key: str, form: str = ".2f") -> str:
    return format(row[key], form) if row.get(key) is not None else ""


def shown_density(row: Row) -> str:
    return _number(row, "density", "g")


def _operations(rows: list[Row]) -> list[str]:
    lines = [
        "Ratio: time of the fastest dense form / ours, minima of interleaved samples (*of medians* beside it); above 1",
        "sparse is faster. Float32; TF32, and for ours the sum of two bfloat16, only where the name says so. Each call",
        "is timed between two events, behind kernels that overwrite the cache and wait until the host has launched it:",
        "what the device needs. Host: what the host needs to launch it, ours / dense; a loop of calls takes the longer",
        "of the two, the replay of a CUDA graph the device's alone. *In a loop*: the ratio of that longer time.",
        "Others: time / ours; *masked* is dense with weight x mask in the call (in a training step the gradient in the",
        "input reuses the forward's). Deviation: relative error against dense, before timing. Syncs: how often a call",
        "makes the host wait for the device, as far as torch tells.",
        "",
        "| operation | density | ratio | of medians | in a loop | dense | ms (min / median) | dense ms | host ms "
        "| others | deviation | syncs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['name']} | {shown_density(r)} | {r['error']} | | | | | | | | | |")
            continue
        others = ", ".join(f"{name} {ratio:.1f}" for name, ratio in r["others"].items())
        lines.append(
            f"| {r['name']} | {shown_density(r)} | {r['ratio']:.2f} | {r['median ratio']:.2f} "
            f"| {_number(r, 'loop ratio')} | {r['dense']} "
            f"| {r['ms']:.3g} / {r['median ms']:.3g} | {r['dense ms']:.3g} "
            f"| {r['host ms']:.2g} / {r['dense host ms']:.2g} | {others} | {r['deviation']:.1e} "
            f"| {_number(r, 'syncs', 'd')} |"
        )
    lines += [""]
    for r in rows:
        for form, error in r.get("failed forms", {}).items():
            lines.append(f"{r['name']} @ {shown_density(r)}, {form}: {error}.")
    lines += ["", "Highest density of those measured at which sparse is no slower than dense:", ""]
    for name in dict.fromkeys(r["name"] for r in rows if r["density"] is not None and "ratio" in r):
        device, loop = (_highest(rows, name, key) for key in ("ratio", "loop ratio"))
        lines.append(f"* {name}: {device}; in a loop {loop}")
    return lines


def _highest(rows: list[Row], name: str, key: str) -> str:
    fast = [r["density"] for r in rows if r["name"] == name and r.get(key, 0) >= 1]
    return f"{max(fast):g}" if fast else "none"


def _targets(rows: list[Row]) -> list[str]:
    """Which of the targets hold by the device's time, and which in a loop of eager calls."""
    judged = [
        r
        for r in rows
        if r["name"].startswith(_TARGETS) and r["density"] == _AT_DENSITY and "loop ratio" in r
    ]
    if not judged:
        return []
    lines = [f"Targets, no slower than dense at density {_AT_DENSITY:g}:", ""]
    for r in judged:
        verdicts = [
            f"{r[key]:.2f} {where} ({'holds' if r[key] >= 1 else 'missed'})"
            for key, where in (("ratio", "on the device"), ("loop ratio", "in a loop of eager calls"))
        ]
        lines.append(f"* {r['name']}: {', '.join(verdicts)}")
    return [*lines, ""]


def _steps(rows: list[Row]) -> list[str]:
    lines = [
        "Time: fastest dense form / form, higher is better. Memory: form / the dense form that takes least, lower is",
        "better; resident between steps, and the peak of a step, as torch's allocator counts them; counted: weights,",
        "gradients, optimizer state, indices (explorers keep no history, track_ever_active=False). Target: density",
        "x 1.15, of resident. Batches are there before. MultVAE has no dropout; the noise of its latent variables is",
        "drawn by the host, in a CUDA graph by the device.",
        "",
        "| workload | form | time ratio | of medians | ms (min / median) | exploration ms | resident MB | ratio "
        "| target | peak MB | ratio | counted MB | ratio | syncs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        head = f"| {r['name']} | {r.get('form', '')} "
        if "error" in r:
            head += f"{r['error']} "
        milliseconds = f"{r['ms']:.3g} / {r['median ms']:.3g}" if "ms" in r else ""
        size = [
            _number({k: r.get(k, 0) / 1e6}, k, ",.1f") if r.get(k) else ""
            for k in ("resident", "peak", "counted")
        ]
        lines.append(
            head + f"| {_number(r, 'ratio')} | {_number(r, 'median ratio')} "
            f"| {milliseconds} | {_number(r, 'exploration ms', '.3g')} "
            f"| {size[0]} | {_number(r, 'resident ratio', '.3f')} | {_number(r, 'target', '.3f')} "
            f"| {size[1]} | {_number(r, 'peak ratio', '.3f')} | {size[2]} | {_number(r, 'counted ratio', '.3f')} "
            f"| {_number(r, 'syncs', 'd')} |"
        )
    return lines


def _tests(tests: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{number} {what}" for what, number in tests["counts"].items()) or "no counts"
    which = "gpu, slow ones too" if tests.get("slow") else "gpu and not slow"
    lines = [f"Tests marked {which}: {counts}; exit code {tests['exit code']}, {tests['seconds']:.0f} s.", ""]
    if missing := tests.get("not collected"):
        listed = "; ".join(f"{file} (needs {package})" for file, package in missing.items())
        lines += [f"Not collected, so that their tests did not run here: {listed}.", ""]
    return lines + (["```text", *tests["tail"].splitlines(), "```", ""] if tests["tail"] else [])


def page(document: dict[str, Any]) -> list[str]:
    facts = ", ".join(f"{key} {value}" for key, value in document["device"].items()) or "no device answered"
    lines = ["# On a GPU", "", f"Device: {facts}. {document['seconds']:g} s in all.", ""]
    if document["quick"]:
        lines += ["Tiny shapes: everything ran once, nothing is judged.", ""]
    if missing := left_out(document):
        lines += [f"Not measured, {len(missing)} in all: {'; '.join(missing)}.", ""]
    if document["tests"]:
        lines += _tests(document["tests"])
    for section in SECTIONS:
        table = _operations if section.endswith("operations") else _steps
        lines += [f"## {section.capitalize()}", "", *table(document[section]), ""]
        lines += [] if document["quick"] else _targets(document[section])
    lines += ["## Where the host waits", ""]
    places: dict[str, list[str]] = {}
    for row in (row for section in SECTIONS for row in document[section]):
        for place in row.get("sync places", ()):
            names = places.setdefault(place, [])
            names += [row["name"]] if row["name"] not in names else []
    lines += [f"* `{place}`: {'; '.join(names)}" for place, names in sorted(places.items())] or ["Nowhere."]
    lines += ["", "## Warnings that reached the user", ""]
    lines += [f"* {text} (first in: {name})" for text, name in document["warnings"].items()] or ["None."]
    return lines
