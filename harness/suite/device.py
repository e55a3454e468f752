"""The same on a GPU: every operation, and training steps of models. Without a CUDA device these workloads are missing.

The forms are those of `harness.gpu_check`, which also checks their results against each other. They are timed from
event to event on the device, each call from caches that hold none of its operands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import sparsecore
from harness.suite import frozen
from harness.suite.workload import Form, Workload

__all__ = ["device_workloads"]

# Names in `harness.gpu_forms` and in `harness.gpu_steps`, which is not imported before a revision is known to have what
# it needs.
_OPERATIONS = {
    "gather 1M x 64, 65536 random rows": "gather-1000000x64-b65536",
    "gather_dot 1M x 64, 65536 pairs": "gather_dot-1000000x64-b65536",
    "scatter_grad 1M x 64, B = 65536": "scatter_grad-1000000x64-b65536",
    **{
        f"{name} 20000 x 600, B = {batch}": f"{name}-20000x600-b{batch}"
        for name in ("spmm", "spmm_t", "sddmm")
        for batch in (64, 512)
    },
    "score_topk 256 users x 100k items x 64": "score_topk-100000x64-b256",
    "explore 6.4M positions": "explore-100000x64",
    "Adam 1M x 64, all values": "adam-1000000x64",
    "propagate 70k nodes, 1.6M edges, d = 64": "propagate-70000x64",
}
_DENSITIES = (0.5, 0.25, 0.1, 0.05)
_STEPS = {
    "MultVAE, 20,000 items (synthetic), batch 500": "multvae-20000-b500",
    "BPR-MF, 1,000,000 x 64, 2048 triples": "bprmf-1000000x64-b2048",
}


def _in_turn(run: Callable[[int], object]) -> Callable[[], object]:
    """Another of the drawn inputs at every call."""
    turn = itertools.count()
    return lambda: run(next(turn))


def _counted(run: Callable[[], object]) -> Callable[[], dict[str, float]]:
    def counts() -> dict[str, float]:
        counter = sparsecore.MacCounter()
        with counter.phase("call"):
            run()
        return {"macs": counter.total}

    return counts


def _operation(name: str, device: str, quick: bool) -> dict[str, Form]:
    from harness.gpu_forms import OPERATIONS

    operation, forms = OPERATIONS[name], dict[str, Form]()
    for density in operation.densities:
        if density not in (None, *_DENSITIES):  # the check has more of them, to find crossovers
            continue
        made = operation.build(density, device, **(operation.quick if quick else operation.size))
        if not forms:
            (_, first), *others = made.dense.items()
            forms["dense"] = _timed(first, counted=density is not None)
            forms |= {f"dense/{other}": Form(_in_turn(run), None) for other, run in others}
        # Not csr@...: which encoding a pattern takes, CSR or a bitmap, depends on the device.
        forms["csr" if density is None else f"sparse@{density:g}"] = _timed(made.ours)
    return forms | {"frozen": Form(frozen.on_device(device))}


def _timed(run: Callable[[int], object], counted: bool = True) -> Form:
    call = _in_turn(run)
    return Form(call, _counted(call)) if counted else Form(call)


def _step(name: str, device: str, quick: bool) -> dict[str, Form]:
    from harness.gpu_steps import WORKLOADS

    workload, forms = WORKLOADS[name], dict[str, Form]()
    for method, density in workload.forms:
        if method == "masked" and density != 0.5:  # of which the check has more: their times are the same
            continue
        training = workload.build(method, density, device, **(workload.quick if quick else workload.size))
        form = method if method.startswith("dense") else f"{method}@{density:g}"
        forms[form.replace("dense lazy", "dense/lazy")] = _training(training)
    return forms | {"frozen": Form(frozen.on_device(device))}


def _training(training: Any) -> Form:
    step = _in_turn(training.step)

    def counts() -> dict[str, float]:
        counter = sparsecore.MacCounter()
        training.optimizer.zero_grad()
        with counter.phase("macs_forward"):
            loss = training.loss(0)
        with counter.phase("macs_backward"):
            loss.backward()
        size = sparsecore.resident_bytes(training.model, training.optimizer, training.explorer)
        return {**counter.macs, "resident_bytes": size.total, "state_bytes": size.optimizer_state}

    return Form(step, counts, _in_turn(training.exploring_step if training.explorer else training.step))


def device_workloads(device: str = "cuda", quick: bool = False) -> list[Workload]:
    """All of them; on another device, and in sizes that only run, for tests."""
    needs = ("sparsecore.MacCounter", "sparsecore.backend", "sparsecore.Pattern", "sparsecore.ops.score_topk")
    models = (*needs, "sparsecore.MaskedSparsity", "recsys.models.multvae.MultVAE", "recsys.models.losses")
    sparse = tuple(f"sparse@{density:g}" for density in _DENSITIES)
    found = [
        Workload(
            f"{device}-{short}",
            "device",
            f"{name}, on {device}",
            ("dense", *(("csr",) if short.startswith("propagate") else sparse)),
            partial(_operation, name, device, quick),
            needs,
            device=device,
        )
        for name, short in _OPERATIONS.items()
    ]
    return found + [
        Workload(
            f"{device}-{short}-train",
            "device",
            f"training step of {name}, on {device}; memory's peak with an exploration",
            ("dense", "masked@0.5", "sparse@0.5", "sparse@0.25", "sparse@0.1"),
            partial(_step, name, device, quick),
            models,
            device=device,
        )
        for name, short in _STEPS.items()
    ]
