"""Raw ids are found as a dict finds them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import DataError
from recsys.places import Places

WORDS = st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=12
)
NUMBERS = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(WORDS, min_size=1, unique=True), st.lists(WORDS), st.booleans())
def test_texts(ids: list[str], others: list[str], ascending: bool) -> None:
    ids = np.sort(np.array(ids)).tolist() if ascending else ids
    array, known = np.array(ids), {raw: row for row, raw in enumerate(ids)}
    places = Places(array, "user")
    for raw in [*ids, *others, "a" * 50, ""]:
        assert places.find(raw) == known.get(raw)


@given(st.lists(NUMBERS, min_size=1, unique=True), st.lists(NUMBERS), st.booleans())
def test_numbers(ids: list[int], others: list[int], ascending: bool) -> None:
    ids = sorted(ids) if ascending else ids
    places, known = Places(np.array(ids, np.int64), "item"), {raw: row for row, raw in enumerate(ids)}
    for raw in [*ids, *others, 2**63, -(2**63) - 1, 2**70]:
        assert places.find(raw) == places.find(str(raw)) == known.get(raw)
        assert places.find(np.int64(raw) if abs(raw) < 2**62 else raw) == known.get(raw)
    for nothing in ("1_0", "1.0", "", " 1", True, 1.0, None):
        assert places.find(nothing) is None  # type: ignore[arg-type]


def test_ascending_ids_need_no_order() -> None:
    assert Places(np.array(["a", "b", "c"]), "item")._order is None
    assert Places(np.array(["b", "a"]), "item")._order.tolist() == [1, 0]


def test_an_unknown_id_is_told_of() -> None:
    with pytest.raises(DataError, match=r"user 'tony' is unknown .* of 2 users; the nearest is toni; ask"):
        Places(np.array(["anna", "toni"]), "user", "; ask").of("tony")
    with pytest.raises(DataError, match="the nearest is 7"):
        Places(np.array([1, 7]), "user").of(9)
    with pytest.raises(DataError, match="are whole numbers, such as 1"):
        Places(np.array([1, 7]), "user").of("x")
