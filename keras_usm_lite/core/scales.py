"""Scale estimators: how large one integer step is, per channel, per tensor or per block of inputs."""

from keras import ops

from keras_usm_lite.core.quantize import code_range, dequantize, quantize

# Fractions of the full range that the clip search tries. Two-bit codes need less than a third of the range of a
# Gaussian channel and less than a fifth of a Laplacian one, so the search must reach far below one half.
CLIP_FRACTIONS = tuple(round(1.0 - 0.02 * i, 2) for i in range(48))


def to_blocks(kernel, block_size):
    """View a kernel `[rows, columns]` as `[rows / block_size, block_size, columns]`; `None` leaves it as it is.

    Statistics are always taken along axis -2, so that one formula serves whole channels and sub-channels.

    Example:

    >>> tuple(to_blocks(ops.ones((8, 3)), 4).shape), tuple(to_blocks(ops.ones((8, 3)), None).shape)
    ((2, 4, 3), (8, 3))
    """
    if block_size is None:
        return kernel
    rows, columns = kernel.shape
    return ops.reshape(kernel, (rows // block_size, block_size, columns))


def scale_axes(per_tensor):
    """Return the axes that share one scale: inputs, or inputs and channels.

    Example:

    >>> scale_axes(per_tensor=False), scale_axes(per_tensor=True)
    ((-2,), (-2, -1))
    """
    return (-2, -1) if per_tensor else (-2,)


def absmax_scale(weights, bits, codebook="symmetric", per_tensor=False):
    """Return the scale (and zero point) that just covers the largest weight.

    Symmetric codebooks: `s = max|w| / highest code`. Asymmetric: `s = (max(w, 0) - min(w, 0)) / (2^b - 1)` with
    the integer zero point `z = round(lowest - min(w, 0) / s)`, so that zero has a code of its own and pruned
    weights stay zero.

    Args:
        weights: float tensor `[..., rows, columns]`, pruned weights already zero (they never move a maximum).
        bits: bits per weight, an int or a scalar tensor.
        codebook: "symmetric", "full", "midrise" or "asymmetric".
        per_tensor: one scale for the whole tensor instead of one per column.

    Returns:
        `(scale, zero_point)`: float32 tensors that broadcast against `weights`; `zero_point` is None unless the
        codebook is asymmetric. The scale of an all-zero channel is 1.

    Source: google/praxis `quantization/operations.py`; arXiv 2312.08553, section 2.

    Example:

    >>> scale, zero_point = absmax_scale([[0.7], [-0.3]], bits=4)
    >>> round(float(scale[0, 0]), 6), zero_point
    (0.1, None)
    """
    weights = ops.cast(weights, "float32")
    axes = scale_axes(per_tensor)
    lowest, highest = code_range(bits, codebook)
    if codebook == "asymmetric":
        low = ops.minimum(ops.min(weights, axis=axes, keepdims=True), 0.0)
        high = ops.maximum(ops.max(weights, axis=axes, keepdims=True), 0.0)
        scale = _nonzero((high - low) / ops.cast(highest - lowest, "float32"))
        return scale, ops.stop_gradient(ops.floor(lowest - low / scale + 0.5))
    return _nonzero(largest_magnitude(weights, axes) / ops.cast(highest, "float32")), None


def largest_magnitude(weights, axes):
    """Return `max|w|` over some axes, which stay with size 1.

    Its gradient goes to the largest weight, in equal parts to weights that are equally large. It is written out because
    TensorFlow takes eight passes over the weights for that of `max(abs(w))`, and this five.

    Example:

    >>> float(largest_magnitude(ops.convert_to_tensor([[0.5], [-2.0]]), (-2,))[0, 0])
    2.0
    """

    @ops.custom_gradient
    def largest(weights):
        magnitudes = ops.abs(weights)
        bound = ops.max(magnitudes, axis=axes, keepdims=True)

        def gradient(*inputs, upstream=None):
            (upstream,) = inputs if upstream is None else (upstream,)
            hits = ops.cast(ops.equal(magnitudes, bound), "float32")
            share = upstream / (_nonzero(bound) * ops.sum(hits, axis=axes, keepdims=True))
            return hits * (weights * share)

        return bound, gradient

    return largest(weights)


def mse_scale(weights, bits, codebook="symmetric", per_tensor=False, mask=None):
    """Return the clipped scale with the least squared error over the surviving weights.

    `s = c* . s_absmax` with `c* = argmin_c sum_kept (w - dequantize(quantize(w; c . s_absmax)))^2` over
    `CLIP_FRACTIONS`, separately for each scale. The zero point does not depend on `c`.

    Args:
        weights: float tensor `[..., rows, columns]`, pruned weights already zero.
        bits: bits per weight, an int or a scalar tensor.
        codebook: "symmetric", "full", "midrise" or "asymmetric".
        per_tensor: one scale for the whole tensor.
        mask: None, or a 0/1 tensor of the shape of `weights`; pruned weights do not count.

    Returns:
        `(scale, zero_point)` as `absmax_scale`.

    Source: clip search of arXiv 2305.16619, with a range wide enough for two bits.

    Example:

    >>> scale, _ = mse_scale([[0.1], [-0.1], [0.1], [-0.1], [0.3]], bits=2)
    >>> 0.1 < float(scale[0, 0]) < 0.15
    True
    """
    weights = ops.cast(weights, "float32")
    axes = scale_axes(per_tensor)
    full_scale, zero_point = absmax_scale(weights, bits, codebook, per_tensor)
    best_scale, best_error = full_scale, ops.full_like(full_scale, float("inf"))
    for fraction in CLIP_FRACTIONS:
        scale = full_scale * fraction
        codes = quantize(weights, scale, zero_point, bits=bits, codebook=codebook)
        error = weights - dequantize(codes, scale, zero_point)
        error = error if mask is None else error * mask
        error = ops.sum(ops.square(error), axis=axes, keepdims=True)
        best_scale = ops.where(error < best_error, scale, best_scale)
        best_error = ops.minimum(error, best_error)
    return best_scale, zero_point


def mean_scale(weights, per_tensor=False, mask=None):
    """Return the 1-bit scale `s = mean_kept |w|`: the least-squares code is `sign(w) . s`.

    Args:
        weights: float tensor `[..., rows, columns]`, pruned weights already zero.
        per_tensor: one scale for the whole tensor.
        mask: None, or a 0/1 tensor of the shape of `weights`.

    Returns:
        `(scale, None)` as `absmax_scale`.

    Source: arXiv 2406.02887.

    Example:

    >>> scale, _ = mean_scale([[1.0], [-3.0]])
    >>> float(scale[0, 0])
    2.0
    """
    weights = ops.cast(weights, "float32")
    axes = scale_axes(per_tensor)
    kept = ops.ones_like(weights) if mask is None else mask
    count = ops.maximum(ops.sum(kept, axis=axes, keepdims=True), 1.0)
    # |w| with a gradient of zero at pruned weights on every backend; that of JAX' abs is one
    magnitudes = weights * ops.stop_gradient(ops.sign(weights))
    return _nonzero(ops.sum(magnitudes, axis=axes, keepdims=True) / count), None


def estimate_scale(weights, mask=None, *, method, bits, codebook="symmetric", per_tensor=False, block_size=None):
    """Return scale and zero point of a whole kernel, one row per group of inputs.

    Args:
        weights: float tensor `[rows, columns]`, pruned weights already zero.
        mask: None or 0/1 tensor of the same shape.
        method: "absmax"; "mean" (the mean magnitude at one bit, absmax above); or "mse" (at one bit: the mean
            magnitude, its closed form).
        bits: bits per weight; an int for "mse", else an int or a scalar tensor.
        codebook: see `core.quantize.code_range`.
        per_tensor: one scale for everything, shape `[1, 1]`.
        block_size: None (shape `[1, columns]`), or inputs per scale (shape `[rows / block_size, columns]`).

    Returns:
        `(scale, zero_point)`, float32; `zero_point` is None unless the codebook is asymmetric.

    Example:

    >>> scale, _ = estimate_scale(ops.ones((8, 3)), method="absmax", bits=4, block_size=4)
    >>> tuple(scale.shape)
    (2, 3)
    """
    blocks = to_blocks(weights, block_size)
    kept = None if mask is None else to_blocks(mask, block_size)
    if method == "absmax":
        pair = absmax_scale(blocks, bits, codebook, per_tensor)
    elif method == "mean":
        wide, one_bit = absmax_scale(blocks, bits, codebook, per_tensor)[0], mean_scale(blocks, per_tensor, kept)[0]
        pair = ops.where(ops.convert_to_tensor(bits) > 1, wide, one_bit), None
    elif bits == 1:
        pair = mean_scale(blocks, per_tensor, kept)
    else:
        pair = mse_scale(blocks, bits, codebook, per_tensor, kept)
    if block_size is None:
        return pair
    return tuple(None if value is None else ops.squeeze(value, axis=-2) for value in pair)


def _nonzero(scale):
    """An all-zero channel gets scale 1, so that dividing by it is safe and its codes are all zero."""
    return ops.where(scale == 0, ops.ones_like(scale), scale)
