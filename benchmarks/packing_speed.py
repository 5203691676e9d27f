"""How fast kernels of integer codes are packed and unpacked, in MB of the float32 kernel per second, on one core.

    python benchmarks/packing_speed.py

Packing goes from an int8 code matrix and a mask to the bytes, unpacking from the bytes to the int8 code matrix in
row-major memory. Quantization is not included. NumPy runs these operations on one core.
"""

import statistics
import time

import numpy as np

from keras_usm_lite.packing.bits import pack_bits, transposed, unpack_bits
from keras_usm_lite.packing.patterns import (
    enumerative_bits,
    gather_kept,
    indices_to_mask,
    pack_patterns,
    pattern_table,
    scatter_kept,
    unpack_patterns,
    word_layout,
)
from keras_usm_lite.packing.positions import position_list_bits

ROWS = COLUMNS = 4096
REPEATS = 7
CASES = [("int4 + 2:4", 4, (2, 4)), ("int8 + 1:4", 8, (1, 4)), ("int4 + 4:8", 4, (4, 8))]
CASES += [("int2 dense", 2, None), ("int3 dense", 3, None), ("int4 dense", 4, None)]


def pack_codes(codes, bits):
    """Return the codes, column after column, shifted by `2**(bits - 1)` to be unsigned."""
    return pack_bits(transposed(codes).ravel().view(np.uint8) + np.uint8(2 ** (bits - 1)), bits)


def unpack_codes(packed, bits, rows, columns):
    """Undo `pack_codes`."""
    codes = (unpack_bits(packed, bits, rows * columns) - np.uint8(2 ** (bits - 1))).view(np.int8)
    return transposed(codes.reshape(columns, rows))


def pack(codes, mask, bits, pattern):
    """Return the packed codes and, for an N:M pattern, the packed mask."""
    if pattern is None:
        return pack_codes(codes, bits), None
    return pack_codes(gather_kept(codes, mask, *pattern), bits), pack_patterns(mask, *pattern)


def unpack(packed_codes, packed_mask, bits, pattern):
    """Return the code matrix `[ROWS, COLUMNS]`."""
    if pattern is None:
        return unpack_codes(packed_codes, bits, ROWS, COLUMNS)
    mask = unpack_patterns(packed_mask, ROWS, COLUMNS, *pattern)
    n, m = pattern
    return scatter_kept(unpack_codes(packed_codes, bits, ROWS // m * n, COLUMNS), mask, n, m)


def megabytes_per_second(function, *arguments):
    """Return the median and the best rate of several runs, and the last result."""
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = function(*arguments)
        rates.append(ROWS * COLUMNS * 4 / 1e6 / (time.perf_counter() - start))
    return statistics.median(rates), max(rates), result


def main():
    rng = np.random.default_rng(0)
    print(f"float32 kernel [{ROWS}, {COLUMNS}], MB/s, median (best) of {REPEATS}")
    for name, bits, pattern in CASES:
        codes = rng.integers(1 - 2 ** (bits - 1), 2 ** (bits - 1), (ROWS, COLUMNS)).astype("int8")
        mask = None
        if pattern:
            n, m = pattern
            mask = indices_to_mask(rng.integers(0, len(pattern_table(n, m)), (ROWS // m, COLUMNS)), n, m)
            codes *= mask
        packing, best_packing, (packed_codes, packed_mask) = megabytes_per_second(pack, codes, mask, bits, pattern)
        unpacking, best_unpacking, restored = megabytes_per_second(unpack, packed_codes, packed_mask, bits, pattern)
        np.testing.assert_array_equal(restored, codes)
        size = packed_codes.size + (packed_mask.size if pattern else 0)
        print(
            f"{name}: packed {packing:.0f} ({best_packing:.0f}), unpacked {unpacking:.0f} ({best_unpacking:.0f}), "
            f"{8 * size / codes.size:.3f} bits per weight"
        )
    print("mask bits per weight: words of k groups in B bits | lower bound | list of positions")
    for n, m in [(1, 4), (2, 4), (4, 8), (1, 8), (2, 8), (1, 16), (8, 16)]:
        groups, bits = word_layout(n, m)
        print(
            f"{n}:{m}: k={groups}, B={bits}: {bits / groups / m:.4f} | {enumerative_bits(n, m):.4f} | "
            f"{position_list_bits(n, m):.4f}"
        )


if __name__ == "__main__":
    main()
