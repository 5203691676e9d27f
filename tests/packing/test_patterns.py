"""N:M masks as numbers, against combinations from itertools, closed forms and Python's own big integers."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.packing import patterns as patterns_module
from keras_usm_lite.packing.patterns import (
    enumerative_bits,
    gather_kept,
    indices_to_mask,
    mask_to_indices,
    pack_patterns,
    pattern_table,
    patterns_size,
    scatter_kept,
    unpack_patterns,
    word_layout,
)

ALL = [(n, m) for m in range(2, 17) for n in range(1, m)]
USUAL = [(1, 4), (2, 4), (4, 8), (1, 8), (2, 8), (1, 16), (8, 16), (3, 5)]


def random_mask(n, m, groups, columns, seed=0):
    """A mask made by shuffling each group, without the code under test."""
    group = np.zeros((groups, m, columns), "uint8")
    group[:, :n] = 1
    return np.random.default_rng(seed).permuted(group, axis=1).reshape(groups * m, columns)


@st.composite
def masks(draw):
    n, m = draw(st.sampled_from(ALL))
    groups, columns = draw(st.integers(0, 5)), draw(st.integers(0, 7))
    return n, m, random_mask(n, m, groups, columns, draw(st.integers(0, 2**32)))


def slow_unpack(packed, rows, columns, n, m):
    """The mask from the documented layout with big integers, greedy unranking and one group at a time."""
    groups_per_word, bits = word_layout(n, m)
    stream = int.from_bytes(packed.tobytes(), "little")
    mask = np.zeros((rows, columns), bool)
    for column, group in itertools.product(range(columns), range(rows // m)):
        word, digit = divmod(column * rows // m + group, groups_per_word)
        rank = (stream >> word * bits) % 2**bits // math.comb(m, n) ** digit % math.comb(m, n)
        for k in range(n, 0, -1):
            position = max(p for p in range(m) if math.comb(p, k) <= rank)
            rank -= math.comb(position, k)
            mask[group * m + position, column] = True
    return mask


@pytest.mark.parametrize(("n", "m"), ALL)
def test_the_table_is_all_combinations_in_colexicographic_order(n, m):
    table = pattern_table(n, m)
    found = [tuple(np.flatnonzero(pattern)) for pattern in table[:: max(1, len(table) // 500)]]
    expected = sorted(itertools.combinations(range(m), n), key=lambda positions: positions[::-1])
    assert found == expected[:: max(1, len(table) // 500)]
    assert table.shape == (math.comb(m, n), m)
    assert len(np.unique(np.packbits(table, axis=1), axis=0)) == len(table)


@pytest.mark.parametrize(("n", "m"), ALL)
def test_the_index_is_the_sum_of_binomials(n, m):
    positions = np.nonzero(pattern_table(n, m))[1].reshape(-1, n)
    binomial = np.array([[math.comb(p, k + 1) for p in range(m)] for k in range(n)])
    ranks = sum(binomial[k, positions[:, k]] for k in range(n))
    np.testing.assert_array_equal(ranks, np.arange(math.comb(m, n)))


@pytest.mark.parametrize(("n", "m"), ALL)
def test_every_pattern_goes_to_its_index_and_back(n, m):
    table = pattern_table(n, m)
    indices = mask_to_indices(table.T, n, m)
    np.testing.assert_array_equal(indices, [np.arange(len(table))])
    np.testing.assert_array_equal(indices_to_mask(indices, n, m), table.T)


def test_the_table_cannot_be_changed_by_accident():
    with pytest.raises(ValueError, match="read-only"):
        pattern_table(2, 4)[0, 0] = False


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        ((1, 4), (1, 2)),
        ((2, 4), (5, 13)),
        ((4, 8), (5, 31)),
        ((1, 8), (1, 3)),
        ((2, 8), (6, 29)),
        ((1, 16), (1, 4)),
        ((8, 16), (1, 14)),
    ],
)
def test_the_word_layouts_of_the_usual_patterns(pattern, layout):
    assert word_layout(*pattern) == layout


@pytest.mark.parametrize(("n", "m"), ALL)
def test_a_word_holds_its_digits_and_no_other_length_is_denser(n, m):
    groups, bits = word_layout(n, m)
    patterns = math.comb(m, n)
    assert patterns**groups <= 2**bits <= 2**31
    for k in range(1, 32):
        smallest = next(b for b in range(1, 500) if patterns**k <= 2**b)
        assert smallest > 31 or smallest * groups > bits * k or (smallest * groups == bits * k and k >= groups)
    assert 0 <= bits / groups / m - enumerative_bits(n, m) < 0.032


@settings(max_examples=150, deadline=None)
@given(masks())
def test_packed_masks_come_back_and_follow_the_documented_layout(case):
    n, m, mask = case
    packed = pack_patterns(mask, n, m)
    assert packed.dtype == np.uint8
    assert packed.size == patterns_size(*mask.shape, n, m)
    np.testing.assert_array_equal(unpack_patterns(packed, *mask.shape, n, m), mask)
    np.testing.assert_array_equal(slow_unpack(packed, *mask.shape, n, m), mask)


@settings(max_examples=150, deadline=None)
@given(masks(), st.sampled_from(["int8", "float32", "float64", "bool"]))
def test_kept_values_are_those_under_the_mask_column_by_column(case, dtype):
    n, m, mask = case
    values = np.random.default_rng(0).normal(size=mask.shape).astype(dtype)
    kept = gather_kept(values, mask, n, m)
    assert kept.dtype == values.dtype
    assert kept.shape == (mask.shape[0] // m * n, mask.shape[1])
    np.testing.assert_array_equal(kept.T.ravel(), values.T[mask.T.astype(bool)])
    np.testing.assert_array_equal(scatter_kept(kept, mask, n, m), np.where(mask, values, np.zeros_like(values)))


@pytest.mark.parametrize(("n", "m"), USUAL)
def test_a_kernel_of_many_stripes_survives_the_whole_way(n, m, monkeypatch):
    monkeypatch.setattr(patterns_module, "_CHUNK", 1)
    mask = random_mask(n, m, 45, 33)
    codes = np.random.default_rng(1).integers(-7, 8, mask.shape).astype("int8") * mask.astype("int8")
    restored = unpack_patterns(pack_patterns(mask, n, m), *mask.shape, n, m)
    np.testing.assert_array_equal(restored, mask)
    np.testing.assert_array_equal(scatter_kept(gather_kept(codes, mask, n, m), restored, n, m), codes)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float32"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_type_and_the_memory_order_of_a_mask_do_not_matter(dtype, order):
    mask = random_mask(2, 4, 20, 9)
    expected = pack_patterns(mask, 2, 4)
    np.testing.assert_array_equal(pack_patterns(np.asarray(mask, dtype, order=order), 2, 4), expected)


def test_not_zero_means_kept():
    assert mask_to_indices(np.array([[0.0], [-3.0], [0.0], [0.5]]), 2, 4).tolist() == [[4]]


def test_groups_that_do_not_keep_exactly_n_are_counted_and_the_first_is_named():
    mask = random_mask(2, 4, 3, 2)
    mask[4:8, 1] = [1, 1, 1, 0]
    mask[8:12, 0] = 0
    message = "2 of 6 groups do not keep exactly 2 of 4; the first, rows 4 to 7 of column 1, keeps 3"
    for refuse in (
        lambda: pack_patterns(mask, 2, 4),
        lambda: mask_to_indices(mask, 2, 4),
        lambda: gather_kept(mask, mask, 2, 4),
        lambda: scatter_kept(mask[:6], mask, 2, 4),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()


@pytest.mark.parametrize(
    "refuse",
    [
        lambda: mask_to_indices(np.ones((6, 2)), 2, 4),
        lambda: patterns_size(6, 2, 2, 4),
        lambda: unpack_patterns(np.zeros(2, "uint8"), 6, 2, 2, 4),
    ],
)
def test_rows_that_do_not_divide_are_refused(refuse):
    with pytest.raises(ValueError, match="need a multiple of 4 rows, got 6 rows"):
        refuse()


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (1, 17)])
def test_patterns_that_are_not_supported_are_refused(n, m):
    with pytest.raises(ValueError, match=f"1 <= n < m <= 16, got n={n}, m={m}"):
        pattern_table(n, m)


def test_a_mask_that_is_not_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"\[rows, columns\], got \(4,\)"):
        mask_to_indices(np.array([1, 1, 0, 0]), 2, 4)


@pytest.mark.parametrize("indices", [[[6]], [[0, -1]]])
def test_indices_beyond_the_table_are_refused(indices):
    with pytest.raises(ValueError, match=r"2:4 has the patterns 0\.\.5, got indices"):
        indices_to_mask(np.array(indices), 2, 4)


@pytest.mark.parametrize("indices", [[[1.0]], [1]])
def test_indices_that_are_not_an_integer_matrix_are_refused(indices):
    with pytest.raises(ValueError, match="indices must be a 2-D integer array"):
        indices_to_mask(np.array(indices), 2, 4)


def test_a_word_beyond_the_last_combination_is_refused():
    word = np.array([6**5 % 256, 6**5 // 256], "uint8")
    with pytest.raises(ValueError, match="word 0 is 7776, but 5 patterns of 2:4 give words below 7776"):
        unpack_patterns(word, 20, 1, 2, 4)
    np.testing.assert_array_equal(
        mask_to_indices(unpack_patterns(word - np.array([1, 0], "uint8"), 20, 1, 2, 4), 2, 4), np.full((5, 1), 5)
    )


def test_padding_that_is_not_zero_is_refused():
    with pytest.raises(ValueError, match="patterns after the last of 4 groups.*rows=8 and columns=2"):
        unpack_patterns(np.array([6**4 % 256, 6**4 // 256], "uint8"), 8, 2, 2, 4)
    with pytest.raises(ValueError, match="bits 5 to 7"):
        unpack_patterns(np.array([0, 0b00100000], "uint8"), 8, 2, 2, 4)


def test_a_stream_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"1 values of 13 bits are a uint8 array of shape \(2,\)"):
        unpack_patterns(np.zeros(3, "uint8"), 8, 2, 2, 4)


def test_shapes_that_do_not_belong_together_are_refused():
    mask = random_mask(2, 4, 2, 3)
    with pytest.raises(ValueError, match=r"values \(4, 3\) and mask \(8, 3\)"):
        gather_kept(np.zeros((4, 3)), mask, 2, 4)
    with pytest.raises(ValueError, match=r"2:4 mask \(8, 3\) keeps values \(4, 3\), got \(8, 3\)"):
        scatter_kept(np.zeros((8, 3)), mask, 2, 4)


def test_rates_in_closed_form():
    assert enumerative_bits(2, 4) == pytest.approx(math.log2(6) / 4)
    assert enumerative_bits(1, 16) == 0.25
    assert patterns_size(4096, 4096, 2, 4) == math.ceil(math.ceil(4096 * 1024 / 5) * 13 / 8)
