"""`ArrayDemand`: what the description of a packed file demands of one array, and the checks that all arrays share."""

import math
import zlib
from typing import NamedTuple

from keras_usm_lite.packing.entropy import EXPANSION
from keras_usm_lite.packing.packed_file_error import PackedFileError

STREAMS = ("codes", "patterns", "positions")  # of a layer; everything else is numbers of a type


class ArrayDemand(NamedTuple):
    """Type and shape of one array.

    Attributes:
        dtype: NumPy name of its type.
        shape: its shape; None for a coded stream, which has the length that its symbols need.
        plain_size: bytes of a stream when no coder is used; None for an array of numbers.
    """

    dtype: str
    shape: tuple | None
    plain_size: int | None = None

    @property
    def elements(self):
        """Number of elements; not for a coded stream."""
        return math.prod(self.shape)


def demanded(layers, variables):
    """Return `{name: ArrayDemand}` of all arrays of a file, in the order of its description.

    Args:
        layers: a `PackedEntry` for each compressed layer.
        variables: a `PackedVariable` for each other variable.

    Raises:
        PackedFileError: an array is described twice.
    """
    demands = {}
    for entry in layers:
        for key, (dtype, shape) in entry.arrays().items():
            plain_size = entry.plain_size(key) if key in STREAMS else None
            _add(demands, f"{entry.name}/{key}", ArrayDemand(dtype, shape, plain_size))
    for variable in variables:
        for suffix, (dtype, shape) in variable.arrays().items():
            _add(demands, f"{variable.name}{suffix}", ArrayDemand(dtype, shape))
    return demands


def checksum(array):
    """Return the CRC-32 of an array's bytes in row-major order."""
    return zlib.crc32(array.tobytes())


def check_expansion(name, size, plain_size):
    """Refuse a coded stream that claims to be far smaller than a coder makes it.

    Raises:
        PackedFileError: `size` bytes stand for more than 64 times as many.
    """
    if plain_size > EXPANSION * size:
        raise PackedFileError(
            f"the stream {name!r} of {size} bytes claims to stand for {plain_size} bytes, more than {EXPANSION} times "
            "as many."
        )


def _add(demands, name, demand):
    if name in demands:
        raise PackedFileError(f"the array {name!r} is described twice.")
    demands[name] = demand
