"""What the description demands: every array once, in its order."""

import zlib

import numpy as np
import pytest

from keras_usm_lite.packing.array_demand import ArrayDemand, check_expansion, checksum, demanded
from keras_usm_lite.packing.packed_entry import PackedEntry
from keras_usm_lite.packing.packed_file_error import PackedFileError
from keras_usm_lite.packing.packed_variable import PackedVariable

LAYER = PackedEntry("a", 16, 6, 4, "symmetric", (1, 6), 2, 4, "range", "enumerative", "float16")
VARIABLES = [PackedVariable("b", (3, 2), "float32", "int8"), PackedVariable("c", (), "int32", "int32")]


def test_arrays_are_listed_in_the_order_of_the_description():
    assert list(demanded([LAYER], VARIABLES).items()) == [
        ("a/patterns", ArrayDemand("uint8", (9,), 9)),  # 24 digits are 5 words of 13 bits
        ("a/codes", ArrayDemand("uint8", None, 24)),
        ("a/scale", ArrayDemand("float16", (1, 6))),
        ("b", ArrayDemand("int8", (3, 2))),
        ("b.row_scale", ArrayDemand("float32", (3,))),
        ("c", ArrayDemand("int32", ())),
    ]
    assert demanded([LAYER], VARIABLES)["b"].elements == 6


def test_an_array_that_is_described_twice_is_refused():
    with pytest.raises(PackedFileError, match="'b.row_scale' is described twice"):
        demanded([], [*VARIABLES, PackedVariable("b.row_scale", (3,), "float32", "float32")])


def test_a_stream_stands_for_at_most_64_times_its_bytes():
    check_expansion("a", 2, 128)
    with pytest.raises(PackedFileError, match="the stream 'a' of 2 bytes claims to stand for 129 bytes"):
        check_expansion("a", 2, 129)


def test_the_checksum_is_that_of_the_bytes_in_row_major_order():
    array = np.float32([[1, 2], [3, 4]])
    assert checksum(array.T) == zlib.crc32(np.ascontiguousarray(array.T).tobytes()) != checksum(array)
