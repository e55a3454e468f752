"""The house stays in order: imports go one way, and nothing large is committed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_imports_go_one_way() -> None:
    import importlinter.cli

    assert importlinter.cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_no_data_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert not [p.name for p in tracked if p.suffix in (".npz", ".gz", ".pt", ".safetensors", ".pkl")]
    assert not [p.name for p in tracked if p.exists() and p.stat().st_size > 2**20]
