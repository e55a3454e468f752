"""The benchmark of the floors on tiny shapes: every form computes the same, the files are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from harness import floors
from harness.operands import Weight


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("part", floors.PARTS)
def test_all_forms_compute_the_same(part: str, batch: int) -> None:
    weight = Weight(20, 33, 0.5)
    for operation, _, forms in floors._forms(part, weight, (batch,)):
        ours = forms.ours()
        assert isinstance(ours, torch.Tensor)
        for name, run in {**forms.dense, **forms.others}.items():
            other = run()
            assert isinstance(other, torch.Tensor)
            if operation == "sddmm":
                other = other.values() if other.layout == torch.sparse_csr else other[weight.dense() != 0]
            elif part == "torch.sparse":
                other = other.t() if other.dim() == 2 else other[None]
            torch.testing.assert_close(ours, other, msg=f"{operation}: {name}")


def test_the_command_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--quick", "--threads", "1", "--output", str(tmp_path / "floors")]
    monkeypatch.setattr("sys.argv", ["floors", *arguments])
    app = typer.Typer()
    app.command()(floors.main)
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "floors.json").read_text())["rows"]
    found = {(r["part"], r["simd"], r["operation"]) for r in rows}
    assert len(found) == len(rows) == 2 * len(floors.PARTS) * len(floors.OPERATIONS)
    assert {r["encoding"] for r in rows if r["simd"] == "portable"} == {"csr"}
    page = (tmp_path / "floors.md").read_text()
    assert all(
        f"Against {part}, {simd} code" in page for part in floors.PARTS for simd in ("native", "portable")
    )
    assert str(tmp_path) not in page
