"""The judgement, on figures that are made up: what fails, what is allowed, what is only told."""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from harness.gate import run
from harness.gate.declared import Suite
from harness.gate.expectations import Allowance, ExpectationsError, find_allowance, read_expectations
from harness.gate.page import headline, plain, show
from harness.gate.verdict import Exit, compare_figures, compare_times, crossings, exit_code
from harness.revisions.collect import Outcome
from harness.revisions.subject import Subject
from harness.suite.registry import WORKLOADS

FIGURES = {"dsl@0.5": {"macs": 100.0, "peak_bytes": 64.0, "seconds": 1.0}, "dense": {"macs": 200.0}}


def outcome(**changes: float) -> dict[str, Outcome]:
    """One workload whose sparse form has some other figures."""
    return {"work": Outcome(figures={**FIGURES, "dsl@0.5": {**FIGURES["dsl@0.5"], **changes}})}


def statuses(found: list) -> list[tuple[str, str, str]]:
    return [(f.status, f.form, f.metric) for f in found]


def test_equal_figures_pass_and_clocks_decide_nothing() -> None:
    assert compare_figures(outcome(), outcome()) == []
    assert compare_figures(outcome(), outcome(seconds=9.0)) == []
    assert exit_code([]) == Exit.passed


@given(old=st.integers(1, 10**12), new=st.integers(1, 10**12))
def test_counts_are_compared_exactly(old: int, new: int) -> None:
    found = compare_figures(outcome(macs=float(old)), outcome(macs=float(new)))
    if new == old:
        assert not found
        return
    assert [f.status for f in found] == ["regression" if new > old else "improvement"]
    assert found[0].change == new / old - 1
    assert exit_code(found) == (Exit.regression if new > old else Exit.passed)


def test_what_is_gone_fails() -> None:
    bare = {"work": Outcome(figures={"dense": FIGURES["dense"]})}
    assert statuses(compare_figures(outcome(), bare)) == [("regression", "dsl@0.5", "*")]
    without = {"work": Outcome(figures={**FIGURES, "dsl@0.5": {"macs": 100.0}})}
    assert statuses(compare_figures(outcome(), without)) == [("regression", "dsl@0.5", "peak_bytes")]
    assert statuses(compare_figures(outcome(), {})) == [("regression", "*", "*")]
    assert statuses(compare_figures(outcome(), {"work": Outcome(missing="no data")})) == [
        ("regression", "*", "*")
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_fails_once(value: float) -> None:
    found = compare_figures(outcome(), outcome(peak_bytes=value))
    assert ("regression", "dsl@0.5", "peak_bytes") in statuses(found)
    assert exit_code(found) == Exit.regression
    if math.isnan(value):  # and was not before either: not this commit's doing
        assert compare_figures(outcome(peak_bytes=value), outcome(peak_bytes=value)) == []


def test_errors_are_the_heads_unless_the_base_has_them() -> None:
    broken = {"work": Outcome(error="Traceback\nValueError: no")}
    found = compare_figures(outcome(), broken)
    assert statuses(found) == [("regression", "*", "*")]
    assert "ValueError: no" in found[0].why
    both = compare_figures(broken, broken)
    assert [f.status for f in both] == ["inconclusive"]  # nothing is known of it
    assert "both revisions, here with: ValueError: no" in both[0].why
    assert exit_code(both) == Exit.inconclusive
    assert [f.status for f in compare_figures(broken, outcome())] == ["new"]


def test_what_the_base_did_not_have_is_new() -> None:
    assert [f.status for f in compare_figures({"work": Outcome(missing="no such layer")}, outcome())] == [
        "new"
    ]
    assert [f.status for f in compare_figures({}, outcome())] == ["new"]
    both = {"work": Outcome(missing="no data")}
    assert [f.status for f in compare_figures(both, both)] == ["skipped"]


def test_allowances() -> None:
    allowed = [
        Allowance(workload="wo*", form="dsl@*", metric="macs", up_to=110.0, reason="one more hop, see there")
    ]
    found = compare_figures(outcome(), outcome(macs=110.0), allowed)
    assert [(f.status, f.why) for f in found] == [("allowed", "one more hop, see there")]
    assert exit_code(found) == Exit.passed
    assert [f.status for f in compare_figures(outcome(), outcome(macs=111.0), allowed)] == ["regression"]
    assert [f.status for f in compare_figures(outcome(), outcome(peak_bytes=65.0), allowed)] == ["regression"]
    removed = [Allowance(workload="work", removed=True, reason="measured by others now")]
    assert [f.status for f in compare_figures(outcome(), {}, removed)] == ["allowed"]
    assert find_allowance(removed, "work", "*", "macs", 5.0) is None


def quality(*losses: float) -> dict[str, Outcome]:
    figures = {f"quality_loss_{seed}": loss for seed, loss in enumerate(losses)}
    return {"work": Outcome(figures={"dsl@0.25": {"quality_loss": sum(losses) / len(losses), **figures}})}


def test_quality() -> None:
    base = quality(0.6, 0.61, 0.59)
    assert compare_figures(base, base) == []
    worse = compare_figures(base, quality(0.621, 0.631, 0.61))  # 5 % of NDCG .4, every seed the same
    assert statuses(worse) == [("regression", "dsl@0.25", "quality_loss")]
    assert worse[0].change == pytest.approx(0.0517, abs=1e-3)
    assert compare_figures(base, quality(0.605, 0.615, 0.595)) == []  # 1 %
    noisy = compare_figures(base, quality(0.7, 0.53, 0.63))  # 5 % in the mean, but seeds disagree
    assert statuses(noisy) == [("inconclusive", "dsl@0.25", "quality_loss")]
    assert exit_code(noisy) == Exit.inconclusive
    assert [f.status for f in compare_figures(base, quality(0.5, 0.51, 0.49))] == ["improvement"]


@pytest.mark.parametrize("seeds", [0, 1])
def test_quality_of_which_no_two_seeds_are_known_is_inconclusive(seeds: int) -> None:
    """As of results that were kept before seeds were: no spread is known, and none is not a spread of 0."""

    def known(loss: float) -> dict[str, Outcome]:
        figures = {"quality_loss": loss, **{f"quality_loss_{seed}": loss for seed in range(seeds)}}
        return {"work": Outcome(figures={"dsl@0.25": figures})}

    worse = compare_figures(known(0.6), known(0.62))
    assert statuses(worse) == [("inconclusive", "dsl@0.25", "quality_loss")]
    assert f"{seeds} seeds are known" in worse[0].why
    assert compare_figures(known(0.6), known(0.605)) == []
    assert compare_figures(known(0.6), known(0.5)) == []
    allowed = [Allowance(workload="work", metric="quality_loss", up_to=0.63, reason="fewer layers")]
    assert [f.status for f in compare_figures(known(0.6), known(0.62), allowed)] == ["allowed"]


def times(*values: float) -> dict[str, dict[str, list[float]]]:
    return {"work": {"dsl@0.5": list(values)}}


def test_times() -> None:
    base = times(1.0, 1.01, 1.02)
    assert compare_times(base, times(1.09, 1.10, 1.11)) == []
    assert [f.status for f in compare_times(base, times(1.30, 1.31, 1.32))] == ["regression"]
    # Own noise of 8 %: 20 % may be chance, so they neither fail nor pass; 30 % are not, 9 % are too few.
    assert [f.status for f in compare_times(base, times(1.2, 1.3, 1.31))] == ["inconclusive"]
    assert [f.status for f in compare_times(base, times(1.3, 1.4, 1.41))] == ["regression"]
    assert compare_times(base, times(1.09, 1.18, 1.2)) == []
    assert compare_times(times(1.2, 1.3, 1.31), base) == []
    # Above 15 % nothing is said but that nothing can be said.
    assert [f.status for f in compare_times(base, times(1.3, 1.6, 1.7))] == ["inconclusive"]
    assert compare_times(base, times(1.05, 1.3, 1.31)) == []
    assert [f.status for f in compare_times(times(1.3, 1.31, 1.32), base)] == ["improvement"]
    assert compare_times({}, base) == []
    # Many rounds on a busy machine: most are slow, the best agree.
    busy = times(1.0, 1.01, 1.02, 1.03, 1.5, 1.6, 1.7, 1.8, 1.9)
    assert compare_times(busy, busy) == []
    slower = {"work": {"dsl@0.5": [1.3 * value for value in busy["work"]["dsl@0.5"]]}}
    assert [f.status for f in compare_times(busy, slower)] == ["regression"]
    # One round tells nothing of its noise.
    assert [f.status for f in compare_times(times(1.0), times(2.0))] == ["inconclusive"]


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1])
def test_an_unchanged_commit_is_seldom_inconclusive(noise: float) -> None:
    """Times of equal sides, as the rounds of a gate find them: a floor, and what a busy machine adds to it."""
    draw = random.Random(0)

    def rounds(count: int) -> list[float]:
        return [1 + draw.expovariate(1 / noise) for _ in range(count)]

    doubtful = 0
    for _ in range(2000):
        old, new = rounds(3), rounds(3)
        if compare_times(times(*old), times(*new)):
            old, new = old + rounds(6), new + rounds(6)  # the second measurement
            found = compare_times(times(*old), times(*new))
            assert "regression" not in {f.status for f in found}
            doubtful += "inconclusive" in {f.status for f in found}
    assert doubtful <= 2


def test_crossings_are_told() -> None:
    found = crossings(times(0.9, 0.95, 0.97), times(1.0, 1.02, 1.1))
    assert [(f.status, f.why) for f in found] == [("note", "slower than dense now")]
    assert exit_code(found) == Exit.passed


def test_expectations_file(tmp_path: Path) -> None:
    path = tmp_path / "expectations.toml"
    assert read_expectations(path) == []
    path.write_text(
        '[[allow]]\nworkload = "a"\nmetric = "macs"\nup_to = 5\nreason = "long enough to be one"\n'
    )
    assert read_expectations(path)[0].up_to == 5
    for text, message in (
        ("allow = 3", "entries"),
        ("[[allow]\n", "not TOML"),
        ('[[allow]]\nworkload = "a"\nup_to = 5\nreason = "short"\n', r"entry 1: reason"),
        ('[[allow]]\nworkload = "a"\nreason = "long enough to be one"\n', "either up_to"),
        (
            '[[allow]]\nworkload = "a"\nup_to = 1\nremoved = true\nreason = "long enough to be one"\n',
            "either",
        ),
        ('[[allow]]\nworkload = "a"\nupto = 1\nreason = "long enough to be one"\n', "upto"),
        ("other = 1", "nothing else"),
    ):
        path.write_text(text)
        with pytest.raises(ExpectationsError, match=message):
            read_expectations(path)


def test_what_fails_only_when_it_is_timed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(subject: Subject, names: Sequence[str], *, counts: bool = True, **options: object) -> dict:
        if counts or subject.label == "base":
            return {name: Outcome(figures={"dense": {"macs": 1.0, "time_vs_frozen": 1.0}}) for name in names}
        return {name: Outcome(error="Traceback\nMemoryError: no") for name in names}

    monkeypatch.setattr(run, "collect", collect)
    sides = (Subject(label, label, Path("."), label) for label in ("base", "head"))
    plan = run.Plan([WORKLOADS["spmm-2000x300-b64"]])
    found = run.compare(*sides, plan).findings
    assert [(f.status, f.why) for f in found] == [("regression", "fails when timed: MemoryError: no")]


def judged(
    monkeypatch: pytest.MonkeyPatch, times: bool | None, answer: Callable[[str, bool], Outcome]
) -> run.Verdict:
    """A gate whose processes answer what `answer` says of (label of the side, counting)."""

    def collect(subject: Subject, names: Sequence[str], *, counts: bool = True, **options: object) -> dict:
        return {name: answer(subject.label, counts) for name in names}

    monkeypatch.setattr(run, "collect", collect)
    sides = (Subject(label, label, Path("."), label) for label in ("base", "head"))
    return run.compare(*sides, run.Plan([WORKLOADS["spmm-2000x300-b64"]], times))


@pytest.mark.parametrize(
    "outcome",
    [Outcome(missing="no CUDA device"), Outcome(error="ImportError: broken benchmarks"), Outcome()],
    ids=["missing", "broken", "no figures"],
)
def test_a_gate_that_measured_nothing_does_not_pass(
    outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = judged(monkeypatch, None, lambda side, counting: outcome)
    assert exit_code(verdict.findings) == Exit.inconclusive
    assert "no figure of the 1 workloads could be compared" in [f.why for f in verdict.findings][-1]
    console = Console(record=True, width=300)
    show(verdict, console)
    text = console.export_text()
    assert "INCONCLUSIVE" in text
    assert ("broken benchmarks" in text) == (outcome.error is not None)


def test_figures_of_one_side_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Outcome(figures={"dense": {"macs": 1.0, "seconds": 1.0}})
    only_new = {"base": Outcome(missing="no such layer"), "head": whole}
    assert judged(monkeypatch, False, lambda side, counting: only_new[side]).counted == 0
    assert judged(monkeypatch, False, lambda side, counting: whole).counted == 1  # seconds decide nothing
    times = Outcome(figures={"dense": {"time_vs_frozen": 1.0}})
    verdict = judged(monkeypatch, True, lambda side, counting: times)
    assert (verdict.counted, verdict.timed, exit_code(verdict.findings)) == (0, 1, Exit.passed)


@pytest.mark.parametrize(("failing", "words"), [({"base"}, "in the base"), ({"base", "head"}, "in both")])
def test_what_fails_when_the_base_is_timed_is_inconclusive(
    failing: set[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = Outcome(figures={"dense": {"macs": 1.0, "time_vs_frozen": 1.0}})
    broken = Outcome(error="Traceback\nMemoryError: no")
    found = judged(
        monkeypatch, None, lambda side, counting: broken if not counting and side in failing else figures
    ).findings
    assert [f.status for f in found] == ["inconclusive"]
    assert words in found[0].why


@pytest.mark.parametrize(
    ("macs", "times", "taken"), [(2.0, None, False), (2.0, True, True), (1.0, None, True)]
)
def test_times_are_left_out_where_counts_decide(
    macs: float, times: bool | None, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = [Subject(label, label, Path(label), label) for label in ("base", "head")]
    timed: list[str] = []

    def collect(
        subject: Subject, names: list[str], counts: bool = True, **rest: object
    ) -> dict[str, Outcome]:
        timed.extend([] if counts else [subject.label])
        own = macs if subject.label == "head" else 1.0
        figures = {"macs": own} if counts else {"time_vs_frozen": 1.0, "time_vs_dense": 1.0}
        return {name: Outcome({"csr@0.5": figures}) for name in names}

    monkeypatch.setattr(run, "collect", collect)
    plan = run.Plan([WORKLOADS["spmm-2000x300-b64"]], times)
    verdict = run.compare(*sides, plan)
    assert bool(timed) == taken
    assert verdict.decided == (macs > 1 and not times)
    assert exit_code(verdict.findings) == (Exit.regression if macs > 1 else Exit.passed)
    assert ("the counts decide" in headline(verdict)) == verdict.decided


def test_a_count_that_is_not_taken_any_more_fails() -> None:
    found = compare_figures(outcome(), outcome(macs=0.0))
    assert statuses(found) == [("regression", "dsl@0.5", "macs")]
    assert "up_to = 0" in found[0].why
    allowed = [Allowance(workload="work", metric="macs", up_to=0, reason="nothing is multiplied now")]
    assert statuses(compare_figures(outcome(), outcome(macs=0.0), allowed)) == [
        ("allowed", "dsl@0.5", "macs")
    ]


@pytest.mark.parametrize("head", [outcome(), {"work": Outcome(missing="no sparsecore.spmmm", lacks=True)}])
def test_what_the_base_measures_and_this_suite_cannot_there_does_not_pass(head: dict[str, Outcome]) -> None:
    base = {"work": Outcome(missing="no sparsecore.spmmm", lacks=True)}
    found = compare_figures(base, head, known=["work"])
    assert exit_code(found) == Exit.inconclusive
    assert "no sparsecore.spmmm" in found[-1].why
    assert (
        exit_code(compare_figures(base, head)) == Exit.passed
    )  # the base's suite has no such workload: it is new
    renamed = [Allowance(workload="work", removed=True, reason="measured under a new name")]
    assert exit_code(compare_figures(base, head, renamed, known=["work"])) == Exit.passed
    without = {"work": Outcome(missing="no CUDA device")}
    assert exit_code(compare_figures(without, without, known=["work"])) == Exit.passed  # the machine's lack


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome(figures={"dense": {"macs": 1.0}}), Exit.passed),
        (Outcome(missing="not in SPARSECORE_DATA"), Exit.passed),
        (Outcome(missing="no sparsecore.spmmm", lacks=True), Exit.inconclusive),
        (Outcome(error="Traceback\nRuntimeError: no"), Exit.regression),
    ],
)
def test_a_suite_that_alone_has_changed_is_run(
    outcome: Outcome, status: Exit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    same = Subject("x", "x", tmp_path, "same")
    suite = Suite({}, differs=True)
    monkeypatch.setattr(run, "extract", lambda *given: same)
    monkeypatch.setattr(run, "snapshot", lambda *given: same)
    monkeypatch.setattr(run, "suite_of", lambda *given: suite)
    monkeypatch.setattr(run, "collect", lambda subject, names, **rest: dict.fromkeys(names, outcome))
    verdict = run.gate(tmp_path, "HEAD", run.Plan([WORKLOADS["spmm-2000x300-b64"]]), tmp_path)
    assert exit_code(verdict.findings) == status
    assert f"another suite: {int(outcome.missing is None)} workloads ran" in headline(verdict)
    assert ("1 workloads skipped: not in SPARSECORE_DATA (1)" in headline(verdict)) == (
        outcome.missing is not None and not outcome.lacks
    )


def test_the_headline_says_what_was_skipped() -> None:
    """A pass says nothing of what could not be measured, so it must not look as if it did."""
    here = Outcome(figures={"dense": {"macs": 1.0}})
    without = {f"real-{n}": Outcome(missing="gowalla is not in SPARSECORE_DATA") for n in range(3)}
    without |= {f"w-{n}": Outcome(missing=f"no {n}") for n in range(3)}
    side = Subject("x", "x", Path("."), "x")
    verdict = run.Verdict(side, side, compare_figures({"a": here, **without}, {"a": here, **without}))
    assert headline(verdict).startswith("PASS")
    assert "; 6 workloads skipped: gowalla is not in SPARSECORE_DATA (3), no 0 (1), " in headline(verdict)
    assert "other reasons (1)" in headline(verdict)
    assert "skipped" not in headline(run.Verdict(side, side, compare_figures({"a": here}, {"a": here})))


def test_an_interrupt_stops_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    both = threading.Barrier(2, timeout=60)

    def collect(subject: Subject, names: Sequence[str], *, stop: threading.Event, **rest: object) -> dict:
        both.wait()
        if subject.label == "base":
            raise KeyboardInterrupt  # as it comes out of the main thread's waiting
        assert stop.wait(60)
        ended.append(subject.label)
        return {}

    monkeypatch.setattr(run, "collect", collect)
    sides = (Subject(label, label, Path("."), label) for label in ("base", "head"))
    with pytest.raises(KeyboardInterrupt):
        run.compare(*sides, run.Plan([WORKLOADS["spmm-2000x300-b64"]]))
    assert ended == ["head"]


def test_findings_for_json_hold_no_nan() -> None:
    found = [plain(finding) for finding in compare_figures(outcome(), outcome(peak_bytes=math.inf))]
    assert json.loads(json.dumps(found, allow_nan=False))[0]["change"] is None
