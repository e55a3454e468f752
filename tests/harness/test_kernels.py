"""The kernel benchmark on tiny shapes: every form of a case computes the same, the files are complete."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from harness import (
    bag_forms,
    compile_times,
    graph_forms,
    handoff,
    kernel_forms,
    kernels,
    lazy_forms,
    update_forms,
)
from harness.ceilings import measure_ceilings
from harness.kernel_cases import CASES, Case
from harness.losing_cases import LOSING, SKEWED
from harness.operands import Forms, Table

# Forms without a value of their own: they change state, or look up other rows at each call.
STATEFUL = (
    kernel_forms.gather,
    kernel_forms.gather_dot,
    update_forms.update,
    lazy_forms.lazy_adam,
    lazy_forms.lazy_adam_alone,
    kernel_forms.explore,
)
COMPARED = [case for case in (*CASES, *LOSING, *SKEWED) if case.build not in STATEFUL]


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
def test_all_forms_compute_the_same(case: Case) -> None:
    forms = case.build(0.5, **case.quick)
    ours = forms.ours()
    for name, run in {**forms.dense, **forms.others}.items():
        other = run()
        if case.build is kernel_forms.score_topk:
            torch.testing.assert_close(ours[0], other[0], msg=name)  # type: ignore[index]
            continue
        other = torch.as_tensor(other)
        if other.layout == torch.sparse_csr:
            other = other.values()
        assert isinstance(ours, torch.Tensor)
        if case.build is kernel_forms.sddmm and other.shape != ours.shape:
            continue  # dense: at every position
        torch.testing.assert_close(ours, other if other.shape == ours.shape else other.t(), msg=name)


@pytest.mark.parametrize("each", [1, 5])
@pytest.mark.parametrize("build", [kernel_forms.gather, kernel_forms.gather_dot])
def test_lookups_compute_the_same_of_the_same_ids(
    build: Callable[..., Forms], each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids(rows: int, *shape: int) -> Callable[[], torch.Tensor]:
        fixed = torch.randint(rows, shape, generator=torch.Generator().manual_seed(len(shape)))
        return lambda: fixed

    monkeypatch.setattr(kernel_forms, "random_ids", ids)
    forms = build(
        0.5, rows=50, cols=20, batch=7, **({"each": each} if build is kernel_forms.gather_dot else {})
    )
    ours = forms.ours()
    assert isinstance(ours, torch.Tensor)
    assert len(forms.dense) == 3 + (each > 1 and build is kernel_forms.gather_dot)
    for name, run in forms.dense.items():
        found = run()
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found.view(ours.shape), ours, msg=name)


_BAGS = {"rows": 50, "cols": 20, "batch": 3, "length": 5}
_GRAPH = {"dim": 20, "users": 30, "items": 40}
_OF_TABLES = (
    (bag_forms.bag, _BAGS),
    (bag_forms.bag_grad, _BAGS),
    (bag_forms.bag_dot, _BAGS),
    (lazy_forms.touched, {"rows": 50, "cols": 20, "batch": 30}),
    (graph_forms.propagate_mean_grad, _GRAPH | {"hops": 2}),
)


@pytest.mark.parametrize(
    ("build", "size"),
    [
        *((build, size | {"encoding": e}) for build, size in _OF_TABLES for e in ("bitmap", "csr")),
        (graph_forms.propagate_rows, _GRAPH | {"batch": 9}),
        (graph_forms.propagate_rows_t, _GRAPH | {"batch": 9}),
    ],
    ids=lambda given: given.get("encoding", "") if isinstance(given, dict) else given.__name__,
)
def test_forms_of_bags_touched_rows_and_graphs_compute_the_same(
    build: Callable[..., Forms], size: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids(rows: int, *shape: int) -> Callable[[], torch.Tensor]:
        fixed = torch.randint(rows, shape, generator=torch.Generator().manual_seed(3))
        return lambda: fixed

    for module in (bag_forms, lazy_forms, graph_forms):
        monkeypatch.setattr(module, "random_ids", ids)
    forms = build(0.5, **size)
    ours = forms.ours()
    for name, run in forms.dense.items():
        other = run()
        assert isinstance(other, torch.Tensor)
        if isinstance(ours, tuple):  # places of values, and those
            places, values = ours
            nnz = Table(size["rows"], size["cols"], 0.5).nnz
            whole = torch.zeros(nnz).index_copy(0, places, values)
        else:
            assert isinstance(ours, torch.Tensor)
            whole = ours
        if whole.dim() == 1 and other.dim() == 2:
            rows, cols = other.shape
            other = other.to_dense().view(-1)[Table(rows, cols, 0.5).pattern.positions()]
        torch.testing.assert_close(whole, other, msg=name)


def test_every_target_is_measured() -> None:
    for case in (*CASES, *LOSING, *SKEWED):
        assert set(case.targets) <= set(case.densities), case.name


def test_a_case_without_its_data_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSECORE_DATA", raising=False)
    reasons = [reason for case in CASES if (reason := case.missing())]
    assert reasons == ["gowalla is not in SPARSECORE_DATA"] * 3


def test_ceilings_are_rates() -> None:
    found = measure_ceilings(1, quick=True)
    assert all(0 < rate < float("inf") for rate in dataclasses.astuple(found))


def test_a_handoff_is_told_and_answered() -> None:
    line = np.zeros(16, np.int64)
    assert not handoff._bounce(line, 1, False)  # nobody answers
    assert line[0] == 1
    assert handoff._bounce(line, 1, True)
    assert line[0] == 2
    found = handoff.handoff_ns(rounds=50, repeats=2)
    assert found is None or found > 0  # None on busy processors


def test_the_command_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--quick", "--threads", "1", "--output", str(tmp_path / "kernels")]
    monkeypatch.setattr("sys.argv", ["kernels", *arguments])
    app = typer.Typer()
    app.command()(kernels.main)
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["operation"] for row in document["wins"]} == {case.name for case in CASES}
    assert len(document["losses"]) == sum(len(case.densities) for case in (*LOSING, *SKEWED))
    assert all(row["ratio"] > 0 and row["rate"] > 0 for row in document["wins"] + document["losses"])
    assert len(document["overhead"]) == 4
    assert len(document["handoff ns"]) == 2
    assert "A cache line to another processor and back:" in (tmp_path / "kernels.md").read_text()
    page = (tmp_path / "kernels.md").read_text()
    assert all(case.name in page for case in (*CASES, *LOSING, *SKEWED))
    assert str(tmp_path) not in page


def test_imports_are_timed() -> None:
    """A ratio would be a time in disguise: only that all three are measured. The figures are in results/kernels.md."""
    seconds = compile_times.import_seconds(samples=1)
    assert list(seconds) == ["torch", "torch, numba", "sparsecore"]
    assert all(0 < value < float("inf") for value in seconds.values())
