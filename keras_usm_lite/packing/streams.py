"""The codes and the mask of one layer as byte streams, in each of the forms that a `PackedEntry` names."""

import numpy as np

from keras_usm_lite.packing.bits import pack_bits, transposed, unpack_bits
from keras_usm_lite.packing.entropy import decode, encode
from keras_usm_lite.packing.packed_entry import CODERS
from keras_usm_lite.packing.patterns import (
    indices_to_mask,
    mask_to_indices,
    pack_patterns,
    pattern_table,
    patterns_size,
    unpack_patterns,
)
from keras_usm_lite.packing.positions import pack_positions, unpack_positions


def pack_codes(kept, entry, archive):
    """Return how the codes of the survivors are stored, and their stream.

    The numbers `(code - lowest) / step` are listed output after output; `bits` bits each, or coded.

    Args:
        kept: int8 `[survivors per output, outputs]`.
        entry: a `PackedEntry`; its field `codes` does not matter.
        archive: True to code them if that is smaller.

    Returns:
        `("bits" | "range" | "zstd", uint8 array)`.
    """
    lowest, step = entry.grid
    numbers = (transposed(kept).ravel().astype(np.int16) - lowest) // step
    coded = encode(numbers, entry.alphabet, entry.plain_size("codes")) if archive else None
    return coded or ("bits", pack_bits(numbers, entry.bits))


def unpack_codes(stream, entry):
    """Read back the codes `[survivors per output, outputs]` that `pack_codes` wrote, int8.

    Raises:
        ValueError: the stream is damaged, or holds a number that stands for no code.
    """
    count = entry.kept_rows * entry.columns
    if entry.codes in CODERS:
        numbers = decode(stream, entry.codes, entry.alphabet, count)
    else:
        numbers = unpack_bits(stream, entry.bits, count)
        if numbers.max() >= entry.alphabet:
            raise ValueError(
                f"the number {numbers.max()} stands for no code of the {entry.codebook!r} codebook, which has "
                f"{entry.alphabet} codes of {entry.bits} bits."
            )
    lowest, step = entry.grid
    numbers = transposed(numbers.reshape(entry.columns, entry.kept_rows))
    return (numbers.astype(np.int16) * step + lowest).astype(np.int8)


def pack_mask(mask, n, m, archive, masks):
    """Return how an N:M mask is stored, and its stream.

    Args:
        mask: bool `[rows, columns]`.
        n: weights kept per group.
        m: group size.
        archive: True to code the patterns if that is smaller.
        masks: "enumerative" or "positions", the form without a coder.

    Returns:
        `("enumerative" | "positions" | "range" | "zstd", uint8 array)`.
    """
    if archive:
        digits = transposed(mask_to_indices(mask, n, m)).ravel()
        coded = encode(digits, len(pattern_table(n, m)), patterns_size(*mask.shape, n, m))
        if coded:
            return coded
    return masks, {"enumerative": pack_patterns, "positions": pack_positions}[masks](mask, n, m)


def unpack_mask(stream, entry):
    """Read back the bool mask `[rows, columns]` that `pack_mask` wrote.

    Raises:
        ValueError: the stream is damaged, or is no mask of the entry's pattern.
    """
    rows, columns, n, m = entry.rows, entry.columns, entry.n, entry.m
    if entry.masks in CODERS:
        digits = decode(stream, entry.masks, entry.patterns, entry.groups)
        return indices_to_mask(transposed(digits.reshape(columns, rows // m)), n, m)
    return {"enumerative": unpack_patterns, "positions": unpack_positions}[entry.masks](stream, rows, columns, n, m)
