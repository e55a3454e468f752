"""Every option of reading, with any value, on sound and damaged files: by `load` and by `recsys data prepare`.

What comes out is a sound data set, or an error that names the file or the option; a folder is written whole or not at
all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from recsys.cli import app
from recsys.data import Dataset, load
from recsys.data.dataset import check_binary_csr
from recsys.errors import ConfigError, DataError

SUFFIXES = [".csv", ".tsv", ".inter", ".dat", ".data", ".rating", ".txt", ".csv.gz"]
NAMES = ["user", "item", "rating", "timestamp"]
COLUMNS = [
    "user",
    "ITEM",
    "rating",
    "timestamp",
    "who",
    "1",
    "2",
    "3",
    "4",
    "5",
    "0",
    "-1",
    "",
    " user ",
    "é",
    "%s",
]
SEPARATORS = [
    ",",
    ";",
    "\t",
    "|",
    "::",
    " ",
    "||",
    "\x1f",
    "\x1fa",
    "é",
    "a",
    "0",
    ".",
    "1",
    "\\",
    "'",
    "\u2028",
]
BAD_SEPARATORS = ["", '"', "\n", ",\r", "\0", "\udcff"]
FIELDS = [
    "1",
    "2",
    "30",
    "007",
    "a",
    "",
    "4.5",
    "-3",
    "nan",
    "inf",
    "1e400",
    "2024-05-31",
    "é",
    '"q"',
    " 5",
    "\0",
]
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    **{f"{name}_column": st.sampled_from(COLUMNS) for name in NAMES},
    "separator": st.sampled_from(SEPARATORS + BAD_SEPARATORS),
    "header": st.booleans(),
    "ids": st.sampled_from(["auto", "any", "text", "numbers"]),
    "order": st.sampled_from(["time", "file", "size"]),
    "min_rating": st.sampled_from([0.0, 2.0, 4.5, -1.0, 100.0, float("nan"), float("inf"), 1e308]),
    "min_user": st.sampled_from([0, 1, 2, 99]),
    "min_item": st.sampled_from([0, 1, 2, 99]),
    "split": st.sampled_from(["ratio", "heldout", "loo", "temporal", "odd"]),
    "validation": st.sampled_from([0, 0.3, 1, -0.1, 1.5, float("nan")]),
    "test": st.sampled_from([0, 0.3, 1, 2.0]),
    "fold_in": st.sampled_from([0.5, 0, 1, 0.999]),
}


@st.composite
def files(draw: st.DrawFn, suffix: str) -> tuple[bytes, dict[str, Any]]:
    """A file that some of the options fit, and options."""
    lists = suffix == ".txt"  # of items, separated by blanks, without a header: most options do not apply
    separator = draw(st.sampled_from([" ", "\t"] if lists else SEPARATORS))
    width = draw(st.integers(2, 4))
    good = st.tuples(*[st.integers(0, 9).map(str)] * width).map(list)
    odd = st.lists(st.sampled_from(FIELDS), min_size=1, max_size=5)
    rows = draw(st.lists(good, min_size=1, max_size=14))
    rows += draw(st.just([]) | st.lists(odd, max_size=2))
    header = not lists and draw(st.booleans())
    lines = [draw(st.permutations(NAMES[:width]))] if header else []
    end = draw(st.sampled_from(["\n", "\r\n"]))
    text = "".join(separator.join(row) + end for row in [*lines, *rows])
    # Most examples say how the file is written, so that more than its first line is read.
    told = {"separator": separator, "header": header, "ids": "any"}
    told = told if draw(st.integers(0, 3)) and not lists else {}
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=3, unique=True))
    options = told | {name: draw(OPTIONS[name]) for name in names}
    data = text.encode()
    if suffix.endswith(".gz"):
        import gzip

        data = gzip.compress(data)
    return data, options


def check(dataset: Dataset) -> None:
    check_binary_csr(dataset.train, "fuzz")
    assert dataset.train.shape == (len(dataset.user_ids), len(dataset.item_ids))
    for part in (dataset.validation, dataset.test):
        assert not part.inputs.multiply(part.targets).nnz


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60)
@given(data=st.data())
def test_any_options(tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject) -> None:
    content, options = data.draw(files(suffix))
    path = tmp_path_factory.mktemp("f") / f"own{suffix}"
    path.write_bytes(content)
    try:
        dataset = load(str(path), **options)
    except (DataError, ConfigError) as error:
        refused = str(error)
    else:
        check(dataset)
        return
    assert str(path) in refused or any(name in refused for name in options)


def flags(options: dict[str, Any]) -> list[str]:
    given = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if name == "header":
            given.append("--header" if value else "--no-header")
        else:
            given.append(f"--{flag}={value}")
    return given


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=20)
@given(data=st.data())
def test_any_options_of_prepare(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    content, options = data.draw(files(suffix))
    folder = tmp_path_factory.mktemp("f")
    path = folder / f"own{suffix}"
    path.write_bytes(content)
    result = CliRunner().invoke(
        app, ["data", "prepare", str(path), "-o", str(folder / "new"), *flags(options)]
    )
    if result.exit_code:
        assert result.exit_code == 2, (options, result.output, result.exception)
        assert isinstance(result.exception, SystemExit)
        assert [one.name for one in folder.iterdir()] == [path.name]
        return
    written = load("new", folder)
    check(written)
    read = load(str(path), **options)
    assert (read.train != written.train).nnz == 0
    np.testing.assert_array_equal(read.user_ids, written.user_ids)
    np.testing.assert_array_equal(read.item_ids, written.item_ids)
