"""`recsys settings`: no key without a type, a default and a meaning."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.cli.settings import described
from recsys.config import Config
from recsys.models.build import model_class
from recsys.models.settings import MODEL_SETTINGS


def call(*arguments: str):
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, ["settings", *arguments])


def test_every_key_of_every_table():
    result = call()
    assert result.exit_code == 0, result.output
    for name, field in Config.model_fields.items():
        if name == "model":
            continue
        section = type(field.default)
        assert set(section.model_fields) <= described(section).keys()
        for key in section.model_fields:
            assert f" {name}.{key} " in result.output
    lines = {line.split("│")[1].strip(): line for line in result.output.splitlines() if line.startswith("│")}
    density = [cell.strip() for cell in lines["sparsity.density"].split("│")]
    assert density[2:5] == [
        "float > 0 <= 1",
        "0.25",
        "fraction of the weights that is kept, of those that are sparse.",
    ]
    assert "dense | masked | static | dsl" in lines["sparsity.method"]
    assert described(type(Config().sparsity))["method"].endswith(
        "storage and exploration."
    )  # it goes over lines
    assert " none " in lines["data.dir"]
    assert "list of int > 0" in lines["train.ks"]
    assert "Annotated" not in result.output + call("neumf").output


@pytest.mark.parametrize("name", sorted(MODEL_SETTINGS))
def test_every_key_of_every_model(name):
    result = call(name)
    assert result.exit_code == 0, result.output
    meanings, formulas = described(model_class(name)), result.output.partition("[model]")[0]
    for key in MODEL_SETTINGS[name].model_fields:
        assert f" model.{key} " in result.output
        assert key == "name" or meanings.get(key)
        # What is "see above" stands above.
        assert key == "name" or key in formulas or "see above" not in meanings[key]


def test_a_model_that_is_none():
    result = call("itemnk")
    assert result.exit_code == 2
    assert "did you mean 'itemknn'?" in result.stderr
