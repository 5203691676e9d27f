"""From float weights to integer codes `round(w / scale + zero_point)` and back, `(codes - zero_point) * scale`."""

from keras import ops

CODEBOOKS = ("symmetric", "full", "midrise", "asymmetric")
WIDEST_BITS = 8  # above, weights are floats: the warm-up of a bit schedule


def code_range(bits, codebook="symmetric"):
    """Return the smallest and the largest integer code.

    * symmetric: `-(2^(b-1) - 1) .. 2^(b-1) - 1`, the paper's codes (2 bits: ternary -1, 0, 1)
    * full, asymmetric: `-2^(b-1) .. 2^(b-1) - 1` (2 bits: -2, -1, 0, 1)
    * midrise: the odd integers `-(2^b - 1) .. 2^b - 1` (2 bits: -3, -1, 1, 3, which with half the scale are the
      four levels -1.5, -0.5, 0.5, 1.5; 1 bit: -1, 1); 0 is left free for pruned weights

    Args:
        bits: bits per weight, an int or a scalar tensor.
        codebook: "symmetric", "full", "midrise" or "asymmetric".

    Returns:
        The pair `(lowest, highest)`.

    Source: google/praxis `quantization/operations.py` (symmetric, asymmetric).

    Example:

    >>> code_range(2, "symmetric"), code_range(2, "full"), code_range(2, "midrise")
    ((-1, 1), (-2, 1), (-3, 3))
    """
    if codebook == "midrise":
        highest = 2**bits - 1
        return -highest, highest
    highest = 2 ** (bits - 1) - 1
    return (-highest if codebook == "symmetric" else -highest - 1), highest


def straight_through(soft, hard):
    """Return `hard` in the forward pass and pass the gradient to `soft` (straight-through estimator).

    Example:

    >>> float(straight_through(0.4, 1.0))
    1.0
    """
    hard = ops.stop_gradient(ops.convert_to_tensor(hard))
    return _value_of_second(ops.convert_to_tensor(soft), hard)


@ops.custom_gradient
def _value_of_second(soft, hard):
    """`hard`, to the last bit and without a pass over the weights, which soft + (hard - soft) would not be."""

    def gradient(*inputs, upstream=None):
        (upstream,) = inputs if upstream is None else (upstream,)
        return upstream, ops.zeros_like(upstream)

    return hard, gradient


def scale_gradient(value, factor):
    """Return `value`, to the last bit, with its gradient multiplied by a factor.

    Example:

    >>> float(scale_gradient(0.3, 0.01)) == float(ops.convert_to_tensor(0.3))
    True
    """
    value = ops.convert_to_tensor(value)
    return ops.stop_gradient(value) + factor * (value - ops.stop_gradient(value))


def learned_scale_factor(weights_per_scale, bits, codebook="symmetric"):
    """Return `1 / sqrt(N Q)`, which makes the relative steps of a learned scale as large as those of the weights.

    `N` weights share the scale and `Q` is the highest code. Above 8 bits, in a float warm-up, it is 0: nothing is
    rounded, so the gradient of the scale is noise.

    Source: LSQ (arXiv 1902.08153), section 2.2.

    Example:

    >>> float(learned_scale_factor(7, ops.convert_to_tensor(4.0)))  # 7 weights, highest code 7
    0.1428571492433548
    """
    factor = 1.0 / ops.sqrt(ops.cast(weights_per_scale * code_range(bits, codebook)[1], "float32"))
    return ops.where(ops.convert_to_tensor(bits) > WIDEST_BITS, 0.0, factor)


def expand_scale(scale, rows):
    """Repeat a scale (or zero point) `[groups, columns]` so that it broadcasts against a kernel of `rows` rows.

    One group (whole channels, whole tensor) broadcasts as it is; `g` groups serve `rows / g` consecutive rows each.

    Example:

    >>> [float(s) for s in expand_scale(ops.convert_to_tensor([[1.0], [2.0]]), 4)[:, 0]]
    [1.0, 1.0, 2.0, 2.0]
    """
    if scale is None or len(scale.shape) < 2 or scale.shape[-2] in (1, rows):
        return scale
    return ops.repeat(scale, rows // scale.shape[-2], axis=-2)


def continuous_codes(weights, scale, zero_point=None):
    """Return `weights / scale + zero_point`, the codes before rounding.

    Example:

    >>> float(continuous_codes([[1.0]], [[0.5]])[0, 0])
    2.0
    """
    weights = ops.convert_to_tensor(weights)
    rows = weights.shape[-2] if len(weights.shape) > 1 else 1
    codes = _divide(weights, expand_scale(ops.convert_to_tensor(scale, dtype="float32"), rows))
    return codes if zero_point is None else codes + expand_scale(zero_point, rows)


@ops.custom_gradient
def _divide(weights, scale):
    """`weights / scale`, with a gradient of the scale that costs TensorFlow two passes over the weights, not five."""

    def gradient(*inputs, upstream=None):
        (upstream,) = inputs if upstream is None else (upstream,)
        to_weights = upstream / scale
        to_scale = to_weights * weights
        rank = len(to_scale.shape)
        sizes = (1,) * (rank - len(scale.shape)) + tuple(scale.shape)
        shared = [axis for axis, size in enumerate(sizes) if size == 1]
        if shared:
            to_scale = ops.sum(to_scale, axis=shared, keepdims=True)
        return to_weights, -ops.reshape(to_scale, scale.shape) / scale

    return weights / scale, gradient


def round_codes(codes, bits, codebook="symmetric"):
    """Round continuous codes to the nearest code (half up, as the paper's code does) and clip to the code range.

    Example:

    >>> [float(c) for c in round_codes([-9.2, 0.5, 2.4], bits=4)]
    [-7.0, 1.0, 2.0]
    >>> [float(c) for c in round_codes([-9.2, 0.5, 2.4], bits=2, codebook="midrise")]
    [-3.0, 1.0, 3.0]
    """
    codes = ops.convert_to_tensor(codes)
    nearest = 2.0 * ops.floor(codes / 2.0) + 1.0 if codebook == "midrise" else ops.floor(codes + 0.5)
    return ops.clip(nearest, *code_range(bits, codebook))


def quantize(weights, scale, zero_point=None, *, bits, codebook="symmetric"):
    """Return the codes `clip(floor(w / scale + zero_point + 1/2), lowest, highest)`.

    Args:
        weights: float tensor `[..., rows, columns]`.
        scale: positive float32 tensor that broadcasts against `weights`.
        zero_point: None (zero), or a tensor that broadcasts against `weights`.
        bits: bits per weight, an int or a scalar tensor.
        codebook: which integers are codes, see `code_range`.

    Returns:
        Tensor of integer-valued floats; cast it to int8 to store it.

    Source: arXiv 2203.15952, section 2; google/praxis `quantization/operations.py`.

    Example:

    >>> [float(c) for c in quantize([0.9, -0.2, 0.1], 0.1, bits=4)]
    [7.0, -2.0, 1.0]
    """
    return round_codes(continuous_codes(weights, scale, zero_point), bits, codebook)


def train_codes(weights, scale, zero_point=None, *, bits, codebook="symmetric", mask=None, clip_gradient=False):
    """Return the codes of `quantize` with a gradient: straight through the rounding.

    Forward `q = round_codes(u)` with `u = w / s + z`; backward `dq/du = 1`, or, with `clip_gradient` (LSQ),
    `1[lowest <= u <= highest]`. Scale and weights receive their gradients through `u`. The forward value is exactly
    the integer, so training and serving multiply by the same numbers. Above 8 bits, in a float warm-up, codes are
    neither rounded nor clipped: `q = u`.

    Args:
        weights: float tensor `[rows, columns]`, pruned weights already zero.
        scale: tensor `[groups, columns]`.
        zero_point: None or a tensor of the shape of `scale`.
        bits: bits per weight, an int or a scalar tensor.
        codebook: see `code_range`.
        mask: None or 0/1 tensor; pruned weights get the code that stands for zero even in a codebook without zero.
        clip_gradient: no gradient to weights outside the code range.

    Returns:
        Tensor of integer-valued floats.

    Source: arXiv 2203.15952 (straight-through, native integers); LSQ: arXiv 1902.08153, equations 1-3.

    Example:

    >>> [float(q) for q in train_codes([[0.9], [-0.2]], [[0.1]], bits=4)[:, 0]]
    [7.0, -2.0]
    """
    soft = continuous_codes(weights, scale, zero_point)
    hard = round_codes(soft, bits, codebook)
    if codebook == "midrise" and mask is not None:
        hard = hard * mask
    as_float = ops.convert_to_tensor(bits) > WIDEST_BITS
    if clip_gradient:
        lowest, highest = code_range(bits, codebook)
        # Not the gradient of `clip`: at its bounds, where a channel's largest weight often is, backends differ.
        inside = ops.logical_or(as_float, ops.logical_and(soft >= lowest, soft <= highest))
        soft = ops.where(inside, soft, ops.stop_gradient(ops.clip(soft, lowest, highest)))
    return straight_through(soft, ops.where(as_float, soft, hard))


def dequantize(codes, scale, zero_point=None):
    """Return `(codes - zero_point) * scale` in float32.

    Args:
        codes: integer tensor `[..., rows, columns]`.
        scale: tensor that broadcasts against `codes`, or one row per group of consecutive rows.
        zero_point: None (zero), or a tensor of the shape of `scale`.

    Returns:
        float32 tensor of the shape of `codes`.

    Example:

    >>> [float(w) for w in dequantize([4, -2], 0.25)]
    [1.0, -0.5]
    """
    codes = ops.cast(codes, "float32")
    rows = codes.shape[-2] if len(codes.shape) > 1 else 1
    if zero_point is not None:
        codes = codes - expand_scale(zero_point, rows)
    return codes * expand_scale(ops.convert_to_tensor(scale, dtype="float32"), rows)
