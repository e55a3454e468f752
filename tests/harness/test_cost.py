"""The measuring commands on a tiny model: counts are exact, files are complete."""

from __future__ import annotations

from harness import cost
from recsys.config import load_config
from recsys.machine import describe_machine
from recsys.training.session import load_dataset

TINY = [
    "data.name=synthetic", "data.options={users = 60, items = 50, interactions = 900, clusters = 4}",
    "model.name=multvae", "model.hidden=20", "model.latent=6", "train.batch_size=10", "train.epochs=3",
    "sparsity.interval=4",
]  # fmt: skip


def test_compare_steps_counts_exactly() -> None:
    config = load_config(overrides=TINY)
    rows = {row["cell"]: row for row in cost.compare_steps(config, load_dataset(config), [0.5], seconds=0.05)}
    assert list(rows) == ["dense", "masked@0.5", "dsl@0.5"]
    # Batch times the dense products 20 x 12, 6 x 20, 20 x 50, and the bag's looked-up rows (which vary with dropout).
    products = 10 * (20 * 12 + 6 * 20 + 20 * 50)
    assert products < rows["dense"]["macs"]["forward"] < products + 10 * 50 * 20
    assert rows["dense"]["macs"]["exploration"] == 0
    assert rows["masked@0.5"]["macs"]["forward"] > products
    assert products / 2 < rows["dsl@0.5"]["macs"]["forward"] < 0.6 * rows["dense"]["macs"]["forward"]
    assert rows["dsl@0.5"]["macs"]["exploration"] > 0
    assert rows["dsl@0.5"]["bytes"] < rows["dense"]["bytes"] < rows["masked@0.5"]["bytes"]
    assert rows["dense"]["recommendation vs dense"] == 1
    assert all(row["recommendation ms"] > 0 for row in rows.values())


def test_machine_is_described() -> None:
    facts = describe_machine()
    assert {"date", "processor", "cores", "torch", "numba", "isa"} <= set(facts)
