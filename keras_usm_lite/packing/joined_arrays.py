"""`JoinedArrays`: the arrays of a file of version 3, an archive, cut out of the only one that it has."""

import collections
import zlib

import ml_dtypes
import numpy as np

from keras_usm_lite.packing.array_demand import check_expansion
from keras_usm_lite.packing.entropy import decode, encode
from keras_usm_lite.packing.packed_entry import CODERS
from keras_usm_lite.packing.packed_file_error import PackedFileError

JOINED = "arrays"  # name of that array
_BYTES = 256  # the alphabet of a plane
_BLOCK = 2**20  # bytes that are read at a time for the checksum
_DTYPES = {"bfloat16": ml_dtypes.bfloat16}  # that NumPy does not know by name


def join_arrays(arrays, demands):
    """Write all arrays of an archive as one.

    First the streams of the layers, one behind the other. Then the numbers, type after type: all numbers of a type
    side by side, their lowest bytes first, then the next ones. In such a plane signs and exponents are among
    themselves, so each is coded with whichever coder makes it smaller, if one does.

    Args:
        arrays: `{name: array}`; emptied on the way, so that memory does not hold all of them and what is made of them.
        demands: `{name: ArrayDemand}`, as `demanded` lists them.

    Returns:
        `(joined, parts)`: uint8 `[bytes]`, and what the description of the file says about it: "streams", the bytes of
        each stream, and "planes", how each plane is stored ("bytes", "range" or "zstd") and its bytes.

    Example:

    >>> from keras_usm_lite.packing.array_demand import ArrayDemand
    >>> demand = ArrayDemand("float16", (2,))
    >>> joined, parts = join_arrays({"a": np.float16([1, -2])}, {"a": demand})
    >>> joined.tolist(), parts["planes"]  # 0x3c00 and 0xc000
    ([0, 0, 60, 192], [('bytes', 2), ('bytes', 2)])
    """
    streams = [arrays.pop(name) for name, demand in demands.items() if demand.plain_size is not None]
    planes = []
    for dtype, names in _numbers(demands).items():
        numbers = [arrays.pop(name).reshape(-1) for name in names]
        itemsize = _dtype(dtype).itemsize
        for place in range(itemsize):
            plane = np.concatenate([some.view(np.uint8)[place::itemsize] for some in numbers])
            planes.append(encode(plane, _BYTES, plane.size) or ("bytes", plane))
        del numbers
    parts = {"streams": [stream.size for stream in streams], "planes": [(form, plane.size) for form, plane in planes]}
    pieces = streams + [plane for _, plane in planes]
    return np.concatenate([np.zeros(0, np.uint8), *pieces]), parts


class JoinedArrays:
    """One array holds all others, so that no names, types and offsets are stored.

    What is where follows from the demands and the lengths in the description. All numbers of a type are decoded when
    the first of them is asked for.

    Args:
        file: an open safetensors file.
        names: of its tensors, without the description.
        demands: `{name: ArrayDemand}` of all arrays, in the order of the description.
        description: the parts of the file's description.

    Raises:
        PackedFileError, ValueError, TypeError: another array, checksum or length than those that are demanded.
    """

    PARTS = ("crc32", "planes", "streams")  # of the description, beside those of every file

    def __init__(self, file, names, demands, description):
        if names != [JOINED]:
            raise PackedFileError(f"an archive has one array, {JOINED!r}, beside its description, not {names[:5]}.")
        self._view, self._demands = file.get_slice(JOINED), demands
        found, size = self._view.get_dtype(), tuple(self._view.get_shape())
        if found != "U8" or len(size) != 1:
            raise PackedFileError(f"the array {JOINED!r} has type {found} and shape {size}, expected U8 and one axis.")
        if [self._checksum(size[0])] != description["crc32"]:
            raise PackedFileError(f"the array {JOINED!r} is damaged (checksum mismatch).")
        lengths = _checked_streams(demands, description["streams"])
        lengths |= _checked_planes(demands, description["planes"])
        if sum(length for _, length in lengths.values()) != size[0]:
            raise PackedFileError(f"the lengths of all streams and planes do not add up to the {size[0]} bytes there.")
        self._pieces, end = {}, 0
        for key, (form, length) in lengths.items():
            self._pieces[key] = form, slice(end, end + length)
            end += length
        self._decoded = {}

    def __getitem__(self, name):
        demand = self._demands[name]
        if demand.plain_size is not None:
            return self._read(self._pieces[name][1])
        if demand.dtype not in self._decoded:
            self._decoded[demand.dtype] = self._decode(demand.dtype)
        return self._decoded[demand.dtype][name]

    def _checksum(self, size):
        crc = 0
        for start in range(0, size, _BLOCK):
            crc = zlib.crc32(self._view[start : min(start + _BLOCK, size)], crc)
        return crc

    def _read(self, where):
        if where.start == where.stop:  # which safetensors refuses at the end of an array
            return np.zeros(0, np.uint8)
        return self._view[where]

    def _decode(self, dtype):
        """Return `{name: array}` of all numbers of a type."""
        demands = {name: self._demands[name] for name in _numbers(self._demands)[dtype]}
        count, itemsize = sum(demand.elements for demand in demands.values()), _dtype(dtype).itemsize
        values = np.empty((count, itemsize), np.uint8)
        for place in range(itemsize):
            form, where = self._pieces[dtype, place]
            stream = self._read(where)
            values[:, place] = stream if form == "bytes" else decode(stream, form, _BYTES, count)
        values, arrays, end = values.reshape(-1).view(_dtype(dtype)), {}, 0
        for name, demand in demands.items():
            arrays[name] = values[end : end + demand.elements].reshape(demand.shape)
            end += demand.elements
        return arrays


def _dtype(name):
    return np.dtype(_DTYPES.get(name, name))


def _numbers(demands):
    """Return `{type: names of its arrays}`, types in the order in which they first occur."""
    names = collections.defaultdict(list)
    for name, demand in demands.items():
        if demand.plain_size is None:
            names[demand.dtype].append(name)
    return names


def _checked_streams(demands, lengths):
    """Return `{name: (form, bytes)}` of the streams."""
    streams = {name: demand for name, demand in demands.items() if demand.plain_size is not None}
    checked = {}
    for (name, demand), length in zip(streams.items(), lengths, strict=True):
        checked[name] = None, _checked_length(name, length, demand.plain_size, coded=demand.shape is None)
    return checked


def _checked_planes(demands, planes):
    """Return `{(type, place of the byte): (form, bytes)}` of the planes."""
    places = [
        ((dtype, place), sum(demands[name].elements for name in names))
        for dtype, names in _numbers(demands).items()
        for place in range(_dtype(dtype).itemsize)
    ]
    checked = {}
    for ((dtype, place), count), (form, length) in zip(places, planes, strict=True):
        name = f"byte {place} of {dtype}"
        if form not in ("bytes", *CODERS):
            raise PackedFileError(f"the plane {name!r} cannot be stored as {form!r}.")
        checked[dtype, place] = form, _checked_length(name, length, count, coded=form in CODERS)
    return checked


def _checked_length(name, length, plain_size, coded):
    if type(length) is not int or length < 0 or not (coded or length == plain_size):
        raise PackedFileError(f"the stream {name!r} cannot have {length!r} bytes; {plain_size} without a coder.")
    if coded:
        check_expansion(name, length, plain_size)
    return length
