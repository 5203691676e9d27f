"""Unsigned integers of a few bits as a byte stream, and matrices in the order they are stored: column after column."""

import math

import numpy as np

MAX_BITS = 32
_CHUNK = 2**18  # values per step, a multiple of 8: the temporaries stay in the cache
_STRIPE = 64  # rows transposed at a time; a whole large matrix at once misses the cache on every element


def packed_size(count, bits):
    """Return the bytes of `count` packed values, `ceil(count * bits / 8)`.

    Args:
        count: number of values.
        bits: bits per value, 1 to 32.

    Returns:
        The number of bytes, an int.

    Raises:
        ValueError: `bits` is not an integer from 1 to 32, or `count` is not a non-negative integer.

    Example:

    >>> packed_size(9, 3)
    4
    """
    if not _is_whole(bits) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from 1 to {MAX_BITS}, got {bits!r}.")
    if not _is_whole(count) or count < 0:
        raise ValueError(f"count must be an integer of at least 0, got {count!r}.")
    return -(-int(count) * int(bits) // 8)


def pack_bits(values, bits):
    """Write unsigned integers back to back, `bits` bits each, least significant bit first.

    Value `i` occupies the bits `i * bits ... (i + 1) * bits - 1` of the stream, its lowest bit first; bit `j` of the
    stream is bit `j % 8` of byte `j // 8` (bit 0 is worth 1). The last byte is filled up with zero bits. There is no
    header. So at 4 bits the even values are the low halves of the bytes; at 8, 16 and 32 bits the stream is the
    little-endian array of the values.

    Args:
        values: 1-D array of integers (or booleans), `0 <= value < 2**bits`.
        bits: bits per value, 1 to 32.

    Returns:
        uint8 array `[packed_size(len(values), bits)]`.

    Raises:
        ValueError: the values are not a 1-D integer array, one does not fit, or `bits` is out of range.

    Example:

    >>> [f"{byte:08b}" for byte in pack_bits(np.array([1, 2, 3]), bits=3)]
    ['11010001', '00000000']
    """
    values = np.asarray(values)
    size, bits = packed_size(values.size, bits), int(bits)
    _check_values(values, bits)
    period, width = _period(bits)
    packed = np.empty(size, np.uint8)
    for start in range(0, values.size, _CHUNK):
        lanes = _deal(values[start : start + _CHUNK], period, _dtype(bits))
        at = start // period * width
        _collect(_recut(lanes, bits, 8, width), packed[at : at + _CHUNK // period * width])
    return packed


def unpack_bits(packed, bits, count):
    """Read back the `count` values that `pack_bits` wrote.

    Args:
        packed: uint8 array `[packed_size(count, bits)]`.
        bits: bits per value, 1 to 32.
        count: number of values.

    Returns:
        Array `[count]` of the smallest unsigned type that holds `bits` bits: uint8, uint16 or uint32.

    Raises:
        ValueError: `packed` is not a 1-D uint8 array of that length, or a bit after the last value is not zero.

    Example:

    >>> unpack_bits(np.array([0b11010001, 0], "uint8"), bits=3, count=3)
    array([1, 2, 3], dtype=uint8)
    """
    packed = np.asarray(packed)
    size, bits, count = packed_size(count, bits), int(bits), int(count)
    if packed.dtype != np.uint8 or packed.shape != (size,):
        raise ValueError(
            f"{count} values of {bits} bits are a uint8 array of shape ({size},), got {packed.dtype} of shape "
            f"{packed.shape}. The data are cut off, or count or bits are not those it was packed with."
        )
    used = count * bits % 8
    if used and packed[-1] >> used:
        raise ValueError(
            f"the last byte is {packed[-1]:#04x}, but its bits {used} to 7 follow the last of {count} values of {bits} "
            "bits and must be zero. The data are damaged, or count or bits are wrong."
        )
    period, width = _period(bits)
    values = np.empty(count, _dtype(bits))
    for start in range(0, count, _CHUNK):
        at = start // period * width
        lanes = _deal(packed[at : at + _CHUNK // period * width], width, _dtype(bits))
        _collect(_recut(lanes, 8, bits, period), values[start : start + _CHUNK])
    return values


def transposed(matrix):
    """Return `matrix.T` in row-major memory, so that `.ravel()` lists the matrix column after column.

    A large matrix is copied in stripes of rows, several times faster than `np.ascontiguousarray(matrix.T)`. If
    `matrix` is column-major already, this is a view of it and costs nothing.

    Args:
        matrix: array `[rows, columns]`.

    Returns:
        C-contiguous array `[columns, rows]`.

    Example:

    >>> transposed(np.array([[1, 2, 3], [4, 5, 6]])).ravel()
    array([1, 4, 2, 5, 3, 6])
    """
    source = matrix.T
    if source.flags.c_contiguous:
        return source
    result = np.empty(source.shape, source.dtype)
    for start in range(0, source.shape[1], _STRIPE):
        result[:, start : start + _STRIPE] = source[:, start : start + _STRIPE]
    return result


def _is_whole(number):
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def _check_values(values, bits):
    if values.ndim != 1 or values.dtype.kind not in "biu":
        raise ValueError(f"values must be a 1-D integer array, got {values.dtype} of shape {values.shape}.")
    if values.size and (values.min() < 0 or values.max() >= 2**bits):
        first = np.argmax((values < 0) | (values >= 2**bits))
        raise ValueError(f"value {values[first]} at index {first} does not fit in {bits} bits: 0..{2**bits - 1}.")


def _dtype(bits):
    return np.min_scalar_type(2**bits - 1)


def _period(bits):
    """Return after how many values, and how many bytes, a value starts at a byte border again."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _deal(stream, count, dtype):
    """Deal a stream to `count` contiguous lanes: number `i` goes to lane `i % count`. Zeros fill the last round."""
    lanes = np.zeros((count, -(-stream.size // count)), dtype)
    for j, lane in enumerate(lanes):
        dealt = stream[j::count]
        lane[: dealt.size] = dealt
    return lanes


def _collect(lanes, stream):
    """Undo `_deal`: write the lanes, but not the zeros that fill the last round, to `stream`."""
    for j, lane in enumerate(lanes):
        target = stream[j :: len(lanes)]
        target[...] = lane[: target.size]


def _recut(lanes, old, new, count):
    """Cut the bits of every round, `old` bits from each lane, into `count` lanes of `new` bits.

    Piece `i` starts at bit `i * new` of the round and lane `j` at bit `j * old`; where they overlap, the lane is
    shifted by the difference. What a shift carries past the piece is cut off.
    """
    dtype = _dtype(new)
    pieces = np.zeros((count, lanes.shape[1]), dtype)
    for i, piece in enumerate(pieces):
        for j in range(i * new // old, -(-(i + 1) * new // old)):
            shift = i * new - j * old
            part = lanes[j] >> shift if shift > 0 else lanes[j] * 2**-shift  # ten times as fast as << in NumPy
            piece |= part.astype(dtype, copy=False)
        piece &= 2**new - 1
    return pieces
