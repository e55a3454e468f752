"""The index set: conversions, exact random construction, invariants."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from strategies import NARROW_WIDTHS, WIDE_WIDTHS, masks, patterns, seeds, values_for

from sparsecore import DensityError, Pattern, PatternError
from sparsecore.backends.torch.csr import entries
from sparsecore.sampling import sample_ranks
from sparsecore.sizes import column_dtype, exact_nnz, pointer_dtype

ALL_WIDTHS = NARROW_WIDTHS + WIDE_WIDTHS


def same(a: Pattern, b: Pattern) -> bool:
    return (
        a.shape == b.shape
        and a.crow.dtype == b.crow.dtype
        and a.col.dtype == b.col.dtype
        and torch.equal(a.crow, b.crow)
        and torch.equal(a.col, b.col)
    )


# ---------------------------------------------------------------- conversions


@given(masks(widths=ALL_WIDTHS))
def test_mask_round_trip(mask: torch.Tensor) -> None:
    pattern = Pattern.from_mask(mask)
    pattern.check()
    assert pattern.nnz == int(mask.sum())
    assert torch.equal(pattern.to_mask(), mask)
    assert same(Pattern.from_dense(mask.to(torch.float32) * -3), pattern)


@given(patterns(widths=ALL_WIDTHS))
def test_round_trips_through_torch_and_scipy(pattern: Pattern) -> None:
    values = values_for(pattern)
    dense = pattern.to_dense(values)
    coo, csr, array = pattern.to_coo(values), pattern.to_csr(values), pattern.to_scipy(values)
    for back in (coo.to_dense(), csr.to_dense(), torch.from_numpy(array.toarray())):
        assert torch.equal(back, dense)
    for back in (Pattern.from_torch(coo), Pattern.from_torch(csr), Pattern.from_scipy(array)):
        back.check(values)
        assert same(back, pattern)
    assert same(Pattern.from_coo(pattern.row_indices(), pattern.col, pattern.shape), pattern)
    assert same(
        Pattern.from_csr(pattern.crow.to(torch.int64), pattern.col.to(torch.int64), pattern.shape), pattern
    )
    assert coo.is_coalesced()


@given(patterns(widths=ALL_WIDTHS))
def test_positions_ascend_and_agree_with_rows_and_columns(pattern: Pattern) -> None:
    positions = pattern.positions()
    assert bool((positions[1:] > positions[:-1]).all())
    assert torch.equal(positions // pattern.shape[1], pattern.row_indices())
    assert torch.equal(positions % pattern.shape[1], pattern.col.to(torch.int64))
    assert torch.equal(torch.nonzero(pattern.to_mask().view(-1)).view(-1), positions)


@given(patterns(), seeds)
def test_entries_lists_the_nonzeros_of_chosen_rows(pattern: Pattern, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(pattern.shape[0], (5,), generator=generator)
    which, place = entries(pattern.crow, ids)
    rows = pattern.row_indices()
    expected = [(e, k) for e, r in enumerate(ids.tolist()) for k in range(pattern.nnz) if rows[k] == r]
    assert list(zip(which.tolist(), place.tolist(), strict=True)) == expected


def test_views_share_the_values() -> None:
    pattern = Pattern.from_mask(torch.eye(4))
    values = torch.ones(4)
    pattern.to_csr(values).values().mul_(2)
    assert torch.equal(values, torch.full((4,), 2.0))
    pattern.to_scipy(values).data[:] = 3
    assert torch.equal(values, torch.full((4,), 3.0))


def test_to_dense_is_differentiable() -> None:
    pattern = Pattern.from_mask(torch.tensor([[1, 0, 1], [0, 1, 0]]))
    values = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pattern.to_dense, (values,))


def test_uncoalesced_coo_is_coalesced_on_the_way() -> None:
    indices = torch.tensor([[2, 0, 2, 0], [1, 3, 1, 0]])
    pattern = Pattern.from_torch(
        torch.sparse_coo_tensor(indices, torch.ones(4), (3, 4), check_invariants=True)
    )
    assert pattern.crow.tolist() == [0, 2, 2, 3]
    assert pattern.col.tolist() == [0, 3, 1]


def test_scipy_duplicates_merge_and_explicit_zeros_stay() -> None:
    coo = scipy.sparse.coo_array(([1.0, 2.0, 0.0], ([1, 1, 0], [2, 2, 0])), shape=(2, 3))
    pattern = Pattern.from_scipy(coo)
    assert pattern.crow.tolist() == [0, 1, 2]
    assert pattern.col.tolist() == [0, 2]


def test_from_scipy_does_not_change_or_share_its_source() -> None:
    source = scipy.sparse.csr_array((np.ones(3), np.array([2, 0, 1]), np.array([0, 2, 3])), shape=(2, 3))
    pattern = Pattern.from_scipy(source)
    assert source.indices.tolist() == [2, 0, 1]
    pattern.col.fill_(0)
    assert source.indices.tolist() == [2, 0, 1]
    assert pattern.crow.tolist() == [0, 2, 3]


def test_to_device_keeps_everything() -> None:
    pattern = Pattern.from_mask(torch.eye(3))
    assert same(pattern.to("cpu"), pattern)
    assert pattern.to("meta").col.is_meta


# ---------------------------------------------------------------- index types


@pytest.mark.parametrize(
    ("cols", "kind"),
    [
        (1, torch.uint8), (255, torch.uint8), (256, torch.uint8), (257, torch.int16), (32767, torch.int16),
        (32768, torch.int16), (32769, torch.int32), (2**31, torch.int32), (2**31 + 1, torch.int64),
    ],
)  # fmt: skip
def test_columns_take_the_narrowest_type_that_holds_them(cols: int, kind: torch.dtype) -> None:
    assert column_dtype(cols) == kind
    assert cols - 1 <= torch.iinfo(kind).max
    if cols < 10**6:
        pattern = Pattern.from_coo(torch.tensor([0, 1]), torch.tensor([cols - 1, cols - 1]), (2, cols))
        assert pattern.col.dtype == kind
        assert pattern.positions().tolist() == [cols - 1, 2 * cols - 1]
        assert pattern.nbytes == 3 * 4 + 2 * torch.iinfo(kind).bits // 8


def test_pointers_widen_only_when_they_must() -> None:
    assert pointer_dtype(2**31 - 1) == torch.int32
    assert pointer_dtype(2**31) == torch.int64


# ---------------------------------------------------------------- random patterns


@given(st.integers(1, 40), st.integers(1, 300), st.floats(0.001, 1.0), seeds)
def test_random_has_exactly_the_nonzeros_asked_for(rows: int, cols: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if round(density * rows * cols) < 1:
        with pytest.raises(DensityError, match="leaves no nonzero"):
            Pattern.random((rows, cols), density, generator=generator)
        return
    pattern = Pattern.random((rows, cols), density, generator=generator)
    pattern.check()
    assert pattern.nnz == round(density * rows * cols)
    assert pattern.density == pattern.nnz / (rows * cols)


def test_random_across_several_blocks_of_ranks() -> None:
    """2.1 M positions are sampled in nine blocks; nothing may be lost at their edges."""
    shape = (700, 3001)
    for nnz in (shape[0] * shape[1], shape[0] * shape[1] - 1, 1_000_000):
        pattern = Pattern.random(shape, nnz=nnz, generator=torch.Generator().manual_seed(1))
        pattern.check()
        assert pattern.nnz == nnz


@given(st.integers(2, 9), st.integers(1, 40), st.data())
def test_skipped_row_stays_empty(rows: int, cols: int, data: st.DataObject) -> None:
    skip = data.draw(st.integers(0, rows - 1))
    nnz = data.draw(st.integers(1, rows * cols))
    pattern = Pattern.random((rows, cols), nnz=nnz, skip_row=skip)
    pattern.check()
    assert pattern.nnz == min(nnz, (rows - 1) * cols)
    assert pattern.crow[skip] == pattern.crow[skip + 1]


def test_same_generator_same_pattern() -> None:
    def draw(seed: int) -> Pattern:
        return Pattern.random((30, 40), 0.3, generator=torch.Generator().manual_seed(seed))

    assert same(draw(3), draw(3))
    assert not same(draw(3), draw(4))


@pytest.mark.parametrize("nnz", [2, 12, 30])
@pytest.mark.parametrize("skip", [None, 2])
def test_random_is_uniform(nnz: int, skip: int | None) -> None:
    """Every free position equally often: a chi-square test at one in a million, with a fixed seed."""
    shape, draws = (5, 8), 4000
    generator = torch.Generator().manual_seed(11)
    counts = torch.zeros(40)
    for _ in range(draws):
        counts[Pattern.random(shape, nnz=nnz, skip_row=skip, generator=generator).positions()] += 1
    if skip is not None:
        assert counts.view(shape)[skip].sum() == 0
        counts = torch.cat((counts[: skip * 8], counts[skip * 8 + 8 :]))
    expected = draws * nnz / counts.numel()
    # Without replacement the counts vary less than a multinomial's, by (n - nnz) / (n - 1).
    shrink = (counts.numel() - nnz) / (counts.numel() - 1)
    statistic = float(((counts - expected) ** 2 / expected).sum()) / shrink
    assert chi2.ppf(1e-6, counts.numel() - 1) < statistic < chi2.ppf(1 - 1e-6, counts.numel() - 1)


def test_pairs_of_positions_are_uniform() -> None:
    """Single positions can be uniform while subsets are not: all 28 pairs out of 8, equally often."""
    generator = torch.Generator().manual_seed(5)
    counts = torch.zeros(8, 8)
    for _ in range(5600):
        a, b = torch.cat(list(sample_ranks(8, 2, generator))).tolist()
        counts[a, b] += 1
    seen = counts[torch.ones(8, 8).triu(1) > 0]
    assert int(seen.sum()) == 5600
    assert float(((seen - 200) ** 2 / 200).sum()) < chi2.ppf(1 - 1e-6, 27)


@given(st.integers(1, 3000), st.data())
def test_sample_ranks_are_distinct_ascending_and_in_range(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    ranks = torch.cat([torch.empty(0, dtype=torch.int64), *sample_ranks(total, count)])
    assert ranks.numel() == count
    assert bool((ranks[1:] > ranks[:-1]).all())
    assert count == 0 or (int(ranks[0]) >= 0 and int(ranks[-1]) < total)


@pytest.mark.parametrize("density", [0.02, 0.07, 0.5, 0.97])
def test_sample_ranks_over_several_blocks(density: float) -> None:
    """Block counts are drawn as a uniform subset has them: mean and spread of the first block's share."""
    block, total = 1 << 18, (1 << 19) + 12345
    count = int(density * total)
    shares = []
    for seed in range(12):
        parts = list(sample_ranks(total, count, torch.Generator().manual_seed(seed)))
        ranks = torch.cat(parts)
        assert ranks.numel() == count
        assert bool((ranks[1:] > ranks[:-1]).all())
        assert int(ranks[-1]) < total
        shares.append(int((ranks < block).sum()))
    expected = count * block / total
    deviation = (expected * (1 - block / total) * (1 - density)) ** 0.5
    assert abs(np.mean(shares) - expected) < 6 * deviation / 12**0.5
    assert 0.3 * deviation < np.std(shares) < 2.5 * deviation


@pytest.mark.parametrize(("total", "count"), [(3, 4), (3, -1)])
def test_sample_ranks_refuses_impossible_counts(total: int, count: int) -> None:
    with pytest.raises(ValueError, match="cannot draw"):
        list(sample_ranks(total, count))


# ---------------------------------------------------------------- density errors


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, float("nan"), float("inf"), "0.5", None, True])
def test_density_outside_its_range(density: object) -> None:
    with pytest.raises(DensityError, match=r"density must be a number in \(0, 1\]"):
        exact_nnz((4, 4), density)  # type: ignore[arg-type]


def test_density_so_low_that_nothing_is_stored() -> None:
    with pytest.raises(DensityError, match=r"leaves no nonzero at all; use at least 0\.01"):
        exact_nnz((10, 10), 0.004)
    assert exact_nnz((10, 10), 0.01) == 1


@pytest.mark.parametrize("nnz", [0, 13, -1])
def test_nnz_outside_its_range(nnz: int) -> None:
    with pytest.raises(DensityError, match=r"nnz must be in 1 \.\. 12"):
        Pattern.random((3, 4), nnz=nnz)


def test_density_or_nnz_but_not_both() -> None:
    with pytest.raises(DensityError, match="either density or nnz"):
        Pattern.random((3, 4), 0.5, nnz=3)
    with pytest.raises(DensityError, match="either density or nnz"):
        Pattern.random((3, 4))


def test_a_table_that_is_all_padding() -> None:
    with pytest.raises(DensityError, match=r"nnz must be in 1 \.\. 0"):
        Pattern.random((1, 4), 0.5, skip_row=0)


# ---------------------------------------------------------------- invariants


def broken(crow: object = (0, 2, 3), col: object = (0, 2, 1), shape: tuple[int, ...] = (2, 3)) -> Pattern:
    tensors = [t if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=torch.int32) for t in (crow, col)]
    return Pattern(tensors[0], tensors[1], shape)  # type: ignore[arg-type]


def test_a_sound_pattern_passes() -> None:
    broken().check(torch.ones(3))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (broken(shape=(0, 3)), "shape must be two positive integers"),
        (broken(shape=(2, 3, 1)), "shape must be two positive integers"),
        (broken(crow=torch.tensor([0.0, 2.0, 3.0])), "crow must be a 1-D integer tensor"),
        (broken(col=torch.zeros(3, dtype=torch.bool)), "col must be a 1-D integer tensor"),
        (broken(col=torch.zeros(3, 1, dtype=torch.int32)), "col must be a 1-D integer tensor, got 2-D"),
        (broken(crow=(0, 3)), r"crow must have rows \+ 1 = 3 entries, got 2"),
        (broken(crow=(1, 2, 3)), "crow must run from 0 to nnz = 3, got 1 to 3"),
        (broken(crow=(0, 2, 4)), "crow must run from 0 to nnz = 3, got 0 to 4"),
        (broken(crow=(0, 5, 3)), "crow must never fall, but it does after row 1"),
        (broken(crow=(0, -1, 3)), "crow must never fall, but it does after row 0"),
        (broken(col=(0, 3, 1)), r"column indices must be in 0 \.\. 2, got 3"),
        (broken(col=(-1, 2, 1)), r"column indices must be in 0 \.\. 2, got -1"),
        (broken(col=(2, 0, 1)), "ascending: row 0 has 0 after 2"),
        (broken(col=(2, 2, 1)), "unique: row 0 has 2 after 2"),
        (broken(crow=(0, 0, 3), col=(0, 2, 1)), "ascending: row 1 has 1 after 2"),
    ],
)
def test_every_violation_is_named(pattern: Pattern, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        pattern.check()


@pytest.mark.parametrize("values", [torch.ones(2), torch.ones(3, 1), torch.tensor(1.0)])
def test_values_must_fit(values: torch.Tensor) -> None:
    with pytest.raises(PatternError, match="values must be 1-D with nnz = 3 entries"):
        broken().check(values)


@given(patterns(), st.data())
def test_any_damage_to_sorted_columns_is_found(pattern: Pattern, data: st.DataObject) -> None:
    """Swapping two neighbours inside a row must be noticed wherever it happens."""
    rows = pattern.row_indices()
    inside = torch.nonzero(rows[1:] == rows[:-1]).view(-1).tolist()
    if not inside:
        return
    k = data.draw(st.sampled_from(inside))
    col = pattern.col.clone()
    col[[k, k + 1]] = pattern.col[[k + 1, k]]
    with pytest.raises(PatternError, match=f"row {int(rows[k])} has"):
        Pattern(pattern.crow, col, pattern.shape).check()


@pytest.mark.parametrize(
    ("row", "col", "message"),
    [
        ([1, 0], [0, 0], "sorted by row: row 0 follows row 1"),
        ([0, 0], [1, 0], "ascending: row 0 has 0 after 1"),
        ([0, 0], [1, 1], "unique: row 0 has 1 after 1"),
        ([0, 2], [0, 0], r"row indices must be in 0 \.\. 1, got 2"),
        ([-1, 0], [0, 0], r"row indices must be in 0 \.\. 1, got -1"),
        ([0, 1], [0, 300], r"column indices must be in 0 \.\. 2, got 300"),
        ([0, 1], [0], "1-D and of one length"),
        ([0.0, 1.0], [0, 1], "must hold integers"),
    ],
)
def test_from_coo_refuses(row: list[float], col: list[int], message: str) -> None:
    with pytest.raises(PatternError, match=message):
        Pattern.from_coo(torch.tensor(row), torch.tensor(col), (2, 3))


def test_from_csr_refuses_before_it_narrows() -> None:
    """Column 256 would become 0 as uint8."""
    with pytest.raises(PatternError, match="got 256"):
        Pattern.from_csr(torch.tensor([0, 1]), torch.tensor([256]), (1, 256))


def test_from_torch_refuses_other_layouts() -> None:
    with pytest.raises(PatternError, match=r"expected a sparse matrix, got layout torch\.strided"):
        Pattern.from_torch(torch.eye(2))
    with pytest.raises(PatternError, match="3 sparse and 0 dense dimensions"):
        Pattern.from_torch(torch.ones(2, 2, 2).to_sparse())
    with pytest.raises(PatternError, match="1 sparse and 1 dense dimensions"):
        Pattern.from_torch(torch.eye(2).to_sparse(1))
    with pytest.raises(PatternError, match="3 dimensions"):
        Pattern.from_torch(torch.ones(2, 2, 2).to_sparse_csr())
    with pytest.raises(PatternError, match="dense 2-D mask, got 1-D"):
        Pattern.from_mask(torch.ones(3))


def test_patterns_compare_by_identity() -> None:
    """Comparing tensors would be ambiguous; a pattern can be a dictionary key."""
    a, b = Pattern.from_mask(torch.eye(3)), Pattern.from_mask(torch.eye(3))
    assert a == a
    assert a != b
    assert len({a, b}) == 2
