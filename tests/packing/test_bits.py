"""Packed integers against Python's own big integers and `np.packbits`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.packing import bits as bits_module
from keras_usm_lite.packing.bits import pack_bits, packed_size, transposed, unpack_bits

WIDTHS = st.integers(1, 32)


def slow_pack(values, bits):
    """The stream as one big number, `sum_i value_i * 2**(i * bits)`."""
    number = sum(int(value) << i * bits for i, value in enumerate(values))
    return list(number.to_bytes((len(values) * bits + 7) // 8, "little"))


@st.composite
def widths_and_values(draw):
    bits = draw(WIDTHS)
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=50))


@settings(max_examples=300, deadline=None)
@given(widths_and_values())
def test_the_stream_is_the_little_endian_number_of_its_values(case):
    bits, values = case
    packed = pack_bits(np.array(values, "int64"), bits)
    assert packed.dtype == np.uint8
    assert packed.tolist() == slow_pack(values, bits)
    assert packed.size == packed_size(len(values), bits)


@settings(max_examples=300, deadline=None)
@given(widths_and_values(), st.sampled_from([8, 16, 2**18]))
def test_unpacking_returns_the_values_whatever_the_chunk(case, chunk):
    bits, values = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits_module, "_CHUNK", chunk)
        unpacked = unpack_bits(pack_bits(np.array(values, "int64"), bits), bits, len(values))
    assert unpacked.tolist() == values
    assert unpacked.dtype.itemsize == (1 if bits <= 8 else 2 if bits <= 16 else 4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 13, 31])
def test_arrays_of_several_chunks_come_back(bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, 2**18 * 2 + 1001)
    np.testing.assert_array_equal(unpack_bits(pack_bits(values, bits), bits, values.size), values)


def test_one_bit_is_packbits():
    values = np.random.default_rng(0).integers(0, 2, 300_007).astype("uint8")
    packed = np.packbits(values, bitorder="little")
    np.testing.assert_array_equal(pack_bits(values, 1), packed)
    np.testing.assert_array_equal(pack_bits(values.astype(bool), 1), packed)
    np.testing.assert_array_equal(unpack_bits(packed, 1, values.size), values)


def test_three_bits_are_the_bits_of_the_values_one_after_the_other():
    values = np.random.default_rng(1).integers(0, 8, 1001)
    stream = (values[:, None] >> np.arange(3)) & 1
    np.testing.assert_array_equal(pack_bits(values, 3), np.packbits(stream.ravel().astype("uint8"), bitorder="little"))


@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4"])
def test_whole_bytes_are_the_little_endian_array(dtype):
    values = np.random.default_rng(2).integers(0, 2 ** (8 * np.dtype(dtype).itemsize), 999).astype(dtype)
    bits = 8 * values.itemsize
    assert pack_bits(values, bits).tobytes() == values.tobytes()
    np.testing.assert_array_equal(unpack_bits(np.frombuffer(values.tobytes(), "uint8"), bits, 999), values)


def test_no_values_take_no_bytes():
    assert pack_bits(np.array([], "uint8"), 3).size == packed_size(0, 3) == 0
    assert unpack_bits(np.array([], "uint8"), 3, 0).size == 0


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64", "uint64"])
def test_the_type_of_the_values_does_not_matter(dtype):
    values = np.arange(16).astype(dtype)
    assert pack_bits(values, 4).tolist() == slow_pack(range(16), 4)
    assert pack_bits(values, np.uint8(32)).tolist() == slow_pack(range(16), 32)


def test_a_strided_view_is_packed_like_its_copy():
    values = np.arange(100, dtype="uint8") % 8
    np.testing.assert_array_equal(pack_bits(values[::-3], 3), pack_bits(values[::-3].copy(), 3))


@pytest.mark.parametrize(
    ("values", "bits", "message"),
    [
        ([1, 2, 3, 9], 3, r"value 9 at index 3 does not fit in 3 bits: 0\.\.7"),
        ([0, -1], 8, "value -1 at index 1 does not fit"),
        ([2**32], 32, "value 4294967296 at index 0"),
        ([0.0, 1.0], 4, "1-D integer array, got float64"),
        ([[0, 1]], 4, r"1-D integer array, got int64 of shape \(1, 2\)"),
        ([0, 1], 0, "bits must be an integer from 1 to 32, got 0"),
        ([0, 1], 33, "bits must be an integer from 1 to 32, got 33"),
        ([0, 1], 2.0, "bits must be an integer from 1 to 32, got 2.0"),
    ],
)
def test_values_that_cannot_be_packed_are_named(values, bits, message):
    with pytest.raises(ValueError, match=message):
        pack_bits(np.array(values), bits)


@pytest.mark.parametrize(
    ("packed", "bits", "count", "message"),
    [
        (
            np.zeros(2, "uint8"),
            3,
            9,
            r"9 values of 3 bits are a uint8 array of shape \(4,\), got uint8 of shape \(2,\)",
        ),
        (np.zeros(3, "uint8"), 8, 2, r"shape \(2,\), got uint8 of shape \(3,\)"),
        (np.zeros(2, "int8"), 8, 2, "got int8"),
        (np.zeros((2, 1), "uint8"), 8, 2, r"got uint8 of shape \(2, 1\)"),
        (np.array([0b01000000], "uint8"), 3, 2, "last byte is 0x40, but its bits 6 to 7"),
        (np.zeros(2, "uint8"), 8, -2, "count must be an integer of at least 0, got -2"),
    ],
)
def test_damaged_bytes_are_refused(packed, bits, count, message):
    with pytest.raises(ValueError, match=message):
        unpack_bits(packed, bits, count)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 7), (64, 64), (65, 3), (200, 130)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_transposed_is_row_major(shape, order):
    matrix = np.asarray(np.random.default_rng(3).normal(size=shape), order=order)
    result = transposed(matrix)
    np.testing.assert_array_equal(result, matrix.T)
    assert result.flags.c_contiguous


def test_transposing_a_column_major_matrix_costs_no_copy():
    matrix = np.asfortranarray(np.ones((5, 4)))
    assert np.shares_memory(transposed(matrix), matrix)
