"""The folder of a run: what is in it, when it may be made, and how a run is found again in it."""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from recsys.config import Config, load_config
from recsys.errors import OutputExistsError, RecsysError
from recsys.files import check_place, new_folder, replacing, save_tensors, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunFolder"]


class RunFolder:
    """A run on disk.

    config.toml: all settings. log.jsonl: one line per epoch. checkpoint.pt: everything that `--resume` needs,
    after an epoch: the last complete one, or where to write it takes long, one of the last. best.safetensors: the
    weights of the best epoch by validation. At the end also metrics.json, per_user.npz (what the test metrics are the
    means of) and recommender/, a `recsys.recommender.SavedRecommender`. Every file is replaced in one move, so whatever
    interrupts a run, it goes on from its checkpoint. Where it was asked for, tensorboard/ holds the log once more, as
    curves.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @staticmethod
    def check_free(path: str | Path, overwrite: bool = False) -> None:
        """Raise OutputExistsError unless a run may be written to `path`, or RecsysError if nothing can be.

        With `overwrite`, a run may be overwritten, but never a folder that is not one.
        """
        path = Path(path)
        check_place(path)
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        if not path.is_dir():
            raise OutputExistsError(f"{path} exists and is not a folder; choose another --output")
        if not overwrite:
            raise OutputExistsError(
                f"{path} exists already; choose another --output, continue it with --resume, "
                "or replace it with --overwrite"
            )
        if not (path / "config.toml").is_file():
            raise OutputExistsError(
                f"{path} was not written by recsys (no config.toml in it), so it is not overwritten; "
                "remove it yourself or choose another --output"
            )
        with RunFolder(path).busy():
            pass

    @classmethod
    def create(
        cls, path: str | Path, config: Config, checkpoint: dict[str, Any], overwrite: bool = False
    ) -> RunFolder:
        """Make the folder with its settings and a first checkpoint, all at once.

        The recommender of a run that is overwritten stays until the new one takes its place: somebody may serve it.

        Raises:
            OutputExistsError: see `check_free`.
            RecsysError: if the folder cannot be written.
        """
        path = Path(path)
        cls.check_free(path, overwrite)
        with new_folder(path) as temporary:
            (temporary / "config.toml").write_text(config.to_toml(), encoding="utf-8")
            torch.save(checkpoint, temporary / "checkpoint.pt")
            before = cls(path).recommender
            if before.is_dir():
                shutil.copytree(before, temporary / before.name)
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """A folder that a run has been written to.

        Raises:
            RecsysError: if it is not one.
        """
        if not (Path(path) / "config.toml").is_file():
            raise RecsysError(f"{path} is not the folder of a run: expected a file config.toml in it")
        return cls(path)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Hold the folder while a run is written to it (on systems with ``flock``).

        Raises:
            RecsysError: if another process holds it.
        """
        place = self.path / ".lock"
        with writing(place):
            file = place.open("w")
        with file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RecsysError(
                    f"{self.path} is being written by another process; wait for it to end, or choose another --output"
                ) from error
            try:
                yield
            finally:
                place.unlink(missing_ok=True)

    @property
    def recommender(self) -> Path:
        """Where the saved recommender is."""
        return self.path / "recommender"

    @property
    def tensorboard(self) -> Path:
        """Where TensorBoard's events are, if they are kept."""
        return self.path / "tensorboard"

    def config(self) -> Config:
        return load_config(path=self.path / "config.toml")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        with replacing(self.path / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def load_checkpoint(self) -> dict[str, Any]:
        """The state after the last complete epoch.

        Raises:
            RecsysError: if there is none or it is damaged.
        """
        path = self.path / "checkpoint.pt"
        if not path.is_file():
            raise RecsysError(f"{path} does not exist: there is nothing to resume")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that are no checkpoint may unpickle to anything
            raise _damaged(path, error, "start the run anew with --overwrite") from error
        if not isinstance(state, dict) or "epoch" not in state:
            raise _damaged(path, "no state of a run in it", "start the run anew with --overwrite")
        return state

    def save_best(self, weights: dict[str, Tensor]) -> None:
        with replacing(self.path / "best.safetensors") as temporary:
            save_tensors(weights, temporary)

    def load_best(self) -> dict[str, Tensor]:
        """Weights of the best epoch so far.

        Raises:
            RecsysError: if there are none yet or they are damaged.
        """
        path = self.path / "best.safetensors"
        if not path.is_file():
            raise RecsysError(f"{path} does not exist: no epoch of this run has been evaluated yet")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error

    def append_log(self, record: dict[str, Any]) -> None:
        path = self.path / "log.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def log(self) -> list[dict[str, Any]]:
        """The records of the epochs so far; a last line that was cut off by an interruption is left out.

        Raises:
            RecsysError: if another line is damaged.
        """
        path = self.path / "log.jsonl"
        if not path.is_file():
            return []
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        lines = enumerate(whole.splitlines(), 1)
        return [_record(path, line, "epoch", f"remove line {number}") for number, line in lines]

    def truncate_log(self, epoch: int) -> None:
        """Forget epochs after `epoch`: a resumed run makes them again."""
        kept = [record for record in self.log() if record["epoch"] <= epoch]
        with replacing(self.path / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def save_per_user(self, user_ids: NDArray[Any], values: Mapping[str, NDArray[np.float64]]) -> None:
        """Test metrics of every evaluated user, (m,) each, with the raw ids of these users."""
        with replacing(self.path / "per_user.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, user_ids=user_ids, **values)

    def per_user(self) -> tuple[NDArray[Any], dict[str, NDArray[np.float64]]]:
        """What `save_per_user` was given.

        Raises:
            RecsysError: if there is none, or it is damaged.
        """
        path = self.path / "per_user.npz"
        if not path.is_file():
            raise RecsysError(f"{path} does not exist: the run has not ended, or an older version made it")
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                values = {name: archive[name] for name in archive.files}
            return values.pop("user_ids"), values
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise _damaged(path, error) from error

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        with replacing(self.path / "metrics.json") as temporary:
            temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")

    def metrics(self) -> dict[str, Any] | None:
        """What the run came to, or None if it has not ended.

        Raises:
            RecsysError: if the file is damaged.
        """
        path = self.path / "metrics.json"
        if not path.is_file():
            return None
        return _record(path, path.read_bytes(), "test", "delete it and continue with recsys train --resume")


def _record(path: Path, text: bytes, key: str, advice: str) -> dict[str, Any]:
    """A JSON object that has a key, at least."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise _damaged(path, error, advice) from error
    if not isinstance(record, dict) or key not in record:
        raise _damaged(path, f"expected an object with {key!r}, got {record!r:.40}", advice)
    return record


def _damaged(path: Path, why: object, advice: str = "train again with --overwrite") -> RecsysError:
    return RecsysError(f"{path} is damaged ({why}); {advice}")
