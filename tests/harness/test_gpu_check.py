"""The GPU check on the CPU: everything runs once on tiny shapes, and no failure costs more than its own row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sparsecore
from harness import gpu_check, gpu_operands, gpu_page, gpu_steps, gpu_worker
from harness.gpu_forms import OPERATIONS
from harness.gpu_further import FURTHER
from harness.gpu_worker import LATE, Job, Reply, run_jobs, time_calls, watch
from sparsecore.backends import backend_name
from sparsecore.measure import Timing

ROOT = Path(__file__).parents[2]


def ends(jobs: Sequence[Job], device: str, quick: bool, results: Connection) -> None:
    """A measuring process that dies over the job "bad"."""
    results.send(Reply([], facts={"device": "none"}))
    for job in jobs:
        if job.name == "bad":
            os._exit(7)
        results.send(Reply([job.row(ms=1.0)]))


def sleeps(jobs: Sequence[Job], device: str, quick: bool, results: Connection) -> None:
    results.send(Reply([], facts={"device": "none"}))
    results.send(Reply([jobs[0].row(ms=1.0)]))
    time.sleep(60)


def never_begins(jobs: Sequence[Job], device: str, quick: bool, results: Connection) -> None:
    os._exit(3)


def test_the_command_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--quick", "--device", "cpu", "--output", str(tmp_path / "gpu")]
    monkeypatch.setattr("sys.argv", ["gpu_check", *arguments])
    gpu_check.main()
    document = json.loads((tmp_path / "gpu.json").read_text())
    rows = [row for section in gpu_check.SECTIONS for row in document[section]]
    assert not [row for row in rows if "error" in row or row.get("failed forms")]
    assert document["warnings"] == {}
    assert document["device"]["torch"] == torch.__version__
    listed = gpu_check.jobs()
    assert list(listed)[-2:] == [
        "further operations",
        "further training steps",
    ]  # what a run that is too short leaves out
    operations = document["operations"] + document["further operations"]
    assert [(r["name"], r["density"]) for r in operations] == [
        (job.name, job.density) for job in listed["operations"] + listed["further operations"]
    ]
    assert all(r["ratio"] > 0 and r["host ms"] > 0 and r["deviation"] < 1e-4 for r in operations)
    assert {r["name"] for r in document["training steps"]} == set(gpu_steps.WORKLOADS)
    assert {r["name"] for r in document["memory"]} == set(gpu_steps.MEMORY)
    assert {r["name"] for r in document["further training steps"]} == set(gpu_steps.FURTHER_WORKLOADS)
    masked = {r["name"].split()[0] for r in operations if "masked" in r["others"]}
    assert masked == {"gather", "spmm", "spmm_t", "sddmm", "score_topk"}
    assert all(r["loop ratio"] > 0 for r in operations)
    sized = [r for r in document["training steps"] + document["memory"] if "counted" in r]
    assert all(("target" in r) == r["form"].startswith("sparse") for r in sized)
    assert all(r["target"] == 1.15 * r["density"] for r in sized if "target" in r)
    table = [r for r in sized if "target" in r and r["name"].startswith("SparseEmbedding")]
    assert len(table) == len(gpu_operands.DENSITIES)
    # The command judges memory by the device's allocator; the count, which is exact, is there on the CPU too.
    assert all(r["counted ratio"] <= r["target"] for r in table)
    page = (tmp_path / "gpu.md").read_text()
    assert all(row["name"] in page for row in rows)
    assert str(tmp_path) not in page
    assert "Not measured" not in page


def test_a_loop_of_calls_takes_the_longer_of_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the dense forms the best in a loop may be another than the best on the device."""
    names = ("ours", "dense", "quick to launch")
    seconds = dict(zip(names, (1.0, 3.0, 4.0), strict=True))
    monkeypatch.setattr(
        gpu_check, "launch_times", lambda *args: dict(zip(names, (5.0, 6.0, 2.0), strict=True))
    )
    monkeypatch.setattr(
        gpu_check, "time_calls", lambda *args, **kw: {n: Timing(s, s, 9) for n, s in seconds.items()}
    )
    ones = torch.ones(3)
    forms = gpu_operands.Forms(lambda i: ones, {name: lambda i: ones for name in names[1:]})
    name = "gather of some rows"
    monkeypatch.setattr(gpu_check, "OPERATIONS", {name: gpu_operands.Operation(lambda *args: forms, {}, {})})
    (row,) = gpu_check.measure(Job("", name, 0.25), "cpu", True)
    assert (row["ratio"], row["loop ratio"], row["dense"]) == (3.0, 0.8, "dense")
    document: dict = {section: [] for section in gpu_page.SECTIONS} | {"operations": [row]}
    document |= {"device": {}, "seconds": 1.0, "quick": False, "tests": None, "warnings": {}}
    text = "\n".join(gpu_page.page(document))
    assert f"* {name}: 3.00 on the device (holds), 0.80 in a loop of eager calls (missed)" in text
    assert f"* {name}: 0.25; in a loop none" in text
    assert "(missed)" not in "\n".join(gpu_page.page(document | {"quick": True}))


def test_torch_sparse_is_a_form_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = OPERATIONS["spmm_t 20000 x 600, B = 64"]
    monkeypatch.setattr(gpu_operands, "has_torch_sparse", lambda: False)
    assert set(operation.build(0.5, "cpu", **operation.quick).others) == {"masked"}
    monkeypatch.setattr(gpu_operands, "has_torch_sparse", lambda: True)
    monkeypatch.setattr(sparsecore.Pattern, "to_torch_sparse", lambda self, values: self.to_dense(values))
    forms = operation.build(0.5, "cpu", **operation.quick)
    with sparsecore.backend("torch"):
        assert forms.error(forms.others["torch-sparse"](1), forms.ours(1)) < 1e-5


def test_what_was_left_out_is_listed() -> None:
    document: dict = {section: [] for section in gpu_page.SECTIONS}
    document |= {"device": {}, "seconds": 1.0, "quick": False, "tests": None, "warnings": {}}
    document["operations"] = [Job("", "failed", 0.5).row(error="RuntimeError: no")]
    document["memory"] = [Job("", "table").row(error=LATE)]
    document["further operations"] = [Job("", "bag", 0.9).row(error=LATE)]
    assert gpu_page.left_out(document) == ["table", "bag @ 0.9"]
    assert "Not measured, 2 in all: table; bag @ 0.9." in gpu_page.page(document)


@pytest.mark.parametrize("name", ["touched", "SparseConv2d"])
def test_a_wrong_gradient_is_seen(name: str) -> None:
    """Of the results that are no plain tensors."""
    torch.manual_seed(0)
    operation = next(o for key, o in FURTHER.items() if key.startswith(name))
    with sparsecore.backend("torch"):
        forms = operation.build(0.5, "cpu", **operation.quick)
        first, *_ = forms.dense.values()
        (head, *rest), expected = forms.ours(0), first(0)
    assert forms.error((head, *rest), expected) < 1e-5
    few = len(head) // 2
    for found in ((head, rest[0] * 1.1, *rest[1:]), (head[:few], rest[0][:few], *rest[1:])):
        assert forms.error(found, expected) > 1e-2


def test_a_wrong_result_is_an_error_and_a_failing_dense_form_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(density: float, device: str, wrong: bool) -> gpu_operands.Forms:
        def fails(i: int) -> torch.Tensor:
            raise RuntimeError("no such kernel")

        right = torch.ones(3)
        return gpu_operands.Forms(
            lambda i: right * (1 + wrong),
            {"dense": lambda i: right, "another": fails},
            {"other": fails, "double": lambda i: right * 2},
        )

    operations = {
        name: gpu_operands.Operation(build, {}, {"wrong": name == "wrong"}) for name in ("wrong", "right")
    }
    monkeypatch.setattr(gpu_check, "OPERATIONS", operations)
    (row,) = gpu_check.measure(Job("", "wrong", 0.5), "cpu", True)
    assert row["error"] == "wrong: relative error 1 against dense"
    assert "ratio" not in row
    (row,) = gpu_check.measure(Job("", "right", 0.5), "cpu", True)
    assert row["dense"] == "dense"
    assert set(row["failed forms"]) == {"another", "other", "double"}
    assert row["failed forms"]["double"] == "wrong: relative error 1"
    assert row["failed forms"]["other"].startswith("RuntimeError: no such kernel at ")


def test_the_torch_backend_is_a_rival_where_it_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(density: float, device: str) -> gpu_operands.Forms:
        return gpu_operands.Forms(
            lambda i: (backend_name(torch.device("cuda")), gpu_operands._csr_only.get()), {}
        )

    operation = gpu_operands.Operation(build, {}, {}, rival=True)
    monkeypatch.setattr(sparsecore.backends, "_environment", None)  # SPARSECORE_BACKEND
    monkeypatch.setattr(sparsecore.backends, "has_triton", lambda: True)
    assert build(0.5, "cuda").ours(0) == ("triton", False)
    assert gpu_check._by_torch(operation, 0.5, "cpu", {}) == {}
    assert gpu_check._by_torch(operation, 0.5, "cuda", {})["torch backend, csr"](0) == ("torch", False)
    with gpu_operands.only_csr():
        assert build(0.5, "cuda").ours(0) == ("triton", True)


def test_precision_is_that_of_the_operation_and_ends_with_it() -> None:
    def now() -> tuple[str, bool, bool]:
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark

    before = now()
    with gpu_check._precision(tf32=True):
        assert now() == ("high", True, True)
    with gpu_check._precision(tf32=False):
        assert now() == (before[0], False, True)
    assert now() == before


def test_nan_and_other_shapes_are_wrong() -> None:
    assert gpu_operands.relative_error(torch.full((2,), torch.nan), torch.ones(2)) == float("inf")
    assert gpu_operands.relative_error(torch.ones(2, 1), torch.ones(2)) == float("inf")
    assert gpu_operands.relative_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])) == 1


def test_a_form_that_fails_keeps_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(torch.nn.Embedding, "__init__", refuse)
    with sparsecore.backend("torch"):
        rows = gpu_steps.measure(Job("", "SparseEmbedding 2,000,000 x 64, Adam"), "cpu", True)
    assert "OutOfMemoryError: tried to allocate 9 GiB" in rows[0]["error"]
    assert [row["form"] for row in rows[1:]] == [f"sparse@{f:g}" for f in gpu_operands.DENSITIES]
    assert all(row["counted"] > 0 for row in rows[1:])


def test_a_process_that_dies_costs_one_row() -> None:
    jobs = [Job("", name) for name in ("good", "bad", "last")]
    found = list(run_jobs(jobs, "cpu", True, time.monotonic() + 60, target=ends))
    assert [job.name for job, _ in found] == ["good", "bad", "last"]
    rows = [reply.rows[0] for _, reply in found]
    assert rows[0]["ms"] == rows[2]["ms"] == 1.0
    assert rows[1]["error"] == "the measuring process ended with exit code 7"
    assert found[2][1].facts == {"device": "none"}


def test_what_is_late_or_hangs_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, deadline = [Job("", name) for name in ("good", "slow", "last")], time.monotonic() + 600
    found = run_jobs(jobs, "cpu", True, deadline, target=sleeps)
    assert "error" not in next(found)[1].rows[0]
    monkeypatch.setattr(gpu_worker, "time", SimpleNamespace(monotonic=lambda: deadline + 1))
    assert [reply.rows[0]["error"] for _, reply in found] == [LATE, LATE]
    monkeypatch.undo()

    found = run_jobs(jobs[:2], "cpu", True, deadline, target=sleeps)
    assert "error" not in next(found)[1].rows[0]
    monkeypatch.setattr(gpu_worker, "_LONGEST", 0.1)
    assert [reply.rows[0]["error"] for _, reply in found] == ["stopped after 0.1 seconds"]


def test_processes_that_never_begin_are_given_up() -> None:
    found = list(run_jobs([Job("", "one"), Job("", "two")], "cpu", True, time.monotonic() + 60, never_begins))
    text = "not measured: the measuring process ended with exit code 3"
    assert [reply.rows[0]["error"] for _, reply in found] == [text, text]


def test_samples_and_warnings() -> None:
    turns: list[int] = []
    times = time_calls({"a": turns.append, "b": lambda i: None}, "cpu", samples=7)
    assert turns == list(range(7))
    assert times["a"].samples == times["b"].samples == 7
    assert time_calls({"a": lambda i: None}, "cpu", samples=7, seconds=0)["a"].samples == 5
    with pytest.warns(UserWarning, match="beta"):
        seen = watch(lambda: warnings.warn("in beta", stacklevel=1), "cpu")
    assert (seen.syncs, seen.places) == (None, [])


def test_outcomes_of_the_tests_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    def run(output: str, code: int) -> dict:
        done = SimpleNamespace(stdout=output, stderr="noise\n", returncode=code)
        monkeypatch.setattr("harness.gpu_check.subprocess.run", lambda *args, **kwargs: done)
        return gpu_check.run_tests(1.0)

    good = run("..\n2 passed, 1 skipped, 900 deselected in 3.10s\n", 0)
    assert good["counts"] == {"passed": 2, "skipped": 1, "deselected": 900}
    assert good["tail"] == ""
    bad = run("F\nE  RuntimeError: no\n1 failed, 1 error in 2.00s\n", 1)
    assert bad["counts"] == {"failed": 1, "error": 1}
    assert "RuntimeError: no" in bad["tail"]
    bare = run(
        "SKIPPED [4] tests/sparsecore/test_triton_drawn.py:1: not collected: needs hypothesis\n"
        "SKIPPED [1] tests/sparsecore/test_pattern.py:1: not collected: needs hypothesis\n"
        "SKIPPED [1] tests/recsys:1: not collected: needs pydantic\n"
        "SKIPPED [2] tests/sparsecore/test_devices.py:44: needs triton\n"
        "70 passed, 8 skipped in 2.00s\n",
        0,
    )
    without = {
        "tests/recsys/test_model_devices.py": "pydantic",
        "tests/sparsecore/test_triton_drawn.py": "hypothesis",
    }
    assert bare["not collected"] == without  # of what was skipped, the files that hold tests marked gpu
    document: dict = {section: [] for section in gpu_page.SECTIONS}
    document |= {"device": {}, "seconds": 1.0, "quick": False, "tests": bare, "warnings": {}}
    assert "tests/recsys/test_model_devices.py (needs pydantic)" in "\n".join(gpu_page.page(document))


def test_slow_tests_run_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(command: list[str], **kwargs: object) -> SimpleNamespace:
        asked.append(command[command.index("-m", 2) + 1])
        return SimpleNamespace(stdout="1 passed in 1.00s\n", stderr="", returncode=0)

    monkeypatch.setattr("harness.gpu_check.subprocess.run", run)
    monkeypatch.setattr("harness.gpu_check.run_jobs", lambda *args: iter(()))
    for more in ([], ["--slow"]):
        gpu_check.main(["--device", "cpu", *more])
    assert asked == ["gpu and not slow", "gpu"]


def test_results_are_kept_where_the_machine_cannot_be_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(gpu_check, "save_results", refuse)
    document = {"quick": True, "seconds": 1.0, "device": {}, "tests": None, "warnings": {"beta": "spmm"}}
    gpu_check._save(tmp_path / "there" / "gpu", document | {section: [] for section in gpu_check.SECTIONS})
    written = json.loads((tmp_path / "there" / "gpu.json").read_text())
    assert "FileNotFoundError: git" in written["machine"]
    assert "beta (first in: spmm)" in (tmp_path / "there" / "gpu.md").read_text()


def test_no_device_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit) as exit_:
        gpu_check.main([])
    assert exit_.value.code == 2
    assert "--device cpu --quick" in capsys.readouterr().err


def test_where_no_tests_are_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        gpu_check.main(["--device", "cpu"])
    assert "run it in a checkout, whose tests it runs, or give --no-tests" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        gpu_check.main(["--output", "/proc/x/y"])
    assert exit_.value.code == 2
    assert "can be made" in capsys.readouterr().err


def test_it_starts_on_a_bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch, numba, scipy and pytest alone; so do the tests' fixtures, and gpu tests are collected or named."""
    monkeypatch.chdir(ROOT)
    absent = ["typer", "click", "rich", "pyarrow", "pydantic", "safetensors", "tomli_w"]
    absent += ["hypothesis", "matplotlib", "psutil"]
    program = f"""
import os
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec  # which pytest asks for it, too, where it rewrites assertions
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.partition(".")[0] in {absent!r} else find(name, *rest)
)
sys.path.insert(0, {str(Path(gpu_check.__file__).parents[1])!r})
import pytest
from harness import gpu_check, gpu_steps
document = dict(quick=True, seconds=1.0, device={{}}, tests=None, warnings={{}})
gpu_check._save(gpu_check.Path("gpu"), document | {{section: [] for section in gpu_check.SECTIONS}})
rows = gpu_steps.measure(gpu_check.Job("", next(iter(gpu_steps.WORKLOADS))), "cpu", True)
assert all("error" not in row for row in rows), rows

class Found:
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        self.files = {{item.path.name for item in items if item.get_closest_marker("gpu")}}

os.chdir({str(ROOT)!r})
tests = ["tests", "-k", "numba_is_refused", "-W", "ignore:Module already"]
options = ["-q", "-rs", "--bare", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
found = Found()
code = pytest.main(options + tests, plugins=[found])
print("collected:", *sorted(found.files))
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Machine: " in (tmp_path / "gpu.md").read_text()
    collected = done.stdout.splitlines()[-1].split()[1:]
    assert set(collected) >= {"test_devices.py", "test_distributed.py", "test_optim.py", "test_triton.py"}
    lacking = gpu_check._not_collected(done.stdout)
    assert set(lacking) >= {"tests/recsys/test_model_devices.py", "tests/sparsecore/test_triton_drawn.py"}
    # What its text says to hold gpu tests is either here or named.
    marked = {Path(file).name for file in gpu_check._with_gpu_tests("tests")}
    assert marked == {*collected, *(Path(file).name for file in lacking)}
