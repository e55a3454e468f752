"""Which machine measured: what a figure depends on besides the commit. Two identities are never compared."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata

import torch

from harness.suite import frozen
from recsys.machine import describe_machine

__all__ = ["Identity", "identify"]

_SETTINGS = ("backend", "huge_pages")


@dataclass(frozen=True)
class Identity:
    """What decides whether two figures compare; see `identify`.

    Attributes:
        backend, huge_pages: of sparsecore and of torch's tables, where the environment says something; else empty.
    """

    processor: str
    microarchitecture: str
    cores: int
    memory_gib: int
    system: str
    isa: str
    blas: str
    torch: str
    numba: str
    numpy: str
    python: str
    threads: int
    simd: str
    gpu: str
    frozen: int
    backend: str = ""
    huge_pages: str = ""

    @property
    def name(self) -> str:
        """Readable, and different for every other identity: the name of the machine in asv's files."""
        # Settings are part of it only where they are set: names from before they were looked at stay.
        facts = {key: value for key, value in asdict(self).items() if value or key not in _SETTINGS}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.microarchitecture}-{self.cores}c-torch{self.torch}-t{self.threads}-{digest}"

    def asv_machine(self) -> dict[str, str]:
        """asv's machine.json, complete."""
        return {
            "machine": self.name,
            "os": self.system,
            "arch": platform.machine(),
            "cpu": f"{self.processor} ({self.microarchitecture}, {self.isa})",
            "num_cpu": str(self.cores),
            "ram": f"{self.memory_gib}GiB",
        }


def identify(threads: int) -> Identity:
    """Of this machine and these versions, for measurements with so many threads."""
    found = describe_machine()
    blas = "mkl" if torch.backends.mkl.is_available() else "other"
    return Identity(
        processor=str(found["processor"]),
        microarchitecture=str(found["microarchitecture"]),
        cores=int(found["cores"]),
        memory_gib=int(found["memory_gib"]),
        system=f"{platform.system()} {platform.release()}",
        isa=str(found["isa"]),
        blas=blas,
        torch=metadata.version("torch").partition("+")[0],
        numba=metadata.version("numba"),
        numpy=metadata.version("numpy"),
        python=".".join(platform.python_version_tuple()[:2]),
        threads=threads,
        simd=os.environ.get("SPARSECORE_SIMD", "auto"),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        frozen=frozen.VERSION,
        backend=os.environ.get("SPARSECORE_BACKEND", ""),
        huge_pages=os.environ.get("THP_MEM_ALLOC_ENABLE", ""),
    )
