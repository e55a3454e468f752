"""Exact selection, and how a density is shared out between layers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from devices import AsOnAGpu
from hypothesis import given
from hypothesis import strategies as st

from sparsecore import DensityError, allocate
from sparsecore.topology.select import largest, smallest

few_values = st.lists(st.integers(-3, 3), min_size=1, max_size=60)


@given(few_values, st.data())
def test_smallest_and_largest_break_ties_by_position(numbers: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(numbers)))
    scores = torch.tensor(numbers, dtype=torch.float32)
    for device in (nullcontext(), AsOnAGpu()):
        with device:
            low, high = smallest(scores, k), largest(scores, k)
        order = sorted(range(len(numbers)), key=lambda i: (numbers[i], i))
        assert low.tolist() == sorted(order[:k])
        order = sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))
        assert high.tolist() == sorted(order[:k])


def test_all_equal_takes_the_first() -> None:
    assert smallest(torch.zeros(10), 4).tolist() == [0, 1, 2, 3]
    assert largest(torch.zeros(10), 4).tolist() == [0, 1, 2, 3]


def test_infinities_order_like_numbers() -> None:
    scores = torch.tensor([1.0, float("inf"), float("-inf"), 0.0])
    assert smallest(scores, 1).tolist() == [2]
    assert largest(scores, 2).tolist() == [0, 1]


@pytest.mark.parametrize("k", [-1, 4])
def test_selection_refuses_impossible_counts(k: int) -> None:
    with pytest.raises(ValueError, match=f"cannot select {k} of 3"):
        smallest(torch.zeros(3), k)


# ---------------------------------------------------------------- allocate

SHAPES = [(784, 300), (300, 100), (100, 10)]


def total(shapes: list[tuple[int, ...]], densities: list[float]) -> float:
    return sum(d * torch.Size(s).numel() for s, d in zip(shapes, densities, strict=True))


def test_uniform() -> None:
    assert allocate(SHAPES, 0.1) == [0.1, 0.1, 0.1]


@pytest.mark.parametrize("distribution", ["er", "erk"])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_budget_is_kept_and_no_layer_passes_one(distribution: str, density: float) -> None:
    shares = allocate(SHAPES, density, distribution)
    assert all(0 < d <= 1 for d in shares)
    assert total(SHAPES, shares) == pytest.approx(density * total(SHAPES, [1.0] * 3), rel=1e-12)
    assert shares[0] < shares[1] < shares[2] or shares[2] == 1.0


def test_er_is_proportional_to_fan_sum_over_size() -> None:
    shares = allocate(SHAPES, 0.02, "er")
    ratios = [d * a * b / (a + b) for d, (a, b) in zip(shares, SHAPES, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-12)


def test_a_small_layer_is_stored_whole_and_the_rest_shared_out() -> None:
    shares = allocate(SHAPES, 0.4, "er")
    assert shares[2] == 1.0
    assert shares[0] * 784 * 300 / 1084 == pytest.approx(shares[1] * 300 * 100 / 400, rel=1e-12)


def test_erk_counts_kernel_extents_and_er_does_not() -> None:
    shapes = [(64, 32, 3, 3), (64, 64, 1, 1)]
    er, erk = allocate(shapes, 0.1, "er"), allocate(shapes, 0.1, "erk")
    assert er[0] / er[1] == pytest.approx((96 / 2048) / (128 / 4096))
    assert erk[0] / erk[1] == pytest.approx((102 / 18432) / (130 / 4096))
    for shares in (er, erk):
        assert total(shapes, shares) == pytest.approx(0.1 * total(shapes, [1.0, 1.0]))


def test_er_equals_erk_for_matrices() -> None:
    assert allocate(SHAPES, 0.1, "er") == pytest.approx(allocate(SHAPES, 0.1, "erk"))


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6),
    st.floats(0.05, 1.0),
    st.sampled_from(("uniform", "er", "erk")),
)
def test_budget_property(shapes: list[tuple[int, ...]], density: float, distribution: str) -> None:
    whole = total(shapes, [1.0] * len(shapes))
    if round(density * whole) < 1:
        return
    shares = allocate(shapes, density, distribution)
    assert all(0 < d <= 1 for d in shares)
    assert total(shapes, shares) == pytest.approx(density * whole, rel=1e-9)


def test_density_one_is_dense() -> None:
    assert allocate(SHAPES, 1.0, "er") == [1.0, 1.0, 1.0]


def test_allocate_refuses() -> None:
    with pytest.raises(DensityError, match="'uniform', 'er' or 'erk', got 'zipf'"):
        allocate(SHAPES, 0.1, "zipf")
    with pytest.raises(DensityError, match="density must be a number"):
        allocate(SHAPES, 0.0)
    with pytest.raises(DensityError, match="of weights with 150 positions in all leaves no nonzero"):
        allocate([(10, 10), (5, 10)], 0.001)
    for distribution in ("uniform", "er", "erk"):
        with pytest.raises(DensityError, match=r"of shape \(0, 5\) has nothing to store"):
            allocate([(10, 10), (0, 5)], 0.1, distribution)
