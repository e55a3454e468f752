"""Datasets that their owners offer for download: where, under what terms, and files that arrive whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys.errors import DataError
from recsys.files import replacing

__all__ = ["ORIGINS", "SOURCES", "Source", "fetch", "unpack", "verify"]

CHUNK = 1 << 18
TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Source:
    """An archive at its owner's place.

    Attributes:
        url: of a zip file.
        member: the file of interactions in it.
        terms: under what terms it may be used, for people.
        md5: as its owner publishes it; None if none is published.
        options: how the member is read (`recsys.data.options.ReadOptions`).
    """

    url: str
    member: str
    terms: str
    md5: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


_MOVIELENS = (
    "GroupLens: for research; acknowledge and cite (Harper and Konstan, 2015); neither redistribution nor commercial "
    "use without permission"
)
SOURCES = {
    "ml-100k": Source(
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        "ml-100k/u.data",
        _MOVIELENS,
        md5="0e33842e24a9c977be4e0107933c0723",
    ),
    "ml-1m": Source(
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        "ml-1m/ratings.dat",
        _MOVIELENS,
        md5="c4d9eecfca2ab87c1945afe126590906",
    ),
    "hetrec-lastfm": Source(
        "https://files.grouplens.org/datasets/hetrec2011/hetrec2011-lastfm-2k.zip",
        "user_artists.dat",
        "HetRec 2011: non-commercial; cite Cantador, Brusilovsky and Kuflik (2011) and Last.fm",
        options={
            "separator": "\t",
            "header": True,
            "user_column": "userID",
            "item_column": "artistID",
            "rating_column": "weight",
        },
    ),
}

# Published splits that presets name, but whose owners offer no archive: by whom, and the files that `load` reads.
_LIGHTGCN = "the split of LightGCN (gusye1234/LightGCN-PyTorch on GitHub): its train.txt and test.txt"
_MATRICES = "as scipy matrices, users in rows, or as tables of user and item (train.csv, ...), by recsys.data.folders:"
ORIGINS = {
    "amazon-book-kgat": "the split of KGAT (xiangwang1223/knowledge_graph_attention_network): train.txt, test.txt",
    "citeulike-t": "CiteULike (js05212/citeulike-t), users.dat as interactions.npz or interactions.csv",
    "citeulike-t/derrd_loo": f"the split of DE-RRD (SeongKu-Kang/DE-RRD_CIKM20) {_MATRICES} train, valid and test.npz",
    "foursquare": f"the split of CAPRI (CapriRecSys/CAPRI) {_MATRICES} train, valid and test.npz",
    "gowalla": _LIGHTGCN,
    "lastfm": f"the split of gusye1234/LightGCN-PyTorch {_MATRICES} train and test.npz",
    "ml-1m/dsl_multvae": (
        "the split of DSL (shuyao-wang/DSL) as MultVAE's code writes it: train.csv, {validation,test}_{tr,te}.csv with "
        "uid,sid; or as scipy matrices of these names"
    ),
    "ml-1m/ncf_loo": (
        "the split of NCF (hexiangnan/neural_collaborative_filtering): its ml-1m.train.rating, ml-1m.test.rating and "
        "ml-1m.test.negative"
    ),
    "yelp2018": _LIGHTGCN,
}


def fetch(
    url: str,
    path: Path,
    md5: str | None = None,
    sha256: str | None = None,
    timeout: float = TIMEOUT,
    on_bytes: Callable[[int, int | None], object] = lambda done, total: None,
) -> str:
    """Download a file; `path` is there afterwards only if all of it came and its checksums are as given.

    Args:
        url: http or https.
        path: where to; an existing file is replaced.
        md5, sha256: hexadecimal checksums to compare with.
        timeout: seconds to wait for the next byte.
        on_bytes: called with the bytes so far and the length that the server announced, or None.

    Returns:
        The SHA-256 of what came, in hexadecimal.

    Raises:
        DataError: no connection, an error of the server, a transfer that was cut off, or a wrong checksum.
    """
    sums = _sums()
    with replacing(path) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response, temporary.open("wb") as file:
                announced = response.headers.get("Content-Length", "")
                total = int(announced) if announced.isdecimal() else None
                done = 0
                while chunk := response.read(CHUNK):
                    for one in sums.values():
                        one.update(chunk)
                    file.write(chunk)
                    done += len(chunk)
                    on_bytes(done, total)
        except urllib.error.HTTPError as error:
            # An HTTPError is itself the open response.
            error.close()
            raise DataError(f"{url}: the server answered {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise DataError(
                f"{url}: cannot be downloaded: {reason or type(error).__name__}. Without a connection, fetch it "
                "elsewhere and give the file: recsys data prepare NAME --archive FILE --output FOLDER"
            ) from error
        if total is not None and done != total:
            raise DataError(f"{url}: cut off after {done} of {total} bytes; try again")
        _compare(url, sums, md5, sha256)
    return sums["sha256"].hexdigest()


def verify(path: Path, md5: str | None = None, sha256: str | None = None) -> str:
    """Compare the checksums of a file that was fetched elsewhere; returns its SHA-256, in hexadecimal.

    Raises:
        DataError: it cannot be read, or a checksum is another.
    """
    sums = _sums()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                for one in sums.values():
                    one.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    _compare(str(path), sums, md5, sha256)
    return sums["sha256"].hexdigest()


def _sums() -> dict[str, Any]:
    return {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}


def _compare(place: str, sums: dict[str, Any], md5: str | None, sha256: str | None) -> None:
    for name, expected in (("md5", md5), ("sha256", sha256)):
        found = sums[name].hexdigest()
        if expected is not None and found != expected.lower():
            raise DataError(
                f"{place}: wrong checksum: expected {name} {expected}, got {found}; it was damaged or has changed, "
                "and is not used"
            )


def unpack(archive: Path, member: str, folder: Path) -> Path:
    """Unpack one file of a zip archive into `folder`, by its own name only.

    Raises:
        DataError: the archive is damaged or has no such file.
    """
    path = folder / Path(member).name
    try:
        with (
            zipfile.ZipFile(archive) as file,
            file.open(member) as source,
            replacing(path) as temporary,
            temporary.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except KeyError:
        raise DataError(f"{archive}: there is no {member} in it") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{archive}: damaged or not a zip file: {error}") from error
    return path
