"""What LiteRT can run, and how a trained kernel goes into a `.tflite` file."""

import numpy as np
from keras import ops

from keras_usm_lite.core.quantize import code_range
from keras_usm_lite.export.bake import plain_layer
from keras_usm_lite.export.offset_dense import OffsetDense
from keras_usm_lite.rewrite import layer_path

# Widths of the integer weights that LiteRT's operation has, by the kind of layer. (Two-bit convolutions load, but
# their results are not numbers.) Keras' embedding becomes GATHER, whose table stays float.
LITERT_BITS = {
    "dense": (2, 4, 8),  # FULLY_CONNECTED
    "einsum": (2, 4, 8),  # FULLY_CONNECTED
    "convolution": (4, 8),  # CONV_2D
    "depthwise": (8,),  # DEPTHWISE_CONV_2D
    "batched einsum": (),
    "convolution 3d": (),
    "embedding": (),
}


def litert_problem(kind, quantization, sparsity, rows):
    """Return why LiteRT cannot run a kernel at the width asked for, with the nearest thing that works; or None.

    Args:
        kind: from `layers.kernel_kinds.layer_kind`.
        quantization: a `QuantizationConfig` or None.
        sparsity: a `SparsityConfig` or None.
        rows: inputs of the kernel.

    Example:

    >>> import keras_usm_lite as usm
    >>> litert_problem("dense", usm.QuantizationConfig(3), None, 64)
    'LiteRT has no 3-bit kernel; use bits=4'
    """
    if quantization is None:
        return None
    if not LITERT_BITS[kind]:
        return f"LiteRT has no integer kernel for this kind of layer ({kind}); use quantization=None"
    if quantization.block_size is not None:
        return f"LiteRT has one scale per output channel, not one per {quantization.block_size}; use block_size=None"
    if quantization.activations == "static":
        return "LiteRT quantizes activations dynamically for these kernels; use activations='dynamic'"
    bits = _stored_bits(kind, quantization.bits, _operand_range(kind, quantization, sparsity), rows)
    if bits == max(quantization.bits, 2):
        return None
    if bits is None:
        return f"its integers do not fit into 8 bits ({quantization.codebook} codebook); use codebook='symmetric'"
    if quantization.codebook in ("midrise", "asymmetric") and quantization.bits in LITERT_BITS[kind]:
        return f"{quantization.codebook} {quantization.bits}-bit codes need {bits} bits here; use codebook='symmetric'"
    if quantization.bits == 2 and kind == "dense":
        return f"LiteRT's 2-bit kernel needs inputs in multiples of 4, not {rows}; use bits=4"
    return f"LiteRT has no {quantization.bits}-bit {'' if kind == 'dense' else kind + ' '}kernel; use bits={bits}"


class LiteRTKernel:
    """One trained kernel and the way it goes into the file.

    Attributes:
        path: the layer's path.
        values: float32 `[outputs, inputs]`, the matrix in the float file.
        operand: the integers it consists of, or None for a float matrix.
        scale: float32 `[outputs, 1]`.
        bits: width of the integers in the file; None for a float matrix.
        widened: None, or a phrase that says that they take more bits than they were trained with.

    Raises:
        ValueError: a kernel that LiteRT cannot run as integers at any width.
    """

    def __init__(self, layer):
        self.path, self.kind = layer_path(layer), layer.kernel_kind
        self.operand = self.scale = self.bits = self.widened = None
        values = ops.convert_to_numpy(layer.effective_kernel())
        config = layer.quantization
        if config is not None and config.block_size is not None:
            raise ValueError(
                f"Layer {self.path!r} has one scale per {config.block_size} inputs; LiteRT runs one scale "
                "per output channel. Train with block_size=None for LiteRT, or use save_packed."
            )
        if config is not None and LITERT_BITS[self.kind]:
            operand, scale, offset = _centred(layer)
            values = values if offset is None else (operand * scale).astype(np.float32)
            self.operand, self.scale = operand.T, np.broadcast_to(scale.T, (operand.shape[1], 1))
            self.bits = _stored_bits(self.kind, layer.active_bits, (operand.min(), operand.max()), len(operand))
            if self.bits is None:
                raise ValueError(
                    f"Layer {self.path!r} has integers from {operand.min()} to {operand.max()}; LiteRT's widest "
                    "weights hold -127 to 127. Train with codebook='symmetric' for LiteRT, or use save_packed."
                )
            if self.bits > max(layer.active_bits, 2):
                self.widened = f"{config.codebook} {layer.active_bits}-bit codes as {self.bits}-bit integers"
        self.values = values.T  # TFLite keeps [outputs, inputs]

    def integer_range(self, shape, factor):
        """The range that ai-edge-quantizer divides into integers, as the tensor's shape needs it: the trained scale.

        `factor` is what the converter multiplied into the matrix.
        """
        bound = factor * self.scale * ((1 << (self.bits - 1)) - 1)
        channels = len(shape) - 1 if self.kind == "depthwise" else 0
        bound = bound.reshape([-1 if axis == channels else 1 for axis in range(len(shape))])
        return {"min": -bound, "max": bound}


def litert_layer(layer):
    """Return the float layer that a compressed layer becomes before conversion, and how it is filled; or None.

    Codes that are not centred on zero become an `OffsetDense`; everything else is as `bake` makes it.
    """
    if not _has_offset(layer):
        return plain_layer(layer)
    dense = OffsetDense(layer.units, layer.activation, layer.use_bias, name=layer.name, dtype=layer.dtype_policy)
    return dense, lambda built: _fill_offset(layer, built)


def _fill_offset(layer, dense):
    operand, scale, offset = _centred(layer)
    dense.kernel.assign((operand * scale).astype(np.float32))
    dense.offset.assign(np.broadcast_to(offset[0], (layer.units,)))
    if layer.use_bias:
        dense.bias.assign(ops.convert_to_numpy(layer.bias))


def _has_offset(layer):
    """True for a dense layer whose codes run as narrow integers plus a rank-1 correction."""
    config = getattr(layer, "quantization", None)
    if config is None or config.block_size is not None or not hasattr(layer, "units"):
        return False
    return config.codebook in ("asymmetric", "midrise") and layer.sparsity is None  # a pruned weight must stay zero


def _centred(layer):
    """Return `(operand, scale, offset)` with `effective kernel = operand * scale + offset`; offset None for zero."""
    codes, scale, *zero_point = (ops.convert_to_numpy(part) for part in layer.quantized_kernel())
    codes = codes.astype(np.int32)
    if not _has_offset(layer):
        return codes - (zero_point[0].astype(np.int32) if zero_point else 0), scale, None
    if zero_point:
        return codes, scale, -scale * zero_point[0]
    return (codes - 1) // 2, 2 * scale, scale


def _operand_range(kind, quantization, sparsity):
    """The range that the integers can have at worst, before there are any."""
    lowest, highest = code_range(quantization.bits, quantization.codebook)
    with_offset = kind == "dense" and sparsity is None
    if quantization.codebook == "midrise" and with_offset:
        return (lowest - 1) // 2, (highest - 1) // 2
    if quantization.codebook == "asymmetric" and not with_offset:
        return lowest - highest, highest - lowest
    return lowest, highest


def _stored_bits(kind, bits, operand_range, rows):
    """Return the narrowest width of LiteRT's that holds the integers; None if there is none."""
    low, high = operand_range
    for width in LITERT_BITS[kind]:
        lowest = -127 if width == 8 else -(1 << (width - 1))  # LiteRT's 8-bit weights leave -128 out
        divisible = width != 2 or rows % 4 == 0  # the 2-bit kernel reads whole bytes
        if width >= min(bits, 8) and divisible and lowest <= low and high < 1 << (width - 1):
            return width
    return None
