"""Joined arrays: whatever is joined comes back bit for bit, in fewer bytes where bytes repeat."""

import json
import pathlib
import re
import zlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from keras_usm_lite.packing.array_demand import ArrayDemand
from keras_usm_lite.packing.joined_arrays import JOINED, JoinedArrays, join_arrays

NAMES = ("bool", "uint8", "int8", "uint16", "float16", "float32", "int64", "float64")
DTYPES = {**{name: np.dtype(name) for name in NAMES}, "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def demand(name, array):
    if name.endswith("/codes"):
        return ArrayDemand("uint8", None, array.size + 1)
    return ArrayDemand(array.dtype.name, array.shape, array.size if name.endswith("/patterns") else None)


def reopened(arrays, folder):
    """Join arrays, write them, and open the file. Returns the arrays that it holds, and the bytes that they take."""
    demands = {name: demand(name, array) for name, array in arrays.items()}
    joined, parts = join_arrays(dict(arrays), demands)
    save_file({JOINED: joined}, folder / "file.usm")
    description = {**parts, "crc32": [zlib.crc32(joined.tobytes())]}
    return JoinedArrays(safe_open(folder / "file.usm", "numpy"), [JOINED], demands, description), joined.size


@st.composite
def collections_of_arrays(draw):
    rng, arrays = np.random.default_rng(draw(st.integers(0, 2**32))), {}
    for number in range(draw(st.integers(0, 6))):
        shape = draw(st.lists(st.integers(0, 9), max_size=3))
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        array = np.asarray(rng.normal(size=shape) * draw(st.sampled_from([0, 1, 50])))
        arrays[str(number)] = array.astype(DTYPES[dtype])
        if draw(st.booleans()):
            size = draw(st.integers(1, 40))
            arrays[f"{number}/{draw(st.sampled_from(['codes', 'patterns']))}"] = rng.integers(0, 256, size, "uint8")
    return arrays


@settings(max_examples=60, deadline=None)
@given(collections_of_arrays())
def test_arrays_of_all_types_and_shapes_come_back_bit_for_bit_in_any_order(tmp_path_factory, arrays):
    found, _ = reopened(arrays, tmp_path_factory.mktemp("joined"))
    for name in reversed(arrays):
        assert (found[name].dtype, found[name].shape) == (arrays[name].dtype, arrays[name].shape)
        assert found[name].tobytes() == arrays[name].tobytes()


def test_numbers_of_like_size_take_fewer_bytes_than_they_have(tmp_path):
    """A norm's gains lie about 1: sign and exponent of a float16, and two bits of its fraction, say next to nothing."""
    draw = np.random.default_rng(0)
    arrays = {str(number): (1 + 0.05 * draw.normal(size=500)).astype("float16") for number in range(20)}
    found, size = reopened(arrays, tmp_path)
    plain = sum(array.nbytes for array in arrays.values())
    _, high = np.unique(np.concatenate([array.view("uint8")[1::2] for array in arrays.values()]), return_counts=True)
    entropy = np.sum(high * np.log2(high.sum() / high)) / 8
    assert plain / 2 + entropy < size < plain / 2 + entropy + 600  # a table of 512 bytes and a checksum
    assert size < 0.7 * plain
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_noise_is_stored_as_it_is(tmp_path):
    arrays = {"a": np.frombuffer(np.random.default_rng(0).bytes(2_500_000), "float32")}
    _, size = reopened(arrays, tmp_path)
    assert size == 2_500_000


def test_the_layout_is_that_of_the_format_description():
    """Streams, then for each type its lowest bytes, then the next ones: the example of docs/packed_format.md."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "packed_format.md").read_text()
    (described,) = re.findall(r"\| `arrays` \| `([0-9a-f ]+)` \|", page)
    (layout,) = re.findall(r"\| in the description \| `(.+)` \|", page)

    arrays = {
        "0/patterns": np.uint8([1, 2]), "0/codes": np.uint8([3]), "0/scale": np.float16([1.0, 1.5]),
        "1": np.float32([[2.0]]), "2": np.float16([-1.0]),
    }  # fmt: skip
    demands = {name: demand(name, array) for name, array in arrays.items()}
    joined, parts = join_arrays(arrays, demands)
    assert joined.tobytes().hex(" ") == described == "01 02 03 00 00 00 3c 3e bc 00 00 00 40"
    assert json.loads(json.dumps(parts)) == json.loads(f"{{{layout}}}")
    assert parts == {"streams": [2, 1], "planes": [("bytes", 3)] * 2 + [("bytes", 1)] * 4}
    assert not arrays


def test_a_model_of_nothing_is_nothing(tmp_path):
    _, size = reopened({}, tmp_path)
    assert size == 0


@pytest.mark.parametrize("coder", ["range", "zstd"])
def test_both_coders_are_used(coder):
    draw = np.random.default_rng(0)
    byte = {"range": draw.binomial(255, 0.5, 200_000), "zstd": np.tile(np.arange(256), 40)}[coder]
    _, parts = join_arrays({"a": byte.astype("uint8")}, {"a": ArrayDemand("uint8", (byte.size,))})
    assert parts["planes"][0][0] == coder
