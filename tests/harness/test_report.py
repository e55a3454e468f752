"""The report: what it says, and that a browser shows it without a network."""

from __future__ import annotations

import dataclasses
import math
import random
import shutil
from pathlib import Path

import pytest

from harness.history.reader import Record, Run
from harness.report.figures import break_even, figures_of, outcomes_of, rigl_share, rows_of
from harness.report.page import Report, build, to_html, to_markdown
from harness.report.trend import Series, series_of, steps_of
from harness.revisions.collect import Outcome
from harness.suite.asv import GROUPS
from harness.suite.registry import WORKLOADS
from harness.suite.workload import density_of

SHARED = ("spmm-2000x300-b64", "linear-1000x300-b64", "lightgcn-train", "multvae-train", "multvae-recommend")


def run(number: int, worse: float = 1.0, drop: tuple[str, ...] = ()) -> Run:
    """A made-up run; `worse` multiplies the MACs of one form, `drop` fails workloads."""
    draw = random.Random(number)
    records = []
    for name in (*SHARED, "multvae-quality"):
        workload = WORKLOADS[name]
        for metric in GROUPS[workload.group]:
            for form in workload.forms:
                density = density_of(form)
                value = {
                    "macs": 1e6 * density,
                    "macs_vs_dense": density,
                    "resident_bytes": 4e6 * density,
                    "bytes_vs_dense": density,
                    "time_vs_dense": 0.6 + density,
                    "time_vs_frozen": 2.0 + 0.01 * draw.random(),
                    "quality_loss": 0.6,
                }.get(metric, 0.5)
                if (name, form, metric) == ("multvae-train", "dsl@0.25", "macs"):
                    value *= worse
                if (name, metric) == ("lightgcn-train", "macs_vs_dense"):
                    value = 0.9
                if form == "dense" and metric.endswith("_vs_dense"):
                    value = math.nan
                where = f"bench_x.{workload.group}.track_{metric}"
                records.append(Record(where, (name, form), None if name in drop else value, "1"))
    commit = f"{number:040x}"
    return Run(
        Path(f"{commit}.json"), commit, 10**12 + number, "box", "3.11", {"torch": "2"}, {}, tuple(records)
    )


def test_figures_and_outcomes() -> None:
    figures = figures_of(run(1, drop=("lightgcn-train",)))
    assert figures["multvae-train"]["dsl@0.25"]["macs"] == 250_000
    assert "lightgcn-train" not in figures
    assert "macs_vs_dense" not in figures["multvae-train"]["dense"]
    assert outcomes_of(run(1, drop=("lightgcn-train",)))["lightgcn-train"] == Outcome(
        error="failed when it was measured"
    )
    row = next(r for r in rows_of(figures) if (r.workload, r.form) == ("multvae-train", "dsl@0.25"))
    assert (row.ideal, row.density, row.method) == (4.0, 0.25, "dsl")
    assert row.achieved == pytest.approx(1 / 0.85)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({0.5: 1.2, 0.25: 0.8, 0.1: 0.4}, "0.38"),
        ({0.5: 0.9, 0.1: 0.4}, "above 0.5"),
        ({0.5: 1.9, 0.1: 1.4}, "below 0.1"),
        ({0.5: 0.5, 0.1: 1.4}, "no single one"),
        ({0.5: math.nan}, "not timed"),
    ],
)
def test_break_even(shares: dict[float, float], words: str) -> None:
    assert break_even(shares) == words


def test_rigl_formula() -> None:
    assert rigl_share(1.0, 100) == 1.0
    assert rigl_share(0.1, 10**9) == pytest.approx(0.1)
    assert rigl_share(0.0, 1) == pytest.approx(1 / 6)


def test_steps_are_blamed_on_their_commit() -> None:
    runs = [run(number, worse=1.0 if number < 7 else 1.25) for number in range(12)]
    steps = [s for series in series_of(runs, ("macs",)) for s in steps_of(runs, series)]
    assert [(s.commit, s.series.form, s.change) for s in steps] == [(runs[7].commit, "dsl@0.25", 0.25)]
    slow = [1.0, 1.01, 0.99, 1.0, 1.3, 1.31, 1.29, 1.3]
    series = Series("w", "f", "time_vs_frozen", tuple(slow))
    found = steps_of(runs, series)
    assert [s.index for s in found] == [4]
    assert found[0].change == pytest.approx(0.3, abs=0.02)
    assert steps_of(runs, Series("w", "f", "time_vs_frozen", (1.0, math.nan, 2.0))) == []
    # Runs that lack a figure are no step of a count.
    assert steps_of(runs, Series("w", "f", "macs", (5.0, math.nan, 5.0))) == []


@pytest.fixture(scope="module")
def report() -> Report:
    runs = [run(number, worse=1.0 if number < 7 else 1.25) for number in range(8)]
    return build(runs, ["x.json: skipped, not a result file of asv: <b>bad</b>"])


def test_what_the_page_says(report: Report) -> None:
    assert report.verdict.startswith("REGRESSION in 1 figures")
    html = to_html(report)
    assert html.index('id="verdict"') < html.index("<h2>")
    for text in (
        "REGRESSION in 1 figures",
        "Break-even density",
        "only the first hop reads the sparse table",
        "python -m benchmarks &#39;^multvae-train$&#39;",
        "(loses)",
        "&lt;b&gt;bad&lt;/b&gt;",
        "+25.0%",
    ):
        assert text in html or text.replace("&#39;", "'") in html, text
    assert "<script" not in html
    for attribute in ('src="http', 'href="http', "url(http", "@import"):
        assert attribute not in html
    # A table beside every chart, a name for every chart.
    assert (
        html.count('<svg role="img" aria-label="')
        == html.count("<figure>")
        == len(report.groups) + len(report.trends)
    )
    assert html.count("<table>") >= html.count("<figure>")
    assert to_html(report).replace(" UTC", "")[:500] == html.replace(" UTC", "")[:500]


def test_a_first_run_and_none() -> None:
    first = build([run(1)])
    assert "nothing older" in first.verdict
    assert "nothing older" in to_html(first)
    assert "| multvae-train | dsl@0.25 |" in to_markdown(first)
    with pytest.raises(ValueError, match="harness run"):
        build([])
    assert build([run(1), run(1)]).verdict.startswith("PASS")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
def test_in_a_browser(report: Report, tmp_path: Path, record_property) -> None:
    """Nothing leaves the machine, nothing fails, the verdict is there at once, on a desk and on a phone."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH")
    page_file = tmp_path / "report.html"
    page_file.write_text(to_html(report), encoding="utf-8")
    with playwright.sync_playwright() as driver:
        flags = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
        ]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        for name, width, height in (("desk", 1280, 800), ("phone", 390, 780)):
            page = browser.new_page(viewport={"width": width, "height": height})
            requests: list[str] = []
            problems: list[str] = []
            page.on("request", lambda request, into=requests: into.append(request.url))
            page.on("console", lambda message, into=problems: into.append(message.text))
            page.on("pageerror", lambda error, into=problems: into.append(str(error)))
            page.goto(page_file.as_uri())
            assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
            assert problems == []
            box = page.locator("#verdict").bounding_box()
            assert box is not None
            assert box["y"] + box["height"] < height
            assert (
                page.evaluate("document.documentElement.scrollWidth") <= width
            )  # wide tables scroll by themselves
            charts = page.locator("svg[role=img]")
            assert charts.count() == len(report.groups) + len(report.trends)
            for place in range(charts.count()):
                size = charts.nth(place).bounding_box()
                assert size is not None
                assert size["width"] > 200
                assert charts.nth(place).locator("path").count() > 5
            page.screenshot(path=str(tmp_path / f"{name}.png"), full_page=True)
            record_property("screenshot", str(tmp_path / f"{name}.png"))
            page.close()
        browser.close()


def only(one: Run, *workloads: str) -> Run:
    """As a run of some workloads alone."""
    return dataclasses.replace(one, records=tuple(r for r in one.records if r.params[0] in workloads))


def test_each_workload_is_held_against_the_newest_run_that_has_it() -> None:
    runs = [run(1), only(run(2), "lightgcn-train"), only(run(3, worse=2.0), "multvae-train")]
    found = build(runs)
    assert found.code == 1
    assert found.verdict.startswith("REGRESSION in 1 figures: ")
    assert f"against {runs[0].commit[:10]}" in found.verdict
    assert "5 workloads that were measured earlier are not in it" in found.verdict
    # The line over commits is broken where a run has nothing, and goes on.
    lines = next(t for t in found.trends if t["metric"] == "macs")["lines"]["Models, training step"]
    assert lines[0] == 1.0
    assert all(math.isfinite(value) for value in lines)
    assert lines[2] > 1.0


def changed(one: Run, metric: str, value: float, version: str = "1") -> Run:
    """As a run in which a figure of one form is another."""

    def other(record: Record) -> Record:
        here = record.benchmark.endswith(f".track_{metric}") and record.params[1] == "dsl@0.25"
        return dataclasses.replace(record, value=value, version=version) if here else record

    return dataclasses.replace(one, records=tuple(map(other, one.records)))


def test_figures_are_written_by_their_kind() -> None:
    found = build([run(1), changed(changed(run(2), "quality_loss", 0.6512), "macs", 1234567.0)])
    html = to_html(found)
    assert "<td>0.6</td><td>0.6512</td>" in html
    assert "<td>250,000</td><td>1,234,567</td>" in html


def test_figures_of_two_versions_of_a_benchmark_are_not_compared() -> None:
    assert build([run(1), changed(run(2), "macs", 9e9)]).code == 1
    found = build([run(1), changed(run(2), "macs", 9e9, "2")])
    assert (found.code, found.findings, [s for s in found.steps if s.series.metric == "macs"]) == (0, [], [])
    assert "figures of other versions of their benchmarks are not compared" in found.verdict
    assert "other versions" not in build([run(1), run(2)]).verdict


def test_a_commit_that_is_not_measured_does_not_pass() -> None:
    found = build([run(1), run(2)], commit="f" * 40)
    assert found.code == 2
    assert found.verdict.startswith(
        f"ffffffffff is not measured, its nearest ancestor that is: PASS: {run(2).commit[:10]}"
    )
    assert build([run(1), run(2)], commit=run(2).commit).code == 0


def test_nothing_in_common_does_not_pass() -> None:
    found = build([only(run(1), "lightgcn-train"), only(run(2), "multvae-train")])
    assert found.code == 2
    assert found.verdict.startswith("INCONCLUSIVE: ")
    assert ", 0 exact counts" in found.verdict
