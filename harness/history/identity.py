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


@dataclass(frozen=True)
class Identity:
    """What decides whether two figures compare; see `identify`."""

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

    @property
    def name(self) -> str:
        """Readable, and different for every other identity: the name of the machine in asv's files."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
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
    )
