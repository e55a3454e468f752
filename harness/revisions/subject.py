"""A revision's packages in a folder of their own, so that one interpreter can measure any revision.

Measured are `sparsecore` and `recsys` of the revision; what measures (harness, and with it the frozen kernels) is
always that of the running tree. Compiled kernels survive: the folder of numba's sources is stored under the hash of
its content and of the modules that it imports from (their constants are compiled in), and every subject with the same
shares it, cache included. A new one begins with what the installed package has compiled, if that has the same.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = [
    "PACKAGES",
    "GitError",
    "Subject",
    "ancestry",
    "commit_of",
    "expect_own_suite",
    "extract",
    "git",
    "is_clean",
    "repository",
    "snapshot",
    "sources",
]

PACKAGES = ("sparsecore", "recsys")
_KERNELS = PurePosixPath("sparsecore/backends/numba")


class GitError(Exception):
    """git refuses; the text says what was asked, and what it answered."""


@dataclass(frozen=True)
class Subject:
    """Something to measure.

    Attributes:
        label: how people call it, such as "HEAD~1" or "working tree".
        revision: full hash; with "+" if files differ from it.
        path: what comes first on the path of imports.
        digest: of the sources; equal ones measure equal.
    """

    label: str
    revision: str
    path: Path
    digest: str


def git(root: Path, *arguments: str) -> str:
    """Standard output of git, stripped.

    Raises:
        GitError: git fails, or is not there.
    """
    return _git(root, *arguments).decode().strip()


def _git(root: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    except FileNotFoundError:
        raise GitError("git is not installed, or not on PATH; comparing revisions needs it") from None
    if done.returncode:
        raise GitError(f"git {' '.join(arguments)}: {done.stderr.decode().strip() or done.returncode}")
    return done.stdout


def commit_of(root: Path, revision: str) -> str:
    """Full hash of what a user calls a revision.

    Raises:
        GitError: no commit is called so.
    """
    git(root, "rev-parse", "--git-dir")  # that there is no repository is another error
    try:
        return git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except GitError:
        shallow = git(root, "rev-parse", "--is-shallow-repository") == "true"
        more = (
            "this clone is shallow, git fetch --unshallow (or --deepen=100) gets more"
            if shallow
            else "see git log"
        )
        raise GitError(f"no commit is called {revision!r}; {more}") from None


def ancestry(root: Path, revision: str = "HEAD") -> list[str]:
    """A commit and its ancestors, parents first; nothing where there is no HEAD yet.

    Raises:
        GitError: no other revision is called so.
    """
    try:
        commit = commit_of(root, revision)
    except GitError:
        if revision == "HEAD":
            return []
        raise
    return git(root, "rev-list", "--topo-order", "--reverse", commit).split()


def repository(start: Path | None = None) -> Path:
    """Top folder of the checkout around `start`, the current folder by default.

    Raises:
        GitError: there is none.
    """
    return Path(git(start or Path.cwd(), "rev-parse", "--show-toplevel"))


def is_clean(root: Path, *folders: str) -> bool:
    """Whether what lies in these folders of a checkout is what its commit has there, whatever git is set to tell."""
    return not git(root, "status", "--porcelain", "--untracked-files=all", "--", *folders)


def expect_own_suite(root: Path) -> None:
    """Refuse to measure a checkout with the harness of another one, as where one installation serves several.

    Raises:
        GitError: the modules that run are others than those of the checkout `root`.
    """
    own, there = Path(__file__).resolve().parent.parent, root / "harness"
    if there.is_dir() and sources(own) != sources(there):
        raise GitError(
            f"the harness that runs is that of {own}, which differs from {there}: install this checkout "
            '(pip install -e ".[bench]"), or set PYTHONPATH to it'
        )


def sources(folder: Path) -> dict[str, bytes]:
    """The Python files below a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}


def extract(root: Path, revision: str, store: Path, packages: Sequence[str] = PACKAGES) -> Subject:
    """Those of the packages that a commit of the repository `root` has, unpacked below `store`.

    Raises:
        GitError: no such commit, or it has no package.
    """
    commit = commit_of(root, revision)
    there = set(git(root, "ls-tree", "--name-only", commit).splitlines())
    present = [name for name in packages if name in there]
    if "sparsecore" not in present:
        raise GitError(f"{revision} ({commit[:10]}) has no folder sparsecore: there is nothing to measure")
    archive = _git(root, "archive", "--format=tar", commit, *present)

    def unpack(place: Path) -> None:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            if hasattr(tarfile, "data_filter"):  # not in Python 3.11.0 to 3.11.3; the archive is git's own
                tar.extractall(place, filter="data")
            else:
                tar.extractall(place)

    return _stored(revision, commit, store, unpack)


def snapshot(root: Path, store: Path) -> Subject:
    """The packages as they are in the working tree now, ignored files left out, copied below `store`.

    Raises:
        GitError: `root` is not the top of a checkout with a commit.
    """
    commit = git(root, "rev-parse", "HEAD")
    listed = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES)
    files = [name for name in listed.split("\0") if name and (root / name).is_file()]
    changed = not is_clean(root, *PACKAGES)

    def copy(place: Path) -> None:
        for name in files:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, place / name)

    return _stored("working tree", commit + "+" * changed, store, copy)


def _stored(label: str, revision: str, store: Path, fill: Callable[[Path], None]) -> Subject:
    """The sources that `fill` writes, at the place in the store that their content tells."""
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store, prefix=".new-") as temporary:
        fresh = Path(temporary) / "sources"
        fresh.mkdir()
        fill(fresh)
        digest = _digest(fresh)
        kernels = fresh / _KERNELS
        if kernels.is_dir():
            content = _digest(kernels, _imported(kernels, fresh))
            shared = store / "kernels" / content
            if not shared.exists():
                shared.parent.mkdir(exist_ok=True)
                _begin_with_compiled(kernels, content)
                _move(kernels, shared)
            shutil.rmtree(kernels, ignore_errors=True)
            kernels.symlink_to(os.path.relpath(shared, store / digest / _KERNELS.parent))
        place = store / digest
        if not place.exists():
            _move(fresh, place)
    return Subject(label, revision, place, digest)


def _begin_with_compiled(kernels: Path, content: str) -> None:
    """Copy what is compiled of the installed package's kernels, and those files' times, if they are the same."""
    spec = importlib.util.find_spec(PACKAGES[0])
    if spec is None or spec.origin is None:
        return
    home = Path(spec.origin).parents[1]
    own = home / _KERNELS
    if not own.is_dir() or _digest(own, _imported(own, home)) != content:
        return
    for path in own.glob("*.py"):
        times = path.stat()
        os.utime(kernels / path.name, ns=(times.st_atime_ns, times.st_mtime_ns))
    compiled = kernels / "__pycache__"
    compiled.mkdir(exist_ok=True)
    for path in (own / "__pycache__").glob("*.nb[ci]"):
        shutil.copyfile(path, compiled / path.name)


def _move(source: Path, target: Path) -> None:
    """Rename; where another process was quicker, its folder, which has the same content, stays."""
    try:
        source.rename(target)
    except OSError:
        if not target.exists():
            raise


def _imported(kernels: Path, sources: Path) -> list[Path]:
    """Modules of the package, outside of the folder, that its modules import from."""
    names = set()
    for path in kernels.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    outside = (name for name in sorted(names) if not name.startswith(".".join(_KERNELS.parts)))
    places = (sources.joinpath(*name.split(".")) for name in outside)
    files = (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))
    return [file for file in files if file.is_file()]


def _digest(folder: Path, others: Sequence[Path] = ()) -> str:
    """Hash of names and contents of all files below a folder, but caches, and of the contents of others."""
    found = hashlib.sha256()
    for path in others:
        found.update(path.read_bytes())
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            name = path.relative_to(folder).as_posix()
            found.update(f"{name}\0{path.stat().st_size}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:16]
