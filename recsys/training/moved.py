"""A run somewhere else than where it began: its data in another folder, its model on another device."""

from __future__ import annotations

from pathlib import Path

from recsys.config import Config
from recsys.errors import DataError

__all__ = ["placed"]


def placed(config: Config, data_dir: str | None, device: str | None = None) -> Config:
    """The settings of a run whose data is in another folder now, or that is to go on on another device.

    A file or folder that the settings name by its path is then that of the same name in `data_dir`, also where
    something else lies at the path today.

    Raises:
        DataError: there is no such folder, or it has not what the settings name.
    """
    if data_dir is not None:
        folder, name = Path(data_dir), Path(config.data.name)
        if not folder.is_dir():
            raise DataError(f"--data-dir: {data_dir!r} does not exist or is not a folder")
        config = config.replace(data={"dir": data_dir})
        if name.is_absolute():
            there = folder.resolve() / name.name
            if not there.exists():
                raise DataError(f"--data-dir: {data_dir!r} has no {name.name}, which the run was trained on")
            config = config.replace(data={"name": str(there)})
    return config if device is None else config.replace(train={"device": device})
