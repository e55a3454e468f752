"""Preparing, downloading and describing datasets: the folder that is written reads back as the same dataset."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.data import Dataset, load
from recsys.data.download import SOURCES, Source, fetch, unpack
from recsys.data.prepare import prepare
from recsys.data.statistics import gini, statistics
from recsys.errors import DataError, OutputExistsError


def call(*arguments: object):
    return CliRunner().invoke(app, ["data", *map(str, arguments)], env={"COLUMNS": "120"})


def table(folder: Path, ids: str = "") -> Path:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 25, (500, 2)).tolist()
    path = folder / "own.csv"
    path.write_text("user,item,timestamp\n" + "".join(f"{u}{ids},{i},{t}\n" for t, (u, i) in enumerate(rows)))
    return path


def assert_same(first: Dataset, second: Dataset) -> None:
    assert (first.train != second.train).nnz == 0
    for one, other in ((first.validation, second.validation), (first.test, second.test)):
        assert (one.inputs != other.inputs).nnz == (one.targets != other.targets).nnz == 0
        np.testing.assert_array_equal(one.users, other.users)
        np.testing.assert_array_equal(one.user_ids, other.user_ids)
    np.testing.assert_array_equal(first.user_ids, second.user_ids)
    np.testing.assert_array_equal(first.item_ids, second.item_ids)
    np.testing.assert_array_equal(first.order, second.order)
    assert first.notes == second.notes


@pytest.mark.parametrize("ids", ["", "é"])
@pytest.mark.parametrize("split", ["ratio", "heldout", "loo", "temporal"])
def test_what_is_prepared_reads_back_the_same(tmp_path: Path, split: str, ids: str) -> None:
    source = table(tmp_path, ids)
    dataset = prepare(source, tmp_path / "data" / "mine", seed=3, split=split)
    assert_same(dataset, load(str(source), seed=3, split=split))
    assert_same(dataset, load("mine", tmp_path / "data"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("rows", "options"),
    [(3, {"split": "heldout"}), (12, {"validation": 0, "test": 0})],
    ids=["nobody to hold out", "all to train on"],
)
def test_parts_without_users_read_back(rows: int, options: dict, tmp_path: Path) -> None:
    source = tmp_path / "few.csv"
    source.write_text("user,item\n" + "".join(f"{row // 3},{row % 3}\n" for row in range(rows)))
    written = prepare(source, tmp_path / "few", **options)
    read = load("few", tmp_path)
    assert (read.train != written.train).nnz == 0
    assert read.validation.targets.nnz == read.test.targets.nnz == 0
    assert read.user_ids.tolist() == written.user_ids.tolist()


def test_a_prepared_leave_one_out_split_is_what_the_split_asks_for(tmp_path: Path) -> None:
    """So the preset sasrec-ml-100k, which asks for it, takes what `recsys data prepare ml-100k --split loo` wrote."""
    dataset = prepare(table(tmp_path), tmp_path / "mine", split="loo", min_user=3)
    assert_same(dataset, load("mine", tmp_path, split="loo"))
    for other in ({"split": "ratio"}, {"split": "loo", "validation": 0}):
        prepare(table(tmp_path), tmp_path / "mine", overwrite=True, **other)
        with pytest.raises(DataError, match="'loo' needs the order"):
            load("mine", tmp_path, split="loo")


def test_no_validation_stays_none_and_candidates_are_kept(tmp_path: Path) -> None:
    source = table(tmp_path)
    prepare(source, tmp_path / "mine", split="loo", validation=0)
    assert load(str(tmp_path / "mine")).validation.targets.nnz == 0
    np.savez(tmp_path / "mine" / "test_negatives.npz", negatives=np.ones((25, 3), np.int64))
    assert prepare(tmp_path / "mine", tmp_path / "again").test.candidates is not None
    candidates = load(str(tmp_path / "again")).test.candidates
    assert candidates is not None
    assert candidates.shape == (25, 3)


def test_nothing_is_overwritten_unasked_and_only_prepared_data_at_all(tmp_path: Path, monkeypatch) -> None:
    source, output = table(tmp_path), tmp_path / "mine"
    prepare(source, output, seed=0)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        prepare(source, output, seed=1)
    before = load(str(output))
    with pytest.raises(DataError):
        prepare(source, output, overwrite=True, timestamp_column="when")

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, output, seed=1, overwrite=True)
    assert_same(before, load(str(output)))
    prepare(source, output, seed=1, overwrite=True)
    assert (load(str(output)).train != before.train).nnz > 0
    (tmp_path / "other").mkdir()
    with pytest.raises(OutputExistsError, match="no prepared dataset"):
        prepare(source, tmp_path / "other", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "other", "own.csv"]
    with pytest.raises(DataError, match="no such file or folder"):
        prepare(tmp_path / "gone", tmp_path / "new")
    with pytest.raises(DataError, match="expected a folder with train and test"):
        prepare(tmp_path / "other", tmp_path / "new")


# The command line.


def test_prepare_list_and_stats_commands(tmp_path: Path) -> None:
    source, output = tmp_path / "own.txt.csv", tmp_path / "data" / "mine"
    source.write_text(table(tmp_path).read_text().replace(",", "\t").replace("user\titem\ttimestamp\n", ""))
    arguments = [
        "prepare",
        source,
        "-o",
        output,
        "--separator",
        "\\t",
        "--no-header",
        "--timestamp-column",
        "3",
    ]
    result = call(*arguments, "--split", "loo", "--min-user", 3, "--min-item", 3, "--ids", "text")
    assert result.exit_code == 0, result.output
    assert f"--data-dir {tmp_path / 'data'} --dataset mine" in result.output.replace("\n", "")
    about = json.loads((output / "prepared.json").read_text())
    assert about["source"] == "own.txt.csv"
    assert about["options"]["split"] == "loo"
    dataset = load("mine", tmp_path / "data")
    assert dataset.user_ids.dtype.kind == "U"
    assert "mine" in call("list", "--data-dir", tmp_path / "data").output.split()
    assert "ml-100k" in call("list", "--data-dir", tmp_path / "data").output
    assert "gowalla  the split of LightGCN" in call("list", "--data-dir", tmp_path / "data").output
    for place in (["mine", "--data-dir", tmp_path / "data"], [output], [source.with_name("own.csv")]):
        shown = call("stats", *place)
        assert shown.exit_code == 0, shown.output
        assert "gini of popularity" in shown.output
    found = json.loads(call("stats", "mine", "--data-dir", tmp_path / "data", "--json").output)
    assert found == json.loads(json.dumps(statistics(dataset)))
    nowhere = tmp_path / "nowhere"
    first = CliRunner(env={"SPARSECORE_DATA": str(nowhere)}).invoke(app, ["data", "list"])
    assert first.exit_code == 0, first.output
    assert "does not exist" in first.stderr
    assert "ml-100k" in first.stdout
    assert call("list", "--data-dir", nowhere).exit_code == 2
    again = call(*arguments)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    (tmp_path / "file").write_text("")
    for place, why in (("file", "exists already"), ("file/out", "file is not a folder; choose another")):
        refused = call("prepare", source.with_name("own.csv"), "-o", tmp_path / place)
        assert refused.exit_code == 2
        assert why in refused.stderr
    assert call(*arguments, "--overwrite").exit_code == 0
    refused = call("prepare", "gowalla", "-o", tmp_path / "new")
    assert refused.exit_code == 2
    assert "it is the split of LightGCN" in refused.stderr
    assert "nearest" not in refused.stderr
    refused = call("prepare", "ml-1000k", "-o", tmp_path / "new")
    assert refused.exit_code == 2
    assert "nearest is 'ml-100k'" in refused.stderr
    assert not (tmp_path / "new").exists()
    assert call("prepare", source, "-o", tmp_path / "new", "--sha256", "0").exit_code == 2


def test_statistics_by_hand(tmp_path: Path) -> None:
    assert gini(np.array([3, 3, 3])) == 0.0
    assert gini(np.zeros(4)) == 0.0
    counts = np.random.default_rng(0).integers(0, 50, 30)
    differences = np.abs(counts[:, None] - counts[None, :]).mean()
    assert gini(counts) == pytest.approx(differences / (2 * counts.mean()))
    (tmp_path / "own.csv").write_text("user,item\n1,1\n2,1\n2,2\n3,1\n3,2\n3,3\n")
    found = statistics(load(str(tmp_path / "own.csv"), validation=0, test=0))
    assert found["interactions_per_user"] == {"0": 1, "0.25": 1.5, "0.5": 2, "0.75": 2.5, "0.95": 2.9, "1": 3}
    assert found["gini_of_popularity"] == pytest.approx(2 / 9)
    assert found["order_known"] is False


# Downloads, from a server of the test's own.

CONTENT = bytes(range(256)) * 4000


class Handler(BaseHTTPRequestHandler):
    archive = b""

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        content = self.archive if self.path.endswith(".zip") else CONTENT
        self.send_response(200)
        if self.path != "/unannounced":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:300_000] if self.path == "/truncated" else content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["whole", "unannounced"])
def test_fetch(server: str, tmp_path: Path, name: str) -> None:
    sha256, md5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()
    seen: list[tuple[int, int | None]] = []
    path = tmp_path / "file"
    assert (
        fetch(f"{server}/{name}", path, md5, sha256.upper(), on_bytes=lambda *now: seen.append(now)) == sha256
    )
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT) if name == "whole" else None)


@pytest.mark.parametrize(
    ("name", "sums", "message"),
    [
        ("truncated", {}, "cut off after 300000 of 1024000 bytes|cannot be downloaded: IncompleteRead"),
        ("missing", {}, "answered 404"),
        ("whole", {"md5": "0" * 32}, "wrong checksum: expected md5 0000"),
        ("whole", {"sha256": "0" * 64}, "wrong checksum: expected sha256 0000"),
    ],
)
def test_a_bad_transfer_leaves_no_file(
    server: str, tmp_path: Path, name: str, sums: dict[str, str], message: str
) -> None:
    path = tmp_path / "file"
    with pytest.raises(DataError, match=message):
        fetch(f"{server}/{name}", path, **sums)
    assert list(tmp_path.iterdir()) == []
    path.write_text("before")
    with contextlib.suppress(DataError):
        fetch(f"{server}/{name}", path, **sums)
    assert path.read_text() == "before"


def test_offline(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/whole"
    for unreachable in (url, "http://name.invalid/x", "no address"):
        with pytest.raises(
            DataError, match=r"cannot be downloaded: .*recsys data prepare NAME --archive FILE"
        ):
            fetch(unreachable, tmp_path / "file", timeout=5)
    assert list(tmp_path.iterdir()) == []


def archive(member: str, text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(member, text)
        file.writestr("README", "terms")
    return buffer.getvalue()


def test_unpack_refuses_what_is_no_archive(tmp_path: Path) -> None:
    whole = archive("a/u.data", "1\t2\t3\t4\n" * 500)
    path = tmp_path / "a.zip"
    path.write_bytes(whole)
    (tmp_path / "out").mkdir()
    assert unpack(path, "a/u.data", tmp_path / "out").name == "u.data"
    (tmp_path / "out" / "u.data").unlink()
    with pytest.raises(DataError, match="there is no b in it"):
        unpack(path, "b", tmp_path / "out")
    damaged = bytearray(whole)
    damaged[45:50] = b"\xff" * 5
    for content in (whole[:-40], b"", bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.zip: damaged"):
            unpack(path, "a/u.data", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_prepare_downloads_checks_and_says_what_is_unverified(
    server: str, tmp_path: Path, monkeypatch
) -> None:
    rows = [line.split(",") for line in table(tmp_path).read_text().splitlines()[1:]]
    Handler.archive = archive("ml/ratings.dat", "".join(f"{u}::{i}::5::{t}\n" for u, i, t in rows))
    md5, sha256 = (hashlib.new(name, Handler.archive).hexdigest() for name in ("md5", "sha256"))
    url = f"{server}/ml.zip"
    monkeypatch.setitem(SOURCES, "good", Source(url, "ml/ratings.dat", "the terms", md5))
    monkeypatch.setitem(SOURCES, "unknown", Source(url, "ml/ratings.dat", "the terms"))
    monkeypatch.setitem(SOURCES, "changed", Source(url, "ml/ratings.dat", "the terms", "0" * 32))
    result = call("prepare", "good", "-o", tmp_path / "good", "--split", "loo")
    assert result.exit_code == 0, result.output
    assert "the terms" in result.output
    assert "unverified" not in result.stderr
    prepared = load(str(tmp_path / "good"))
    assert (prepared.train != load(str(tmp_path / "own.csv"), split="loo").train).nnz == 0
    assert json.loads((tmp_path / "good" / "prepared.json").read_text())["source"] == f"{url} sha256 {sha256}"
    result = call("prepare", "unknown", "-o", tmp_path / "unknown")
    assert result.exit_code == 0, result.output
    assert f"unverified: its owner publishes no checksum; sha256 {sha256}" in result.stderr
    result = call("prepare", "unknown", "-o", tmp_path / "unknown", "--overwrite", "--sha256", sha256)
    assert "unverified" not in result.stderr
    # What was fetched elsewhere is read, and checked, as what comes by the connection.
    elsewhere = tmp_path / "elsewhere.zip"
    elsewhere.write_bytes(Handler.archive)
    monkeypatch.setitem(
        SOURCES, "offline", Source("http://name.invalid/ml.zip", "ml/ratings.dat", "terms", md5)
    )
    result = call("prepare", "offline", "-o", tmp_path / "offline", "--archive", elsewhere, "--split", "loo")
    assert result.exit_code == 0, result.output
    assert (load(str(tmp_path / "offline")).train != prepared.train).nnz == 0
    for given, message in (
        (elsewhere, "wrong checksum: expected md5"),
        (tmp_path / "no.zip", "cannot be read"),
    ):
        result = call("prepare", "changed", "-o", tmp_path / "new", "--archive", given)
        assert result.exit_code == 2
        assert message in result.stderr
    result = call("prepare", elsewhere, "-o", tmp_path / "new", "--archive", elsewhere)
    assert (result.exit_code, "--archive is of a download" in result.stderr) == (2, True)
    for name, more in (("changed", []), ("unknown", ["--sha256", "0" * 64])):
        result = call("prepare", name, "-o", tmp_path / "new", *more)
        assert result.exit_code == 2
        assert "wrong checksum" in result.stderr
        assert not (tmp_path / "new").exists()


def test_sources_are_sound() -> None:
    for name, source in SOURCES.items():
        assert source.url.startswith("https://files.grouplens.org/"), name
        assert source.md5 is None or len(source.md5) == 32


def test_the_hetrec_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "user_artists.dat"
    path.write_bytes(b"userID\tartistID\tweight\r\n2\t51\t13883\r\n2\t52\t11690\r\n3\t51\t7\r\n")
    dataset = prepare(path, tmp_path / "out", **SOURCES["hetrec-lastfm"].options, min_rating=10, test=0)
    assert (dataset.user_ids.tolist(), dataset.item_ids.tolist()) == ([2], [51, 52])


def test_statistics_read_a_file_as_training_does(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("who,what,when\na,b,1\na,c,2\nb,b,1\nb,d,3\n")
    how = ["--set", "data.options.user_column=who", "--set", "data.options.item_column=what"]
    found = json.loads(call("stats", file, *how, "--json").output)
    assert (found["users"], found["items"], found["interactions"]) == (2, 3, 4)
    refused = call("stats", file)
    assert refused.exit_code == 2
    assert "user_column (--user-column, data.options.user_column)" in refused.stderr
    for wrong in ("data.options.who=1", "train.lr=0.1"):
        refused = call("stats", file, "--set", wrong)
        assert refused.exit_code == 2
        assert wrong.rpartition(".")[2].partition("=")[0] in refused.stderr
