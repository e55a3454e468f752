"""All workloads by name."""

from __future__ import annotations

import re

from harness.suite.device import device_workloads
from harness.suite.layers import layers
from harness.suite.models import models
from harness.suite.operations import operations
from harness.suite.others import others, quality
from harness.suite.workload import Workload

__all__ = ["WORKLOADS", "choose"]

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for make in (operations, layers, models, quality, device_workloads, others)
    for workload in make()
}


def choose(only: str | None = None, quick: bool = False) -> list[Workload]:
    """Workloads whose name matches the regular expression anywhere, of those of a quick run or of all.

    Raises:
        re.error: not a regular expression.
    """
    pattern = re.compile(only or "")
    return [w for w in WORKLOADS.values() if pattern.search(w.name) and (w.quick or not quick)]
