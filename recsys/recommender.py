"""A trained recommender on its own: a folder that needs neither the data nor the settings it was trained
with.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.sparse import csr_array, load_npz, save_npz

from recsys.errors import DataError, OutputExistsError, RecsysError
from recsys.files import new_folder, save_tensors
from recsys.models.base import Recommender
from recsys.models.build import build_model
from recsys.models.devices import find_device
from recsys.models.layers import Density
from recsys.places import Places

__all__ = ["SavedRecommender"]

FORMAT = 1
_TOGETHER = 256  # users at a time
_NEW_USER = (
    "; for somebody new give the items they have chosen (items, --item); one who was held out for validation or test "
    "is known to a model that is trained on everything (recsys train --refit RUN --everything)"
)

# What reading a file that is not what it should be may raise.
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    SafetensorError,
    zipfile.BadZipFile,
    zlib.error,
)


class SavedRecommender:
    """Recommends items by raw ids.

    On disk: recommender.json (which model, with what settings and density), model.safetensors (weights and
        index sets), history.npz (what each user has chosen: excluded from recommendations, input of MultVAE and EASE,
        graph of LightGCN), ids.npz (raw ids of users and items). Nothing in it is pickled.

    Args:
        model: a trained recommender; put into eval mode here.
        settings, density: what `recsys.models.build.build_model` made it from.
        history: (n_users, n_items) interactions.
        user_ids, item_ids: raw ids of rows and columns, int64 or unicode.
        dataset: its name, for people.
    """

    def __init__(
        self,
        model: Recommender,
        *,
        settings: Mapping[str, Any],
        density: float | Density,
        history: csr_array,
        user_ids: NDArray[Any],
        item_ids: NDArray[Any],
        dataset: str = "",
    ) -> None:
        self.model = model.eval()
        self.settings, self.density, self.dataset = dict(settings), Density.of(density), dataset
        self.history, self.user_ids, self.item_ids = history, user_ids, item_ids
        self._users, self._items = Places(user_ids, "user", _NEW_USER), Places(item_ids, "item")

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the folder, all at once.

        Raises:
            OutputExistsError: if it exists and `overwrite` is not set.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise OutputExistsError(
                f"{path} exists already; choose another folder or say that it is to be overwritten"
            )
        description = {
            "format": FORMAT,
            "dataset": self.dataset,
            "model": self.settings,
            "density": self.density.to_dict(),
            "users": len(self.user_ids),
            "items": len(self.item_ids),
        }
        with new_folder(path) as folder:
            (folder / "recommender.json").write_text(
                json.dumps(description, indent=2) + "\n", encoding="utf-8"
            )
            save_tensors(self.model.state_dict(), folder / "model.safetensors")
            save_npz(folder / "history.npz", self.history)
            np.savez_compressed(folder / "ids.npz", users=self.user_ids, items=self.item_ids)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> SavedRecommender:
        """Read a folder that `save` has written, or the folder of a run that has one in it.

        Args:
            path: of the folder.
            device: where to score, "cpu" or such as "cuda".

        Raises:
            RecsysError: if it is not such a folder, a file in it is missing or damaged, or there is no such device.
        """
        place = find_device(device)
        path = Path(path)
        if not (path / "recommender.json").is_file() and (path / "recommender").is_dir():
            path = path / "recommender"
        try:
            description = json.loads((path / "recommender.json").read_text(encoding="utf-8"))
            if description["format"] != FORMAT:
                raise RecsysError(
                    f"{path} has format {description['format']}, this version reads format {FORMAT}"
                )
            # Opened here, because numpy leaves a file that it finds damaged open.
            with (path / "history.npz").open("rb") as file:
                history = csr_array(load_npz(file))
            with (path / "ids.npz").open("rb") as file, np.load(file, allow_pickle=False) as ids:
                user_ids, item_ids = ids["users"], ids["items"]
            density = _density(description["density"])
            weights = load_file(path / "model.safetensors")
            # The order of the histories, where the model reads one, is among the weights: any will do until then.
            model = build_model(description["model"], history, density, order=np.arange(history.nnz))
            model.load_state_dict(weights)
        except FileNotFoundError as error:
            raise RecsysError(
                f"{path} holds no saved recommender: {Path(error.filename or '').name} is missing; "
                "a run writes it when it ends (continue one that was interrupted by recsys train --resume)"
            ) from error
        except RecsysError:
            raise
        except _DAMAGE as error:
            raise RecsysError(f"the saved recommender in {path} is damaged: {error}") from error
        return cls(
            model.to(place),
            settings=description["model"],
            density=density,
            history=history,
            user_ids=user_ids,
            item_ids=item_ids,
            dataset=description["dataset"],
        )

    def knows(self, user_id: int | str) -> bool:
        """Whether this is the raw id of a user of the training data."""
        return self._users.find(user_id) is not None

    def recommend(
        self,
        user_id: int | str | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        items: Sequence[int | str] | None = None,
    ) -> list[tuple[int | str, float]]:
        """The k best items for a user, or for somebody new who has chosen `items` (fold-in: MultVAE, SASRec and
        models that are fitted, not trained).

        Args:
            user_id: raw id of a user of the training data. Text is accepted for numeric ids.
            k: how many; fewer come back if fewer are left.
            exclude_seen: leave out what the user has chosen already: of someone the model was trained with, the
                training part, without what was kept for validation and test (nothing is, see `recsys.data.everything`).
            items: raw ids, in place of `user_id`; for a model of sequences the oldest first.

        Returns:
            (raw item id, score) pairs, best first. Scores of different users are not comparable.

        Raises:
            DataError: unknown id (naming the nearest of a few), or fold-in into a model that has no way to do it.
            RecsysError: k is no whole number from 1 on, or not exactly one of user_id and items given.
        """
        _expect_count(k)
        if (user_id is None) == (items is None):
            raise RecsysError(
                "expected either a user (user_id, --user) or items (items, --item), and not both"
            )
        if items is None:
            assert user_id is not None
            row = self._row(user_id)
            seen = self.history[np.array([row])]
        else:
            if isinstance(items, str) or not isinstance(items, Sequence | np.ndarray):
                raise RecsysError(f"items: expected a list of raw ids, got {items!r:.60}")
            row = -1
            columns = [self._items.of(item) for item in items]
            unique = np.array(list(dict.fromkeys(columns)), dtype=np.int64)  # in the order given
            seen = csr_array(
                (np.ones(len(unique), np.float32), unique, np.array([0, len(unique)])),
                shape=(1, len(self.item_ids)),
            )
        return self._best(np.array([row]), seen, k, exclude_seen)[0]

    def recommend_many(
        self,
        user_ids: Iterable[int | str],
        k: int = 10,
        exclude_seen: bool = True,
        *,
        skip_unknown: bool = False,
    ) -> dict[int | str, list[tuple[int | str, float]]]:
        """What `recommend` gives for each of many users, in their order; they are scored together.

        Args:
            user_ids, k, exclude_seen: as in `recommend`.
            skip_unknown: leave out users whom `recommend` refuses.

        Raises:
            DataError, RecsysError: as `recommend`, but that of an unknown user is not raised with `skip_unknown`.
        """
        _expect_count(k)
        if isinstance(user_ids, str):
            raise RecsysError(f"user_ids: expected a list of raw ids, got {user_ids!r:.60}")
        rows: dict[int | str, int] = {}
        for raw in user_ids:
            row = self._users.find(raw)
            if row is not None and self._has_history(row):
                rows[raw] = row
            elif not skip_unknown:
                self._row(raw)  # which says why
        found: dict[int | str, list[tuple[int | str, float]]] = {}
        raws = list(rows)
        for start in range(0, len(raws), _TOGETHER):
            part = raws[start : start + _TOGETHER]
            place = np.array([rows[raw] for raw in part])
            found |= zip(part, self._best(place, self.history[place], k, exclude_seen), strict=True)
        return found

    def _row(self, user_id: int | str) -> int:
        """The row of somebody to recommend for."""
        row = self._users.of(user_id)
        if not self._has_history(row):
            raise DataError(
                f"user {user_id!r} has no interactions in the training data: nothing to recommend from; "
                "give some items instead (items=, --item), if the model takes them (MultVAE, SASRec, EASE, ItemKNN)"
            )
        return row

    def _has_history(self, row: int) -> bool:
        return bool(self.history.indptr[row] < self.history.indptr[row + 1])

    def _best(
        self, rows: NDArray[np.int64], seen: csr_array, k: int, exclude_seen: bool
    ) -> list[list[tuple[int | str, float]]]:
        left = np.full(len(rows), len(self.item_ids))
        if exclude_seen:
            left -= np.diff(seen.indptr)
        scores, best = self.model.best(rows, seen, int(k), seen if exclude_seen else None)
        return [
            list(zip(items[:many].tolist(), numbers[:many], strict=True))
            for items, numbers, many in zip(
                self.item_ids[best.cpu().numpy()], scores.tolist(), np.minimum(left, k), strict=True
            )
        ]


def _expect_count(k: int) -> None:
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
        raise RecsysError(f"k: expected a whole number of at least 1, got {k!r}")


def _density(stored: float | dict[str, Any]) -> Density:
    """Once one number for all weights, now also which they are."""
    if isinstance(stored, dict):
        return Density(stored["density"], tuple(stored["include"]), tuple(stored["exclude"]))
    return Density(stored)
