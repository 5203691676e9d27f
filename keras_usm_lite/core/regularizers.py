"""Penalties that pull a float kernel towards what it will become."""

from keras import ops

UNIFORM_KURTOSIS = 1.8


def quantization_error(weights, quantized):
    """Return `mean((w - w^)^2)`, the distance of a kernel from its quantized form.

    The quantized form is a constant: the gradient pulls each weight to its grid point.

    Args:
        weights: float tensor.
        quantized: the dequantized kernel, same shape.

    Returns:
        Scalar float32 tensor.

    Source: google/praxis `quant_loss_weight`.

    Example:

    >>> float(quantization_error([[1.0], [0.5]], [[1.0], [0.0]]))
    0.125
    """
    error = ops.cast(weights, "float32") - ops.stop_gradient(ops.cast(quantized, "float32"))
    return ops.mean(ops.square(error))


def kurtosis_error(weights, target=UNIFORM_KURTOSIS):
    """Return `mean_c (kurtosis_c - 1.8)^2`, the distance of each channel from a uniform distribution.

    `kurtosis = E[(w - mean)^4] / E[(w - mean)^2]^2` is 1.8 for a uniform distribution, which a uniform grid fits best,
    and 3 for a Gaussian one.

    Args:
        weights: float tensor `[rows, columns]`.
        target: kurtosis wanted.

    Returns:
        Scalar float32 tensor.

    Source: google/praxis `kurt_loss_weight`; arXiv 2002.07686.

    Example:

    >>> round(float(kurtosis_error([[-1.0], [1.0]])), 4)  # two equal peaks have kurtosis 1
    0.64
    """
    weights = ops.cast(weights, "float32")
    centred = weights - ops.mean(weights, axis=-2, keepdims=True)
    variance = ops.mean(ops.square(centred), axis=-2)
    fourth = ops.mean(ops.square(ops.square(centred)), axis=-2)
    kurtosis = fourth / ops.maximum(ops.square(variance), 1e-20)
    return ops.mean(ops.square(kurtosis - target))
