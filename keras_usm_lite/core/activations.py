"""Eight-bit activations: what an integer kernel sees of a float input."""

import numpy as np
from keras import ops

from keras_usm_lite.core.quantize import straight_through

LOWEST, HIGHEST = -128, 127
TINY = float(np.finfo(np.float32).tiny)  # what is below is zero to some processors and not to others


def input_range(inputs, axes=(-1,)):
    """Return the smallest and the largest input along `axes`, widened to contain zero.

    Example:

    >>> low, high = input_range(ops.convert_to_tensor([[0.5, 2.0]]))
    >>> float(low[0, 0]), float(high[0, 0])
    (0.0, 2.0)
    """
    inputs = ops.cast(inputs, "float32")
    low = ops.minimum(ops.min(inputs, axis=axes, keepdims=True), 0.0)
    high = ops.maximum(ops.max(inputs, axis=axes, keepdims=True), 0.0)
    return low, high


def affine_parameters(low, high):
    """Return scale and zero point of int8 codes for the range `[low, high]`, which contains zero.

    `s = (high - low) / 255` and `z = round(-128 - low / s)` or `round(127 - high / s)`, whichever end of the range is
    the larger one: its code is then hit best. An empty range has scale 1; one below the normal numbers is empty.

    Args:
        low, high: float32 tensors, `low <= 0 <= high`.

    Returns:
        `(scale, zero_point)`, float32; the zero point is an integer from -128 to 127, so zero has a code of its own.

    Source: the dynamic-range kernels of LiteRT (XNNPACK's "qd8" operands).

    Example:

    >>> scale, zero_point = affine_parameters(ops.convert_to_tensor(-1.0), ops.convert_to_tensor(1.55))
    >>> round(float(scale), 6), float(zero_point)
    (0.01, -28.0)
    """
    scale = (high - low) / (HIGHEST - LOWEST)
    scale = ops.where(scale < TINY, ops.ones_like(scale), scale)
    from_low, from_high = LOWEST - low / scale, HIGHEST - high / scale
    low_is_smaller = LOWEST + low / scale + HIGHEST + high / scale > 0
    zero_point = ops.where(low_is_smaller, from_low, from_high)
    return scale, ops.round(ops.clip(zero_point, LOWEST, HIGHEST))


def quantize_inputs(inputs, low, high):
    """Return inputs rounded to int8 codes and back, `(clip(round(x / s) + z, -128, 127) - z) s`.

    The gradient passes straight through.

    Args:
        inputs: float tensor `[..., inputs]`.
        low, high: range, tensors that broadcast against `inputs`: of each token for dynamic quantization, of the
            calibration data for static quantization.

    Returns:
        Tensor of the shape and type of `inputs`.

    Example:

    >>> x = ops.convert_to_tensor([[-1.0, 0.004, 1.55]])
    >>> [round(float(value), 4) for value in quantize_inputs(x, *input_range(x))[0]]
    [-1.0, 0.0, 1.55]
    """
    low, high = (ops.stop_gradient(ops.convert_to_tensor(end)) for end in (low, high))
    scale, zero_point = affine_parameters(low, high)
    wide = ops.cast(inputs, "float32")
    codes = ops.clip(ops.round(wide / scale) + zero_point, LOWEST, HIGHEST)
    return ops.cast(straight_through(wide, (codes - zero_point) * scale), inputs.dtype)
