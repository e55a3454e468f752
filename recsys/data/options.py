"""How a file of interactions is to be read, and which of its rows count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recsys.data.ids import IdMode
from recsys.errors import ConfigError

__all__ = ["ReadOptions"]


@dataclass(frozen=True)
class ReadOptions:
    """What a table's columns mean and which rows are kept; None takes what the kind of file usually has.

    Attributes:
        user_column, item_column, rating_column, timestamp_column: name in the header, in any case; without a header
            the place, counted from 1. Without a header they default to 1, 2, 3 and 4, as far as there are columns.
            Ratings are numbers that are not negative (rating_column="none" leaves them unread); timestamps are numbers,
            or dates and times as text, such as 2024-05-31 23:59:00, with an offset throughout or without.
        separator: between two fields; one or more characters.
        header: whether the first line names the columns.
        ids: "auto": the first field says whether a column holds numbers, and then all of it must; "any": numbers if
            every field is one, else text; "text": text.
        order: what a user's history is ordered by: "time" (rows of one time by their place in the file) or "file",
            which leaves timestamps unread.
            None: time if there is a timestamp, else file, unless the items of every user ascend: then the file was
            sorted and tells no order.
        min_rating: rows with a lower rating are left out.
        min_user, min_item: k-core: users and items with fewer interactions are left out, again and again until none
            is left to take.

    Raises:
        ConfigError: a value is out of its range.
    """

    user_column: str | int | None = None
    item_column: str | int | None = None
    rating_column: str | int | None = None
    timestamp_column: str | int | None = None
    separator: str | None = None
    header: bool | None = None
    ids: IdMode | None = None
    order: Literal["time", "file"] | None = None
    min_rating: float | None = None
    min_user: int = 0
    min_item: int = 0

    def __post_init__(self) -> None:
        for what in ("user_column", "item_column", "rating_column", "timestamp_column"):
            column = getattr(self, what)
            if isinstance(column, bool) or not isinstance(column, str | int | None):
                raise ConfigError(
                    f"{what}: expected the name of a column, or its place from 1, got {column!r}"
                )
        if not isinstance(self.separator, str | None):
            raise ConfigError(f"separator: expected text, got {self.separator!r}")
        if not isinstance(self.header, bool | None):
            raise ConfigError(f"header: expected true or false, got {self.header!r}")
        if self.ids not in (None, "auto", "any", "text"):
            raise ConfigError(f"ids: expected 'auto', 'any' or 'text', got {self.ids!r}")
        if self.order not in (None, "time", "file"):
            raise ConfigError(f"order: expected 'time' or 'file', got {self.order!r}")
        if self.separator is not None and (not self.separator or not _writable(self.separator)):
            raise ConfigError(
                f"separator: expected characters other than quote, line end and NUL, got {self.separator!r}"
            )
        for what in ("min_user", "min_item"):
            least = getattr(self, what)
            if isinstance(least, bool) or not isinstance(least, int) or least < 0:
                raise ConfigError(f"{what}: expected a whole number that is not negative, got {least!r}")
        if isinstance(self.min_rating, bool) or not isinstance(self.min_rating, int | float | None):
            raise ConfigError(f"min_rating: expected a number, got {self.min_rating!r}")

    def column(self, field: str) -> str | None:
        """What was asked for as the column of a field, as text."""
        given = getattr(self, f"{field}_column")
        return None if given is None else str(given).strip()


def _writable(separator: str) -> bool:
    """Whether it can stand between fields of UTF-8 text; an argument that is none has halves of characters in it."""
    broken = any("\ud800" <= character <= "\udfff" for character in separator)
    return not broken and not set(separator) & set('"\r\n\0')
