"""Every layout of a folder, damaged: a sound dataset, or an error that names it, a file or an option; nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from recsys.csr import rank_in_rows
from recsys.data import Dataset, available, load
from recsys.data.dataset import check_binary_csr
from recsys.errors import RecsysError

USERS, ITEMS = 6, 8


def parts(seed: int) -> dict[str, sparse.csr_array]:
    """Disjoint train, valid and test of all users."""
    drawn = np.random.default_rng(seed).permuted(np.arange(ITEMS)[None].repeat(USERS, 0), axis=1)
    return {
        "train": sparse.csr_array((drawn < 4).astype(np.float32)),
        "valid": sparse.csr_array((drawn == 4).astype(np.float32)),
        "test": sparse.csr_array((drawn == 5).astype(np.float32)),
    }


def published(folder: Path) -> None:
    for name, matrix in parts(0).items():
        sparse.save_npz(folder / f"{name}.npz", matrix)
    np.savez(
        folder / "ids.npz", user_ids=np.arange(USERS) * 7, item_ids=np.array([f"i{k}" for k in range(ITEMS)])
    )
    np.savez(folder / "order.npz", order=np.tile(np.arange(4), USERS))
    np.savez(
        folder / "test_negatives.npz", negatives=np.zeros((USERS, 3), np.int64), item_ids=np.arange(ITEMS)
    )
    about = {"notes": ["a note"], "options": {"split": "loo"}, "seed": 0}
    (folder / "prepared.json").write_text(json.dumps(about))


def heldout(folder: Path) -> None:
    matrices = parts(1)
    sparse.save_npz(folder / "train.npz", matrices["train"])
    for what in ("validation", "test"):
        sparse.save_npz(folder / f"{what}_tr.npz", matrices["train"])
        sparse.save_npz(folder / f"{what}_te.npz", matrices["test"])
    np.savez(folder / "ids.npz", user_of_uid=np.arange(3 * USERS), item_ids=np.arange(ITEMS))


def table(matrix: sparse.csr_array, header: str, separator: str) -> str:
    rows = zip(*matrix.nonzero(), strict=True)
    return header + "".join(separator.join(map(str, (u, i, 3, 100 * u + i))) + "\n" for u, i in rows)


def given_csv(folder: Path) -> None:
    for name, matrix in parts(2).items():
        (folder / f"{name}.csv").write_text(table(matrix, "user,item,rating,timestamp\n", ","))


def recbole(folder: Path) -> None:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    for name, matrix in parts(3).items():
        (folder / f"set.{name}.inter").write_text(table(matrix, header, "\t"))


def lightgcn(folder: Path) -> None:
    for name in ("train", "test"):
        matrix = parts(4)[name]
        rows = (matrix.indices[matrix.indptr[u] : matrix.indptr[u + 1]] for u in range(USERS))
        (folder / f"{name}.txt").write_text(
            "".join(f"{u} {' '.join(map(str, row))}\n" for u, row in enumerate(rows))
        )


def ncf(folder: Path) -> None:
    matrices = parts(6)
    for name in ("train", "test"):
        (folder / f"set.{name}.rating").write_text(table(matrices[name], "", "\t"))
    pairs = zip(*matrices["test"].nonzero(), strict=True)
    (folder / "set.test.negative").write_text("".join(f"({u},{i})\t0\t7\t3\n" for u, i in pairs))


def heldout_csv(folder: Path) -> None:
    matrices = parts(7)
    for place, name in enumerate(("train", "validation_tr", "validation_te", "test_tr", "test_te")):
        rows = zip(*matrices["test" if name.endswith("te") else "train"].nonzero(), strict=True)
        text = "".join(f"{u + USERS * ((place + 1) // 2)},{i}\n" for u, i in rows)
        (folder / f"{name}.csv").write_text("uid,sid\n" + text)


def interactions(folder: Path) -> None:
    (folder / "interactions.csv").write_text(
        table(sum(parts(5).values()), "user,item,rating,timestamp\n", ",")
    )


LAYOUTS = [published, heldout, given_csv, recbole, lightgcn, ncf, heldout_csv, interactions]
OPTIONS: list[dict[str, Any]] = [
    {},
    {},
    {"validation": 0},
    {"validation": 0.3},
    {"validation": 1},
    {"split": "loo"},
    {"split": "ratio", "test": 0.3},
    {"split": "temporal"},
    {"split": "heldout", "fold_in": 0.5},
    {"min_user": 2},
    {"order": "file"},
    {"ids": "text"},
]


def check(dataset: Dataset) -> None:
    train = dataset.train
    check_binary_csr(train, "fuzz")
    assert (len(dataset.user_ids), len(dataset.item_ids)) == train.shape
    for part in (dataset.validation, dataset.test):
        assert part.inputs.shape == part.targets.shape == (len(part.users), train.shape[1])
        assert not (part.inputs.multiply(part.targets)).nnz
        if part.candidates is not None:
            assert part.candidates.min(initial=0) >= 0
            assert part.candidates.max(initial=0) < train.shape[1]
    if dataset.order is not None:
        np.testing.assert_array_equal(rank_in_rows(train, dataset.order), dataset.order)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@settings(max_examples=40)
@given(data=st.data())
def test_damaged_folders(tmp_path_factory: pytest.TempPathFactory, layout: Any, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("d")
    folder = root / "set"
    folder.mkdir()
    layout(folder)
    changes = st.sampled_from(["delete", "rename", "swap", "cut", "flip", "empty", "folder", "other"])
    for change in data.draw(st.lists(changes, max_size=3)):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if not files:
            break
        path, other = data.draw(st.tuples(st.sampled_from(files), st.sampled_from(files)))
        content = path.read_bytes()
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        if change == "delete":
            path.unlink()
        elif change == "rename":
            name = data.draw(
                st.sampled_from(
                    [
                        "val.npz",
                        "train.csv",
                        "interactions.npz",
                        "x.test.inter",
                        "order.npz",
                        "set.test.negative",
                    ]
                )
            )
            if not (folder / name).is_dir():
                path.rename(folder / name)
        elif change == "swap":
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        elif change == "cut":
            path.write_bytes(content[:place])
        elif change == "flip":
            path.write_bytes(
                content[:place] + data.draw(st.binary(min_size=1, max_size=3)) + content[place + 1 :]
            )
        elif change == "empty":
            path.write_bytes(b"")
        elif change == "folder":
            path.unlink()
            path.mkdir()
        else:  # parts of other sizes, types and orders than the rest
            layout_of = data.draw(st.sampled_from([published, heldout]))
            (root / "spare").mkdir(exist_ok=True)
            layout_of(root / "spare")
            target = folder / data.draw(st.sampled_from(sorted(p.name for p in (root / "spare").iterdir())))
            if not target.is_dir():
                target.write_bytes(_another(data))
    options = data.draw(st.sampled_from(OPTIONS))
    assert set(available(root)) <= {"synthetic", "set", "spare"}
    try:
        dataset = load("set", root, **options)
    except RecsysError as error:
        refused = error
    else:
        check(dataset)
        return
    assert any(word in str(refused) for word in ("set", *options))


def _another(data: st.DataObject) -> bytes:
    """An .npz file with something unexpected in it."""
    import io

    buffer = io.BytesIO()
    kind = data.draw(st.sampled_from(["matrix", "arrays", "strange"]))
    if kind == "matrix":
        shape = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
        values = np.random.default_rng(0).random(shape) < 0.3
        sparse.save_npz(buffer, sparse.coo_array(values.astype(np.float32)))
    elif kind == "arrays":
        size = data.draw(st.sampled_from([0, 1, USERS, ITEMS, 24]))
        numbers = np.arange(size) - data.draw(st.integers(0, 3))
        np.savez(buffer, order=numbers, negatives=numbers[:, None], item_ids=numbers, user_ids=numbers)
    else:
        np.savez(
            buffer,
            order=np.array(["a"]),
            negatives=np.array(3.5),
            item_ids=np.zeros((2, 2)),
            user_ids=np.array(None),
        )
    return buffer.getvalue()
