"""Every workload runs, has the forms it says, and its counts are those of an independent count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparsecore
from harness.suite.asv import GROUPS, cells
from harness.suite.device import device_workloads
from harness.suite.measure import Effort, measure, peak_bytes
from harness.suite.registry import WORKLOADS, choose
from harness.suite.workload import METRICS, Form, Missing, Workload, density_of, method_of
from sparsecore import ops
from sparsecore.measure import Timing

# The slower models' quality is left to pull requests.
QUICK = [w.name for w in choose("^(?!(neumf|convncf|ultragcn)-quality)", quick=True)]


@pytest.mark.parametrize("name", QUICK)
def test_a_workload_runs_and_counts(name: str) -> None:
    workload = WORKLOADS[name]
    figures = measure(workload, Effort(counts=True))
    assert tuple(figures) == workload.forms
    for form, values in figures.items():
        assert set(values) <= set(METRICS)
        assert all(math.isfinite(value) for value in values.values()), form
        assert all(value >= 0 for metric, value in values.items() if metric != "quality_gap"), form
        known = set(GROUPS[workload.group]) | {
            metric for metric in METRICS if metric.startswith("quality_loss_")
        }
        assert set(values) <= known, set(values) - known
    sparse = {form: f for form, f in figures.items() if method_of(form) in ("dsl", "sparse", "bitmap", "csr")}
    for form, values in sparse.items():
        if "bytes_vs_dense" in values and density_of(form) < 1:
            assert values["bytes_vs_dense"] < 1, form


@pytest.mark.parametrize("workload", device_workloads("cpu", quick=True), ids=lambda workload: workload.name)
def test_workloads_of_a_device_run_on_the_cpu_too(workload: Workload) -> None:
    with sparsecore.backend("torch"):
        figures = measure(workload, Effort(counts=True))
    assert tuple(figures) == workload.forms
    for values in figures.values():
        assert set(values) <= set(GROUPS["device"])
        assert all(math.isfinite(value) and value >= 0 for value in values.values())


def test_forms_of_a_device_are_not_named_after_an_encoding() -> None:
    """There a pattern is a bitmap, here it is CSR; "csr" alone is a graph, which is CSR everywhere."""
    forms = {form for workload in device_workloads() for form in workload.forms}
    assert {method_of(form) for form in forms} == {"dense", "masked", "sparse", "csr"}
    assert "csr" in forms
    assert not [form for form in forms if form.startswith("csr@")]


def test_workloads_of_a_device_are_missing_without_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for workload in device_workloads():
        with pytest.raises(Missing, match="no CUDA device"):
            measure(workload, Effort(counts=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11, at its first profile
@pytest.mark.feature("measurements on a GPU")
def test_workloads_of_a_device_are_timed_on_it() -> None:
    for workload in device_workloads(quick=True):
        figures = measure(workload, Effort(counts=True, seconds=0.2))
        assert tuple(figures) == workload.forms
        assert all(values["time_vs_frozen"] > 0 for values in figures.values())


def test_counts_repeat() -> None:
    of_ids = ("touched-20000x64-b512", "bag-2000x300-b64", "propagate_rows-1000x64-b128")
    for name in ("spmm-2000x300-b64", "multvae-train", "linear-1000x300-b64", *of_ids):
        assert measure(WORKLOADS[name], Effort()) == measure(WORKLOADS[name], Effort())


def test_times_are_shares_of_the_fastest_dense_form(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = {"dense": 4.0, "dense/fast": 1.0, "masked@0.5": 8.0, "dsl@0.5": 2.0, "frozen": 0.5}
    taken = {name: Timing(seconds, 1.5 * seconds, 9) for name, seconds in made_up.items()}
    monkeypatch.setattr("harness.suite.measure.interleaved", lambda runs, **options: dict(taken))
    forms = {name: Form(lambda: None) for name in made_up}
    figures = measure(
        Workload("w", "train", "", tuple(forms), lambda: forms), Effort(counts=False, seconds=1)
    )
    assert set(figures) == {"dense", "masked@0.5", "dsl@0.5"}
    expected = {
        "seconds": 2.0,
        "noise": 0.5,
        "time_vs_frozen": 4.0,
        "time_vs_dense": 2.0,
        "time_vs_masked": 0.25,
    }
    assert figures["dsl@0.5"] == expected
    assert figures["dense"] == {"seconds": 1.0, "noise": 0.5, "time_vs_frozen": 2.0}


def test_what_a_revision_lacks_is_missing_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def workload(*needs: str, data: str | None = None) -> Workload:
        return Workload("w", "layer", "", ("dense",), dict, needs, data)

    for needs in (
        "sparsecore.NoSuchLayer",
        "sparsecore.no.such.module",
        "recsys.models.nothing",
        "nowhere.at.all",
    ):
        with pytest.raises(Missing, match=needs):
            workload(needs).check()
    workload("sparsecore.SparseLinear", "recsys.models.neumf", "sparsecore.encoding.encode").check()
    monkeypatch.delenv("SPARSECORE_DATA", raising=False)
    with pytest.raises(Missing, match="gowalla is not in SPARSECORE_DATA"):
        workload(data="gowalla").check()


def test_peak_memory_is_exact_and_repeats() -> None:
    def run() -> None:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        torch.empty(1200)
        del b

    assert [peak_bytes(run) for _ in range(3)] == [4 * 1700] * 3


def test_a_hidden_dense_copy_shows() -> None:
    layer = sparsecore.SparseLinear(200, 300, density=0.1)
    x = torch.ones(4, 200)
    honest = peak_bytes(lambda: layer(x))
    hidden = peak_bytes(lambda: (layer.to_dense(), layer(x)))
    assert honest < 4 * 200 * 300 / 2  # the output, and what a backend makes of the index for the call
    assert hidden >= honest + 4 * 200 * 300


def test_dense_models_agree_with_torchs_counter() -> None:
    """Layers that torch counts: matrix products and convolutions."""
    from harness.comparison import compare

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = torch.ones(2, 3, 8, 8)

    def step() -> None:
        model(x).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    found = compare({"dense": step, "again": step}, seconds=0.01, rounds=2)
    assert 2 * found["dense"].macs == counter.get_total_flops()


def test_asv_parameters_are_full_products() -> None:
    for group in GROUPS:
        for quick in (True, False):
            works, forms = cells(group, quick)
            if group in ("layer", "train", "infer", "quality"):
                assert all(WORKLOADS[name].forms == forms for name in works)


def test_every_operator_is_measured() -> None:
    needed = {
        need for work in WORKLOADS.values() if work.group == "operation" and work.quick for need in work.needs
    }
    # A lookup whose gradient is `touched`.
    of_others = {"gather_touched", "gather_dot_touched"}
    assert {f"sparsecore.ops.{name}" for name in set(ops.__all__) - of_others} <= needed
    steps = {f"sparsecore.optim.{name}" for name in ("Adam", "AdamW", "SGD", "Adagrad")}
    assert steps <= needed


def test_choose() -> None:
    assert {w.name for w in choose("^import$")} == {"import"}
    assert all(w.quick for w in choose(quick=True))
    assert choose("no such") == []
