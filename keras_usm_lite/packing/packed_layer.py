"""One compressed layer as arrays: what `save_packed` writes and `load_packed` reads back."""

import dataclasses

import numpy as np
from keras import ops

from keras_usm_lite.core.quantize import dequantize
from keras_usm_lite.packing.bits import transposed
from keras_usm_lite.packing.packed_entry import PackedEntry
from keras_usm_lite.packing.patterns import gather_kept, scatter_kept
from keras_usm_lite.packing.precision import check_scale, reduce, restore, round_scale
from keras_usm_lite.packing.streams import pack_codes, pack_mask, unpack_codes, unpack_mask

# State of a compressed layer that its packed form replaces; everything else is stored variable by variable.
PACKED_VARIABLES = (
    "kernel",
    "mask",
    "mask_fade",
    "bits",
    "scale_frozen",
    "kernel_scale",
    "kernel_zero_point",
    "scale_gain",
)


def describe(layer):
    """Return what a layer's configuration says about its packed form: fields of a `PackedEntry`."""
    rows, columns = layer.matrix_shape
    quantization, sparsity = layer.quantization, layer.sparsity
    return {
        "rows": rows,
        "columns": columns,
        "codebook": None if quantization is None else quantization.codebook,
        "scale_shape": None if quantization is None else tuple(layer.kernel_scale.shape),
        "n": None if sparsity is None else sparsity.n,
        "m": None if sparsity is None else sparsity.m,
    }


def pack_layer(layer, name, *, archive=False, masks="enumerative", scales="float32", others="float32"):
    """Return the arrays that determine a layer's effective kernel.

    * "codes" (quantized): uint8 stream of the numbers `(code - lowest) / step` of the survivors, output channel after
      output channel; `bits` bits each (see `packing.bits`), or coded (see `packing.entropy`)
    * "values" (not quantized): survivors in the same order `[outputs, survivors per output]`
    * "patterns" or "positions" (sparse): uint8 stream; see `packing.patterns`, `packing.positions`
    * "scale", and "zero_point" if asymmetric: `[groups, outputs]`

    Args:
        layer: a `CompressedKernel` layer.
        name: its path.
        archive, masks, scales, others: as for `save_packed`.

    Returns:
        `(entry, arrays)`: a `PackedEntry`, and a dict of NumPy arrays.

    Raises:
        ValueError: the mask is not made yet, still fading, the layer is in a float warm-up, or a number does not fit
            the chosen precision.
    """
    try:
        return _pack(layer, name, archive, masks, scales, others)
    except ValueError as error:
        raise ValueError(f"Layer {name!r}: {error}") from error


def _pack(layer, name, archive, masks, scales, others):
    about, arrays, mask = {"name": name, "bits": layer.active_bits, **describe(layer)}, {}, None
    if layer.sparsity is not None:
        mask = _final_mask(layer)
        about["masks"], stream = pack_mask(mask, about["n"], about["m"], archive, masks)
        arrays["positions" if about["masks"] == "positions" else "patterns"] = stream
    if layer.quantization is None:
        kept = transposed(_kept(layer.masked_kernel(), mask, layer.sparsity))
        parts = reduce(np.ascontiguousarray(kept, np.float32), others)
        arrays |= {f"values{suffix}": part for suffix, part in parts.items()}
        return PackedEntry(**about, values=arrays["values"].dtype.name), arrays
    codes, scale, *zero_point = layer.quantized_kernel()
    arrays["scale"] = round_scale(_float32(scale), scales)
    if zero_point:
        arrays["zero_point"] = _float32(zero_point[0])
        _check_zero_point(arrays["zero_point"])
    entry = PackedEntry(**about, scales=scales, codes="bits")
    form, arrays["codes"] = pack_codes(_kept(codes, mask, layer.sparsity), entry, archive)
    return dataclasses.replace(entry, codes=form), arrays


def unpack_layer(layer, entry, arrays):
    """Set a layer's variables so that its effective kernel is the packed one, bit for bit.

    The latent kernel becomes the dequantized kernel and the scale is frozen.

    Args:
        layer: a built layer of which `describe` says what the entry says.
        entry: a `PackedEntry`.
        arrays: arrays of the types and shapes of `entry.arrays()`.

    Raises:
        ValueError: a stream that is damaged or holds what it cannot hold.
    """
    mask = None
    if entry.n is not None:
        mask = unpack_mask(arrays[entry.mask_key], entry)
        layer.mask.assign(mask.astype(np.float32))
        layer.mask_fade.assign(0.0)
    if not entry.quantized:
        parts = {key.removeprefix("values"): array for key, array in arrays.items() if key.startswith("values")}
        layer.assign_matrix(_spread(transposed(restore(parts, "float32")), mask, entry))
        return
    scale, zero_point = arrays["scale"].astype(np.float32), arrays.get("zero_point")
    check_scale(scale)
    codes = _spread(unpack_codes(arrays["codes"], entry), mask, entry)
    if zero_point is not None:
        _check_zero_point(zero_point)
        layer.kernel_zero_point.assign(zero_point)
        if mask is not None:  # a pruned weight has the code that stands for zero
            rows = np.repeat(zero_point.astype(np.int8), entry.rows // len(zero_point), axis=0)
            codes = np.where(mask, codes, rows)
    layer.assign_matrix(dequantize(codes, scale, zero_point))
    layer.bits.assign(float(entry.bits))
    layer.set_frozen_scale(scale, arrays.get("zero_point"))


def _final_mask(layer):
    if ops.convert_to_numpy(layer.mask_fade) != 0:
        raise ValueError("its pruned weights are still fading out. Finish the mask decay before packing.")
    if not layer.mask_made:
        raise ValueError(
            f"its mask does not obey {layer.sparsity} yet. Train with callbacks.NMPruning, or call "
            "usm.update_masks(model) to prune at once."
        )
    return ops.convert_to_numpy(layer.mask) != 0


def _kept(matrix, mask, sparsity):
    matrix = ops.convert_to_numpy(matrix)
    return matrix if mask is None else gather_kept(matrix, mask, sparsity.n, sparsity.m)


def _spread(kept, mask, entry):
    return kept if mask is None else scatter_kept(kept, mask, entry.n, entry.m)


def _check_zero_point(zero_point):
    if not ((zero_point >= -128) & (zero_point <= 127) & (zero_point == np.rint(zero_point))).all():
        raise ValueError("a zero point is not a whole number from -128 to 127.")


def _float32(tensor):
    return np.ascontiguousarray(ops.convert_to_numpy(tensor), np.float32)
