"""N:M masks as lists of positions: where in its group each kept weight stands, as NVIDIA's sparse tensor cores do."""

import numpy as np

from keras_usm_lite.packing.bits import pack_bits, packed_size, transposed, unpack_bits
from keras_usm_lite.packing.patterns import mask_to_indices, pattern_table


def position_bits(m):
    """Return the bits of one position in a group of `m`, `ceil(log2 m)`.

    Example:

    >>> position_bits(4), position_bits(5)
    (2, 3)
    """
    return (m - 1).bit_length()


def position_list_bits(n, m):
    """Return the bits per weight of a list of kept positions, `n / m * ceil(log2 m)`.

    Example:

    >>> position_list_bits(2, 4)
    1.0
    """
    return n / m * position_bits(m)


def positions_size(rows, columns, n, m):
    """Return the bytes of a kernel's list of positions, `ceil(rows * columns * n / m * ceil(log2 m) / 8)`.

    Args:
        rows: rows of the kernel, a multiple of `m`.
        columns: columns of the kernel.
        n: weights kept per group.
        m: group size.

    Returns:
        The number of bytes, an int.

    Example:

    >>> positions_size(64, 10, 2, 4) * 8 / 640
    1.0
    """
    return packed_size(rows // m * n * columns, position_bits(m))


def pack_positions(mask, n, m):
    """Write an N:M mask as the position of every kept weight within its group.

    The kept weights are listed column after column, each column from top to bottom; weight `i` takes the bits
    `i B ... (i + 1) B - 1` of the stream, `B = ceil(log2 m)`, as `pack_bits` writes them. For 2:4 the four bits of a
    group are those of NVIDIA's metadata: two positions, the smaller one in the lower bits.

    Args:
        mask: array `[rows, columns]`, not zero where a weight is kept; every `m` consecutive rows of a column keep
            exactly `n`.
        n: weights kept per group.
        m: group size, `1 <= n < m <= 16`.

    Returns:
        uint8 array `[positions_size(rows, columns, n, m)]`.

    Raises:
        ValueError: `rows` is not a multiple of `m`, or a group does not keep exactly `n`.

    Source: NVIDIA PTX ISA, sparse matrix storage of `mma.sp` with 2:4 granularity.

    Example:

    >>> pack_positions(np.array([[0], [1], [0], [1]]), n=2, m=4)  # 1 + 4 * 3
    array([13], dtype=uint8)
    """
    positions = np.nonzero(pattern_table(n, m))[1].astype(np.uint8).reshape(-1, n)
    groups = transposed(mask_to_indices(mask, n, m)).ravel()
    return pack_bits(positions.take(groups, axis=0).ravel(), position_bits(m))


def unpack_positions(packed, rows, columns, n, m):
    """Read back the mask that `pack_positions` wrote.

    Args:
        packed: uint8 array `[positions_size(rows, columns, n, m)]`.
        rows: rows of the kernel, a multiple of `m`.
        columns: columns of the kernel.
        n: weights kept per group.
        m: group size, `1 <= n < m <= 16`.

    Returns:
        bool array `[rows, columns]`.

    Raises:
        ValueError: `packed` has the wrong length, or the positions of a group do not rise or leave the group.

    Example:

    >>> unpack_positions(np.array([13], "uint8"), rows=4, columns=1, n=2, m=4).ravel().tolist()
    [False, True, False, True]
    """
    positions = unpack_bits(packed, position_bits(m), rows // m * n * columns).reshape(-1, n)
    wrong = positions[:, -1] >= m
    for k in range(1, n):
        wrong |= positions[:, k] <= positions[:, k - 1]
    if wrong.any():
        group = np.argmax(wrong)
        raise ValueError(
            f"group {group} has the positions {positions[group].tolist()}, which must rise and be below {m}. "
            f"The data are damaged, or the pattern is not {n}:{m}."
        )
    numbers = np.zeros(len(positions), np.uint16)
    for position in positions.T:
        numbers |= np.left_shift(np.uint16(1), position, dtype=np.uint16)
    mask = np.empty((len(positions), m), bool)
    for p in range(m):
        np.not_equal(numbers & np.uint16(2**p), 0, out=mask[:, p])
    return transposed(mask.reshape(columns, rows))
