"""Named arrays: found under their names, and refused if anything about them is another than demanded."""

import zlib

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from keras_usm_lite.packing.array_demand import ArrayDemand
from keras_usm_lite.packing.named_arrays import NamedArrays
from keras_usm_lite.packing.packed_file_error import PackedFileError

ARRAYS = {"a/codes": np.arange(5, dtype="uint8"), "b": np.float32([[1, 2]])}
DEMANDS = {"b": ArrayDemand("float32", (1, 2)), "a/codes": ArrayDemand("uint8", None, 300)}
CRC = [zlib.crc32(ARRAYS[name].tobytes()) for name in sorted(ARRAYS)]


def opened(folder, demands, crc32=CRC):
    save_file(ARRAYS, folder / "file.usm")
    file = safe_open(folder / "file.usm", "numpy")
    return NamedArrays(file, sorted(file.keys()), demands, {"crc32": crc32})


def test_arrays_are_found_under_their_names(tmp_path):
    arrays = opened(tmp_path, DEMANDS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize(
    ("demands", "crc32", "message"),
    [
        ({"b": DEMANDS["b"]}, CRC, "nothing describes: ..a/codes"),
        ({**DEMANDS, "c": DEMANDS["b"]}, CRC, "missing: ..c"),
        ({**DEMANDS, "b": ArrayDemand("float16", (1, 2))}, CRC, "has type F32 .* expected F16"),
        ({**DEMANDS, "b": ArrayDemand("float32", (2,))}, CRC, "shape .1, 2., expected F32 and .2,."),
        ({**DEMANDS, "a/codes": ArrayDemand("uint8", None, 321)}, CRC, "claims to stand for 321 bytes, more than 64"),
        (DEMANDS, CRC[::-1], "'a/codes' is damaged .checksum"),
    ],
)
def test_others_than_demanded_are_refused(demands, crc32, message, tmp_path):
    with pytest.raises(PackedFileError, match=message):
        opened(tmp_path, demands, crc32)
