"""What an import costs, kernels on disk, and processes: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from strategies import BACKENDS, of_numba

ROOT = Path(__file__).parents[2]

CASE = """
import torch
from sparsecore import Pattern, ops
from sparsecore.backends.numba import embedding, jit

torch.set_num_threads(2)
pattern = Pattern.random((40, 50), 0.5, generator=torch.Generator().manual_seed(0))
values = torch.randn(pattern.nnz, generator=torch.Generator().manual_seed(1))
ids = torch.arange(2000) % 40
arguments = (values, pattern.crow, pattern.col)
lookup = lambda n: ops.gather(*arguments, ids[:n], 50)

def check(n):
    assert torch.equal(lookup(n), pattern.to_dense(values)[ids[:n]])

serial, parallel = lambda: check(200), lambda: check(2000)  # few enough to be serial, too many for the small kernel

def report():
    for name, function in ("kernel", embedding._gather_csr._compiled), ("loop", jit._share):
        stats = function.stats
        print(name, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def python(code: str, *flags: str, **environment: str) -> str:
    """Standard output of a fresh interpreter that runs this code in the repository."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty folder for compiled kernels, shared by the tests of this file so that they compile once."""
    return str(tmp_path_factory.mktemp("kernels"))


@of_numba
def test_import_is_quiet_and_loads_no_compiler() -> None:
    """Neither numba nor scipy is imported, and nothing warns (torch's own import aside)."""
    code = """
import warnings
import torch
warnings.simplefilter("error")
import sys
before = set(sys.modules)
import sparsecore
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"numba", "llvmlite", "scipy", "torch_sparse"}))
model = sparsecore.sparsify(torch.nn.Sequential(torch.nn.Linear(8, 8)), 0.5)
print("numba" in sys.modules, str(sparsecore.explain(model)).count("numba"))
"""
    assert python(code).splitlines() == ["[]", "False 1"]


def test_import_under_strict_warnings() -> None:
    python("import sparsecore", "-W", "error")


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_says_nothing_of_beta_states(backend: str) -> None:
    """Its notes about sparse tensors, some of which come once a process, never reach who trains or converts."""
    code = f"""
import warnings
import torch
import sparsecore
warnings.simplefilter("error")
with sparsecore.backend({backend!r}):
    table = sparsecore.SparseEmbedding(30, 8, density=0.5)
    bag = sparsecore.SparseEmbeddingBag(30, 8, density=0.5)
    rows = sparsecore.SparseEmbedding(30, 8, density=0.5, sparse=True)
    layer = sparsecore.SparseLinear(8, 5, density=0.5)
    model = torch.nn.ModuleList([table, layer])
    optimizer = torch.optim.Adam(model.parameters())
    explorer = sparsecore.DynamicSparsity(model, optimizer, interval=1, total_steps=3)
    ids = torch.arange(12)
    for _ in range(2):
        optimizer.zero_grad()
        layer(table(ids) + bag(ids[:, None]) + rows(ids)).square().sum().backward()
        optimizer.step()
        explorer.step()
    sparsecore.score_topk(torch.randn(3, 8), table, 4)
    sparsecore.gather_dot(table, ids, table, ids).sum().backward()
    values = layer.values.detach()
    for matrix in (layer.weight, layer.pattern.to_coo(values), layer.pattern.to_csr(values)):
        sparsecore.split(matrix)
        matrix @ torch.ones(8, 1)
    sparsecore.Graph.from_sparse(torch.eye(3).to_sparse_csr())(torch.ones(3, 2))
    torch.export.export(layer, (torch.ones(3, 8),))
"""
    python(code)


@of_numba
def test_kernels_are_cached_on_disk_and_variants_do_not_collide(cache: str) -> None:
    """Serial first, then both, then parallel alone: a kernel is compiled exactly once over three processes, and so is
    the loop over chunks."""
    runs = [
        ("serial(); report()", ["kernel 0 1", "loop 0 0"]),
        ("parallel(); serial(); report()", ["kernel 1 0", "loop 0 1"]),
        ("parallel(); report()", ["kernel 1 0", "loop 1 0"]),
    ]
    for code, expected in runs:
        assert python(CASE + code, NUMBA_CACHE_DIR=cache).splitlines() == expected


@of_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_runs_kernels_after_its_parent_did(cache: str) -> None:
    """GNU OpenMP cannot start threads in a child of a process that used them; the child works serially."""
    code = (
        CASE
        + """
import faulthandler, os
parallel()
out = lookup(2000).numpy()
child = os.fork()
if child == 0:
    faulthandler.dump_traceback_later(60, exit=True)  # a child that hangs must not outlive the test
    same = (lookup(2000).numpy() == out).all()  # the kernel alone: torch may hang in a child itself
    os._exit(0 if same and jit.threads(10**9) == 1 else 1)
status = os.waitpid(child, 0)[1]
parallel()
print(status)
"""
    )
    assert python(code, NUMBA_CACHE_DIR=cache).split() == ["0"]


@of_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
def test_workers_of_a_data_loader_run_kernels(cache: str, tmp_path: Path) -> None:
    """Beside a parent that goes on computing; forked workers, as a data set that scores negatives would have."""
    script = tmp_path / "loader.py"
    script.write_text(
        CASE
        + """
from torch.utils.data import DataLoader, Dataset

parallel()
expected = lookup(2000)

class Scores(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        return lookup(2000)

if __name__ == "__main__":
    for scores in DataLoader(Scores(), num_workers=2, multiprocessing_context="fork", timeout=60):
        parallel()
        torch.testing.assert_close(scores[0], expected)
    print("done")
"""
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done"]


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_torch_keeps_its_number_of_threads(cache: str, threads: int) -> None:
    """numba starts its pool at the first parallel kernel, and that sets OpenMP's number, which is torch's."""
    code = CASE + f"torch.set_num_threads({threads}); parallel(); print(torch.get_num_threads())"
    assert python(code, NUMBA_CACHE_DIR=cache).split() == [str(threads)]


@of_numba
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_as_many_threads_run_as_torch_says_however_many_processors_numba_counts(cache: str) -> None:
    code = CASE + (
        "import os\ntorch.set_num_threads(2); lookup(2000); parallel()\n"
        "import numba; print(len(os.listdir('/proc/self/task')), numba.get_num_threads())"
    )
    few, many = (
        python(code, NUMBA_CACHE_DIR=cache, NUMBA_NUM_THREADS=n, NUMBA_THREADING_LAYER="omp").split()
        for n in ("2", "24")
    )
    assert few[0] == many[0]
    assert many[1] == "24"  # numba's setting is the user's


def test_environment_chooses_the_backend() -> None:
    code = """
import sys, torch, sparsecore
sparsecore.SparseLinear(4, 4, density=0.5)(torch.ones(1, 4))
print("numba" in sys.modules)
"""
    assert python(code, SPARSECORE_BACKEND="torch").split() == ["False"]


@of_numba
def test_stale_kernels_are_not_used(cache: str, tmp_path: Path) -> None:
    """numba looks at a kernel's own file; ours looks at the helpers that are inlined too, and at upgrades."""
    import shutil

    copy = tmp_path / "sparsecore"
    shutil.copytree(ROOT / "sparsecore", copy, ignore=shutil.ignore_patterns("__pycache__"))

    def misses() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", CASE + "serial(); report()"], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert misses()[0] == "kernel 0 1"
    assert misses()[0] == "kernel 1 0"
    helper = copy / "backends" / "numba" / "simd.py"
    helper.write_text(helper.read_text() + "# edited\n")
    assert misses()[0] == "kernel 0 1"


@of_numba
def test_portable_code_is_forced_by_a_setting(tmp_path: Path) -> None:
    """Code for processors without AVX-512, its own in the cache, and columns in place of a layer's bitmap."""
    code = (
        CASE
        + """
import platform, sparsecore
serial()
assembly = "".join(embedding._gather_csr._compiled.inspect_asm().values())
print("zmm" in assembly, sparsecore.SparseLinear(50, 40, density=0.5).encoding)
report()
"""
    )
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("forces another x86 processor")
    lines = python(code, NUMBA_CACHE_DIR=str(tmp_path), SPARSECORE_SIMD="portable").splitlines()
    assert lines == ["False csr", "kernel 0 1", "loop 0 0"]
    with pytest.raises(AssertionError, match="SPARSECORE_SIMD must be native or portable, got 'avx'"):
        python(CASE + "serial()", SPARSECORE_SIMD="avx")


@of_numba
def test_kernels_run_where_no_folder_can_keep_them() -> None:
    """As in a container that is read-only and has no home: compiled anew, with a warning."""
    program = (
        "import warnings\n"
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import torch, sparsecore\n"
        "layer, x = sparsecore.SparseLinear(20, 10, density=0.3), torch.randn(3, 20)\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    with sparsecore.backend('numba'):\n"
        "        torch.testing.assert_close(layer(x), layer.to_dense()(x))\n"
        "(warning,) = told\n"
        "assert 'NUMBA_CACHE_DIR' in str(warning.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
