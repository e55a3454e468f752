"""How messages name an option of the data: as `load`, `recsys data prepare` and settings spell it."""

from __future__ import annotations

__all__ = ["spelled"]


def spelled(option: str, value: str | None = None) -> str:
    """Such as ``order='file' (--order file, data.options.order=file)``; without a value the names alone."""
    flag = f"--{option.replace('_', '-')}"
    if value is None:
        return f"{option} ({flag}, data.options.{option})"
    return f"{option}={value!r} ({flag} {value}, data.options.{option}={value})"
