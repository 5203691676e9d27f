"""N:M masks as numbers: which of the `comb(m, n)` patterns a group of weights has, and those numbers in few bits."""

import functools
import math

import numpy as np

from keras_usm_lite.packing.bits import pack_bits, packed_size, transposed, unpack_bits

MAX_M = 16
MAX_WORD_BITS = 31
_CHUNK = 2**18  # weights per step: the temporaries stay in the cache


@functools.cache
def pattern_table(n, m):
    """Return every pattern that keeps `n` of `m` weights, in the order of their indices.

    The index of a pattern is its colexicographic rank (combinatorial number system): for the kept positions
    `p_0 < p_1 < ... < p_{n-1}`, `index = sum_k comb(p_k, k + 1)`. This is also the order of the patterns read as binary
    numbers whose bit `p` says whether position `p` is kept.

    Args:
        n: weights kept per group.
        m: group size, `1 <= n < m <= 16`.

    Returns:
        Read-only bool array `[comb(m, n), m]`.

    Raises:
        ValueError: not `1 <= n < m <= 16`.

    Source: D. E. Knuth, The Art of Computer Programming 4A, section 7.2.1.3, theorem L.

    Example:

    >>> pattern_table(2, 4).astype(int).tolist()
    [[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]]
    """
    if not 1 <= n < m <= MAX_M:
        raise ValueError(f"a pattern keeps n of m weights with 1 <= n < m <= {MAX_M}, got n={n!r}, m={m!r}.")
    numbers = np.arange(2**m)[:, None] >> np.arange(m) & 1
    table = numbers[numbers.sum(axis=1) == n].astype(bool)
    table.setflags(write=False)
    return table


@functools.cache
def word_layout(n, m):
    """Return how many pattern indices share a word, and the bits of a word.

    `k` indices `i_0 ... i_{k-1}`, each below `C = comb(m, n)`, are the digits of one number below `C**k`, which takes
    `B = ceil(k log2 C)` bits. Of all `k` with `B <= 31` this is the one with the fewest bits per index, `B / k`; of
    equals the smallest. That is within 0.032 bits per weight of `enumerative_bits` for every pattern (0.004 for 2:4);
    words of 63 bits would save 0.003 bits per weight for 2:4 and 0.021 for 8:16, and be slower.

    Args:
        n: weights kept per group.
        m: group size, `1 <= n < m <= 16`.

    Returns:
        The pair `(groups_per_word, bits_per_word)`, `(k, B)`.

    Raises:
        ValueError: not `1 <= n < m <= 16`.

    Example:

    >>> word_layout(2, 4), word_layout(4, 8), word_layout(1, 4)
    ((5, 13), (5, 31), (1, 2))
    """
    patterns = len(pattern_table(n, m))
    layouts = ((k, (patterns**k - 1).bit_length()) for k in range(1, MAX_WORD_BITS + 1))
    return min(((k, bits) for k, bits in layouts if bits <= MAX_WORD_BITS), key=lambda layout: layout[1] / layout[0])


def patterns_size(rows, columns, n, m):
    """Return the bytes of the packed mask of a kernel `[rows, columns]`.

    With `(k, B) = word_layout(n, m)`: `ceil(ceil(rows / m * columns / k) * B / 8)`.

    Args:
        rows: rows of the kernel, a multiple of `m`.
        columns: columns of the kernel.
        n: weights kept per group.
        m: group size.

    Returns:
        The number of bytes, an int.

    Raises:
        ValueError: `rows` is not a multiple of `m`, or not `1 <= n < m <= 16`.

    Example:

    >>> patterns_size(4000, 1000, 2, 4) * 8 / (4000 * 1000)
    0.65
    """
    groups_per_word, bits = word_layout(n, m)
    return packed_size(-(-_groups(rows, m) * columns // groups_per_word), bits)


def pack_patterns(mask, n, m):
    """Write an N:M mask as a byte stream.

    The groups are listed column after column, each column from top to bottom; group `g` of column `c` is number
    `i = c * rows / m + g`, and its digit is its index in `pattern_table(n, m)`. With `(k, B) = word_layout(n, m)` and
    `C = comb(m, n)`, word `w` is `sum_j digit[w * k + j] * C**j`, `j = 0 ... k - 1`; digits after the last group are
    zero. The words are written by `pack_bits` with `B` bits each. The whole matrix is one stream, so a word may hold
    the end of one column and the start of the next; to read column `c` alone, start at digit
    `(c * rows / m) % k` of word `c * rows / m // k`.

    Args:
        mask: array `[rows, columns]`, not zero where a weight is kept; every `m` consecutive rows of a column keep
            exactly `n`.
        n: weights kept per group.
        m: group size, `1 <= n < m <= 16`.

    Returns:
        uint8 array `[patterns_size(rows, columns, n, m)]`.

    Raises:
        ValueError: `rows` is not a multiple of `m`, or a group does not keep exactly `n`.

    Example:

    >>> pack_patterns(np.array([[0], [1], [0], [1]]), n=2, m=4)  # pattern 4
    array([4, 0], dtype=uint8)
    """
    groups_per_word, bits = word_layout(n, m)
    digits = transposed(mask_to_indices(mask, n, m)).ravel()
    digits = np.pad(digits, (0, -digits.size % groups_per_word)).reshape(-1, groups_per_word)
    patterns = len(pattern_table(n, m))
    words = np.zeros(len(digits), np.min_scalar_type(2**bits - 1))
    for digit in digits.T[::-1]:
        words *= patterns
        words += digit
    return pack_bits(words, bits)


def unpack_patterns(packed, rows, columns, n, m):
    """Read back the mask that `pack_patterns` wrote.

    Args:
        packed: uint8 array `[patterns_size(rows, columns, n, m)]`.
        rows: rows of the kernel, a multiple of `m`.
        columns: columns of the kernel.
        n: weights kept per group.
        m: group size, `1 <= n < m <= 16`.

    Returns:
        bool array `[rows, columns]`.

    Raises:
        ValueError: `packed` has the wrong length, holds a word of `C**k` or more, or a digit or a bit after the last
            group is not zero.

    Example:

    >>> unpack_patterns(np.array([4, 0], "uint8"), rows=4, columns=1, n=2, m=4).ravel().tolist()
    [False, True, False, True]
    """
    groups_per_word, bits = word_layout(n, m)
    patterns = len(pattern_table(n, m))
    count = _groups(rows, m) * columns
    words = unpack_bits(packed, bits, -(-count // groups_per_word))
    digits = np.empty((words.size, groups_per_word), _index_dtype(n, m))
    rest = words
    for j in range(groups_per_word):
        quotient = rest // patterns
        digits[:, j] = rest - quotient * patterns
        rest = quotient
    if rest.any():
        first = np.flatnonzero(rest)[0]
        raise ValueError(
            f"word {first} is {words[first]}, but {groups_per_word} patterns of {n}:{m} give words below "
            f"{patterns**groups_per_word}. The data are damaged, or the pattern is not {n}:{m}."
        )
    if digits.ravel()[count:].any():
        raise ValueError(
            f"the last word holds patterns after the last of {count} groups. The data are damaged, or rows={rows} and "
            f"columns={columns} are not those of the mask."
        )
    return indices_to_mask(transposed(digits.ravel()[:count].reshape(columns, rows // m)), n, m)


def mask_to_indices(mask, n, m):
    """Return which pattern each group of a mask has.

    Args:
        mask: array `[rows, columns]`, not zero where a weight is kept.
        n: weights kept per group.
        m: group size, `1 <= n < m <= 16`.

    Returns:
        Array `[rows / m, columns]` of indices into `pattern_table(n, m)`; uint8 if they all fit, otherwise uint16.

    Raises:
        ValueError: `rows` is not a multiple of `m`, or a group does not keep exactly `n`.

    Example:

    >>> mask_to_indices(np.array([[0, 1], [1, 1], [0, 0], [1, 0]]), n=2, m=4)
    array([[4, 0]], dtype=uint8)
    """
    mask = _checked_mask(mask, n, m)
    numbers = _pattern_numbers(n, m)
    rank = np.zeros(2**m, _index_dtype(n, m))
    rank[numbers] = np.arange(numbers.size)
    groups = mask.view(np.uint8).reshape(len(mask) // m, m, mask.shape[1])
    indices = np.empty((len(groups), mask.shape[1]), rank.dtype)
    for some in _stripes(*indices.shape, m):
        number = np.zeros(indices[some].shape, numbers.dtype)
        for p in range(m):
            number |= groups[some, p] * numbers.dtype.type(2**p)
        indices[some] = rank.take(number)
    return indices


def indices_to_mask(indices, n, m):
    """Return the mask whose groups have the given patterns.

    Args:
        indices: integer array `[rows / m, columns]`, indices into `pattern_table(n, m)`.
        n: weights kept per group.
        m: group size, `1 <= n < m <= 16`.

    Returns:
        bool array `[rows, columns]`.

    Raises:
        ValueError: an index is negative or not below `comb(m, n)`.

    Example:

    >>> indices_to_mask(np.array([[4, 0]]), n=2, m=4).astype(int).tolist()
    [[0, 1], [1, 1], [0, 0], [1, 0]]
    """
    indices = np.asarray(indices)
    numbers = _pattern_numbers(n, m)
    if indices.ndim != 2 or indices.dtype.kind not in "iu":
        raise ValueError(f"indices must be a 2-D integer array, got {indices.dtype} of shape {indices.shape}.")
    if indices.size and not 0 <= indices.min() <= indices.max() < numbers.size:
        raise ValueError(
            f"{n}:{m} has the patterns 0..{numbers.size - 1}, got indices from {indices.min()} to {indices.max()}."
        )
    groups, columns = indices.shape
    mask = np.empty((groups, m, columns), bool)
    for some in _stripes(groups, columns, m):
        number = numbers.take(indices[some])
        for p in range(m):
            np.not_equal(number & numbers.dtype.type(2**p), 0, out=mask[some, p])
    return mask.reshape(groups * m, columns)


def gather_kept(values, mask, n, m):
    """Return the kept values of every group, in row order, without the others.

    Args:
        values: array `[rows, columns]`.
        mask: array `[rows, columns]`, not zero where a value is kept; exactly `n` in every `m` consecutive rows.
        n: values kept per group.
        m: group size.

    Returns:
        Array `[rows * n / m, columns]`.

    Raises:
        ValueError: the shapes differ, `rows` is not a multiple of `m`, or a group does not keep exactly `n`.

    Example:

    >>> gather_kept(np.array([[5], [6], [7], [8]]), np.array([[0], [1], [0], [1]]), n=2, m=4).ravel()
    array([6, 8])
    """
    values = np.ascontiguousarray(values)
    indices = mask_to_indices(mask, n, m)
    groups, columns = indices.shape
    if values.shape != (groups * m, columns):
        raise ValueError(f"values {values.shape} and mask {(groups * m, columns)} must have the same shape.")
    kept = np.empty((groups, n, columns), values.dtype)
    for some, places in _kept_places(indices, n, m):
        block = values[some.start * m : some.stop * m].reshape(-1)
        for k, place in enumerate(places):
            kept[some, k] = block.take(place)
    return kept.reshape(groups * n, columns)


def scatter_kept(kept, mask, n, m):
    """Put the values of `gather_kept` back where the mask is set, with zeros elsewhere.

    Args:
        kept: array `[rows * n / m, columns]`.
        mask: array `[rows, columns]`, not zero where a value is kept; exactly `n` in every `m` consecutive rows.
        n: values kept per group.
        m: group size.

    Returns:
        Array `[rows, columns]` of the type of `kept`.

    Raises:
        ValueError: the shapes do not belong together, or a group does not keep exactly `n`.

    Example:

    >>> scatter_kept(np.array([[6], [8]]), np.array([[0], [1], [0], [1]]), n=2, m=4).ravel()
    array([0, 6, 0, 8])
    """
    kept = np.asarray(kept)
    indices = mask_to_indices(mask, n, m)
    groups, columns = indices.shape
    if kept.shape != (groups * n, columns):
        raise ValueError(
            f"a {n}:{m} mask {(groups * m, columns)} keeps values {(groups * n, columns)}, got {kept.shape}."
        )
    kept = kept.reshape(groups, n, columns)
    values = np.zeros((groups * m, columns), kept.dtype)
    for some, places in _kept_places(indices, n, m):
        block = values[some.start * m : some.stop * m].reshape(-1)
        for k, place in enumerate(places):
            block[place] = kept[some, k]
    return values


def enumerative_bits(n, m):
    """Return the bits per weight of a mask whose patterns are equally likely, `log2(comb(m, n)) / m`.

    No code needs fewer on average; `pack_patterns` comes close to it.

    Example:

    >>> round(enumerative_bits(2, 4), 4)
    0.6462
    """
    return math.log2(math.comb(m, n)) / m


@functools.cache
def _pattern_numbers(n, m):
    """The patterns as binary numbers, position 0 the lowest bit, in the order of their indices."""
    return (pattern_table(n, m) @ 2 ** np.arange(m)).astype(np.min_scalar_type(2**m - 1))


def _index_dtype(n, m):
    return np.min_scalar_type(len(pattern_table(n, m)) - 1)


def _groups(rows, m):
    if rows % m:
        raise ValueError(f"groups of {m} consecutive rows need a multiple of {m} rows, got {rows} rows.")
    return rows // m


def _checked_mask(mask, n, m):
    """Return the mask as bool in row-major memory once it is certain that every group keeps exactly `n`."""
    pattern_table(n, m)
    mask = np.ascontiguousarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"a mask has the shape [rows, columns], got {mask.shape}.")
    mask = mask if mask.dtype == bool else mask != 0
    rows, columns = mask.shape
    counts = mask.view(np.uint8).reshape(_groups(rows, m), m, columns).sum(axis=1, dtype=np.uint8)
    wrong = counts != n
    if wrong.any():
        group, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{wrong.sum()} of {wrong.size} groups do not keep exactly {n} of {m}; the first, rows {group * m} to "
            f"{group * m + m - 1} of column {column}, keeps {counts[group, column]}."
        )
    return mask


def _stripes(groups, columns, m):
    """Slices over the groups of a matrix, each of about `_CHUNK` weights but not less than 64 rows."""
    step = max(64, _CHUNK // max(columns, 1)) // m
    return [slice(start, min(start + step, groups)) for start in range(0, groups, step)]


def _kept_places(indices, n, m):
    """Yield, stripe by stripe, the slice of groups and a generator over `k = 0 ... n - 1` of where in the flattened
    stripe the `k`-th kept value of each group stands."""
    groups, columns = indices.shape
    positions = np.nonzero(pattern_table(n, m))[1].reshape(-1, n)
    for some in _stripes(groups, columns, m):
        corner = np.arange(some.stop - some.start)[:, None] * (m * columns) + np.arange(columns)
        yield some, ((position * columns).take(indices[some]) + corner for position in positions.T)
