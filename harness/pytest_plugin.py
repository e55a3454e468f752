"""The fixture `compare` for pytest: `harness.compare`, whose tables are shown at the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.comparison import Comparison

_TABLES = pytest.StashKey[list[str]]()


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Callable[..., Comparison]:
    """`harness.compare`: ratios with spread, MACs and bytes of functions, for assertions on counts.

    Assert counts and bytes, which are exact. Times depend on what else the machine does: read them.
    """

    def run(functions: Mapping[str, Callable[[], object]], **options: Any) -> Comparison:
        from harness.comparison import compare as measure

        found = measure(functions, **options)
        request.config.stash.setdefault(_TABLES, []).append(f"{request.node.nodeid}\n{found}")
        return found

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables."""
    tables = config.stash.get(_TABLES, [])
    if tables:
        terminalreporter.section("comparisons")
        for table in tables:
            terminalreporter.write_line(table)
