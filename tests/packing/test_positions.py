"""Lists of positions, against np.flatnonzero and Python's own big integers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.packing.bits import pack_bits
from keras_usm_lite.packing.patterns import enumerative_bits
from keras_usm_lite.packing.positions import (
    pack_positions,
    position_bits,
    position_list_bits,
    positions_size,
    unpack_positions,
)

ALL = [(n, m) for m in range(2, 17) for n in range(1, m)]


def random_mask(n, m, groups, columns, seed):
    group = np.zeros((groups, m, columns), bool)
    group[:, :n] = True
    return np.random.default_rng(seed).permuted(group, axis=1).reshape(groups * m, columns)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ALL), st.integers(0, 5), st.integers(0, 7), st.integers(0, 2**32))
def test_the_stream_lists_where_each_kept_weight_stands_and_comes_back(pattern, groups, columns, seed):
    n, m = pattern
    mask = random_mask(n, m, groups, columns, seed)
    packed = pack_positions(mask, n, m)
    kept = [position % m for column in mask.T for position in np.flatnonzero(column).tolist()]
    number = sum(position << i * math.ceil(math.log2(m)) for i, position in enumerate(kept))
    assert int.from_bytes(packed.tobytes(), "little") == number
    assert packed.size == positions_size(*mask.shape, n, m) == math.ceil(len(kept) * math.ceil(math.log2(m)) / 8)
    np.testing.assert_array_equal(unpack_positions(packed, *mask.shape, n, m), mask)


def test_two_of_four_is_the_metadata_of_nvidia():
    """PTX ISA: the two indices of a group of four lie in four bits, the smaller one low."""
    nibbles = {(0, 1): 0b0100, (0, 2): 0b1000, (0, 3): 0b1100, (1, 2): 0b1001, (1, 3): 0b1101, (2, 3): 0b1110}
    for kept, nibble in nibbles.items():
        mask = np.isin(np.arange(4), kept)[:, None]
        assert pack_positions(mask, 2, 4).tolist() == [nibble]


@pytest.mark.parametrize(("n", "m"), ALL)
def test_a_list_of_positions_is_never_smaller_than_the_patterns(n, m):
    assert position_bits(m) == math.ceil(math.log2(m))
    assert position_list_bits(n, m) == n / m * position_bits(m) >= enumerative_bits(n, m) - 1e-12


def test_the_papers_figures():
    assert position_list_bits(2, 4) == 1.0
    assert position_list_bits(4, 8) == 1.5
    assert position_list_bits(1, 16) == 0.25


@pytest.mark.parametrize(
    ("n", "m", "positions", "message"),
    [
        (2, 4, [0, 1, 2, 2], r"group 1 has the positions \[2, 2\]"),
        (2, 4, [3, 1], r"group 0 has the positions \[3, 1\], which must rise and be below 4"),
        (1, 3, [3], r"positions \[3\], which must rise and be below 3"),
        (3, 5, [0, 2, 6], "must rise and be below 5"),
    ],
)
def test_positions_that_are_no_pattern_are_refused(n, m, positions, message):
    packed = pack_bits(np.array(positions), position_bits(m))
    with pytest.raises(ValueError, match=message):
        unpack_positions(packed, len(positions) // n * m, 1, n, m)


def test_a_stream_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"4 values of 2 bits are a uint8 array of shape \(1,\)"):
        unpack_positions(np.zeros(2, "uint8"), 8, 1, 2, 4)


def test_a_mask_that_is_not_of_the_pattern_is_refused():
    with pytest.raises(ValueError, match="do not keep exactly 2 of 4"):
        pack_positions(np.ones((4, 1)), 2, 4)
