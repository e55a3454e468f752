"""The page of quality against density is made of results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import quality

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_results() -> None:
    """Else run `python -m harness.quality results/*.json`: a preset or a result has changed."""
    files = sorted((ROOT / "results").glob("*.json"))
    documents = {file.stem: json.loads(file.read_text()) for file in files}
    tables = {name: found for name, found in documents.items() if "sections" in found and "table" in found}
    assert (ROOT / "docs" / "quality.md").read_text() == quality.page(tables)


def test_a_row_has_a_method_a_line_and_what_differs_from_the_preset(tmp_path: Path) -> None:
    document = json.loads((ROOT / "results" / "neumf-ml-1m.json").read_text())
    section = document["sections"][0]
    section["config"]["train"]["lr"] = 0.25
    section["summary"] = [row for row in section["summary"] if row["cell"] in ("dense", "dsl density=0.5")]
    text = quality.page({"mine": document})
    assert (
        "| [mine](../results/mine.md) | 15 | ndcg@10 among 99 others | 2 | 0.4023 ± 0.0015 | dsl | 0.3506"
        in text
    )
    assert "masked |" not in text
    assert "`train.lr = 0.25`" in text
    section["pretrained"] = {"gmf": {"preset": "neumf-gmf", "set": {}}}
    assert "begins with what `neumf-gmf` has learnt" in quality.page({"mine": document})
    section["preset"] = "neumf-no-more"
    assert "of a preset that is no more" in quality.page({"mine": document})


def test_files_of_others_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.md"
    with pytest.raises(SystemExit):
        quality.main([ROOT / "results" / "memory.json"], output)
    assert "none of the files was written by recsys reproduce" in capsys.readouterr().err
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(SystemExit):
        quality.main([broken], output)
    assert "not JSON" in capsys.readouterr().err
    assert not output.exists()
