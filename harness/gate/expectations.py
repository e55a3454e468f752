"""Counters that a commit is allowed to raise, with the reason: benchmarks/expectations.toml.

    [[allow]]
    workload = "lightgcn-train"      # a pattern of the shell's kind, as are form and metric
    form = "dsl@*"
    metric = "macs_forward"
    up_to = 5.1e6                    # no figure above it is allowed
    reason = "three hops instead of two: better on every data set"

    [[allow]]
    workload = "old-name-train"
    removed = true
    reason = "measured by new-name-train now"

Because of ``up_to`` an entry can stay: what is raised once more, beyond it, fails again.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = ["Allowance", "ExpectationsError", "find_allowance", "read_expectations"]


class ExpectationsError(Exception):
    """The file is not what this module's docstring says; the text names file and entry."""


class Allowance(BaseModel):
    """One entry; see the docstring of the module."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workload: str
    form: str = "*"
    metric: str = "*"
    up_to: float = Field(default=-math.inf, allow_inf_nan=True)
    removed: bool = False
    reason: str = Field(min_length=10)

    @model_validator(mode="after")
    def _says_what(self) -> Allowance:
        if self.removed == (self.up_to > -math.inf):
            raise ValueError("expected either up_to (the highest figure allowed) or removed = true")
        return self


def read_expectations(path: Path) -> list[Allowance]:
    """The entries of a file; none if there is no file.

    Raises:
        ExpectationsError: not TOML, or an entry that is not one.
    """
    if not path.exists():
        return []
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExpectationsError(f"{path}: not TOML: {error}") from error
    if set(document) - {"allow"} or not isinstance(document.get("allow", []), list):
        raise ExpectationsError(f"{path}: expected entries [[allow]] and nothing else")
    found = []
    for number, entry in enumerate(document.get("allow", []), 1):
        try:
            found.append(Allowance.model_validate(entry))
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'entry'}: {e['msg']}" for e in error.errors()
            )
            raise ExpectationsError(f"{path}: entry {number}: {problems}") from None
    return found


def find_allowance(
    allowances: Sequence[Allowance], workload: str, form: str, metric: str, value: float | None
) -> Allowance | None:
    """The first entry that allows a figure to be `value`, or to be gone if that is None."""
    for allowance in allowances:
        pairs = ((workload, allowance.workload), (form, allowance.form), (metric, allowance.metric))
        if all(fnmatchcase(name, pattern) for name, pattern in pairs):
            if value is None and allowance.removed:
                return allowance
            if value is not None and value <= allowance.up_to:
                return allowance
    return None
