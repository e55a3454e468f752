"""Fixtures shared by all tests, and ``pytest --outcomes FILE``: what passed where, for docs/where.md (`harness.where`).

``pytest --bare`` skips files that import what is not installed, and says so (`harness.gpu_check`).

Tests say with ``@pytest.mark.feature("..")`` which row of that page they stand for.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.machine import describe_machine

try:
    from hypothesis import settings
except ImportError:  # on a bare machine (harness.gpu_check) only the files that need it are left out
    pass
else:
    # A slow or busy machine is no failure, so there are no deadlines; in CI the same examples run every time.
    settings.register_profile("local", deadline=None, max_examples=30)
    settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread unless a test asks for more: on a busy machine every small parallel region costs milliseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is large enough for numba's vector kernels: tests are small, and would run the small kernels alone."""
    for limit in ("small._MOST_NUMBERS", "small._MOST_WORK", "one_csr._MOST_NONZEROS"):
        monkeypatch.setattr(f"sparsecore.backends.numba.{limit}", -1)
    monkeypatch.setattr("sparsecore.backends.numba.one_csr._LONG_ROW", 1 << 40)
    monkeypatch.setattr("sparsecore.backends.numba.lanes_csr._MOST_EXAMPLES", -1)


@pytest.fixture
def two_threads(vectors: None, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Numba's kernels share every call out to two threads, however small it is: the modules of those that did."""
    if os.environ.get("SPARSECORE_BACKEND", "numba") != "numba":
        pytest.skip("about numba's kernels: another backend was asked for")
    from sparsecore.backends.numba import jit

    shared: set[str] = set()
    call = jit.kernel.__call__

    def noted(kernel: Any, *arguments: Any) -> Any:
        if arguments[-1] == 2:
            shared.add(kernel._compiled.py_func.__module__.rpartition(".")[2])
        return call(kernel, *arguments)

    monkeypatch.setattr(jit.kernel, "__call__", noted)
    monkeypatch.setattr(jit, "_SERIAL_WORK", 0)
    torch.set_num_threads(2)  # put back by `one_thread`
    return shared


@pytest.fixture(params=["small kernels", "vectors"])
def every_size(request: pytest.FixtureRequest) -> None:
    """The test runs with numba's small kernels and with its others."""
    if request.param == "vectors":
        if os.environ.get("SPARSECORE_BACKEND", "numba") != "numba":
            pytest.skip("about numba's kernels: another backend was asked for")
        request.getfixturevalue("vectors")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real datasets; the test is skipped, with the reason, where it is not set."""
    folder = os.environ.get("SPARSECORE_DATA")
    if not folder:
        pytest.skip("SPARSECORE_DATA is not set: no real datasets")
    return Path(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", metavar="FILE", help="write a summary of what passed where (json)")
    parser.addoption("--bare", action="store_true", help="skip files whose imports are not installed")


def pytest_configure(config: pytest.Config) -> None:
    # A job in the background ignores Ctrl-C, and so would the processes that tests interrupt: they inherit it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--bare"):
        config.pluginmanager.register(
            _Bare()
        )  # no hook of this file: those are not asked about other folders
    file = config.getoption("--outcomes")
    if file and not hasattr(config, "workerinput"):  # not in xdist's workers: they report to their controller
        config.pluginmanager.register(_Outcomes(Path(file), list(config.invocation_params.args)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    repeated = [item for item in items if _repeats(item)]
    if repeated:
        config.hook.pytest_deselected(items=repeated)
        items[:] = [item for item in items if not _repeats(item)]
    for item in items:  # properties travel with the reports, from xdist's workers too
        item.user_properties += [("feature", mark.args[0]) for mark in item.iter_markers("feature")]


def _repeats(item: pytest.Item) -> bool:
    """The second run that `every_size` asks for, where another backend than numba's is the test's own choice."""
    chosen = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return chosen.get("every_size") == "vectors" and chosen.get("backend", "numba") != "numba"


class _Bare:
    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """A file, or a folder by its conftest, that imports a package which is not here is skipped."""
        report = yield
        error = report.__dict__["call"].excinfo.value if report.failed else None
        while error is not None and not isinstance(error, ModuleNotFoundError):
            error = getattr(error, "cause", None) or error.__cause__  # the former of a conftest
        if error is not None:
            report.outcome = "skipped"
            report.longrepr = (report.nodeid, 1, f"Skipped: not collected: needs {error.name}")
            del report.__dict__["call"]  # no exception that a debugger should stop at
        return report


class _Outcomes:
    def __init__(self, file: Path, arguments: list[str]) -> None:
        self.file, self.arguments = file, arguments
        self.total: Counter[str] = Counter()
        self.features: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if (
            report.when == "call" or not report.passed
        ):  # a skip or an error may come before the call, or after it
            self.total[report.outcome] += 1
            for name, feature in report.user_properties:
                if name == "feature":
                    self.features.setdefault(str(feature), Counter())[report.outcome] += 1

    def pytest_sessionfinish(self) -> None:
        found = {
            "machine": describe_machine(),
            "arguments": [Path(a).name if Path(a).is_absolute() else a for a in self.arguments],
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "backend": os.environ.get("SPARSECORE_BACKEND", "by device"),
            "simd": os.environ.get("SPARSECORE_SIMD", "auto"),
            "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
            "total": self.total,
            "features": dict(sorted(self.features.items())),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(found, indent=1) + "\n")
