"""Where the trained integers of a model are in a `.tflite` file: matched before conversion, compared after it."""

import numpy as np

from keras_usm_lite.compression import compressed_layers
from keras_usm_lite.export.litert_kernel import LiteRTKernel
from keras_usm_lite.export.litert_weights import read_litert_weights
from keras_usm_lite.export.parity_error import ParityError


def litert_kernels(model):
    """Return the `LiteRTKernel` of every compressed layer of a model."""
    return [LiteRTKernel(layer) for layer in compressed_layers(model)]


def match_kernels(weights, kernels):
    """Match the matrices of a float file with kernels by their values, which survive every renaming.

    For inputs of a fixed length the converter multiplies the half steps of a Conformer into the kernel before them.
    A power of two leaves the integers as they are and belongs to the scale.

    Args:
        weights: `read_litert_weights` of the float file.
        kernels: those that become integers.

    Returns:
        A list of `(weight, kernel, factor)`: the matrix in the file is the kernel times the factor. A layer that is
        used more than once may be in it more than once, each time with another factor.

    Raises:
        ParityError: a kernel is not in the file.
    """
    by_value = {}
    for kernel in kernels:
        by_value.setdefault(_key(kernel.values), []).append(kernel)
    matched = []
    for weight in weights:
        matches = by_value.get(_key(weight.values))
        if matches:
            kernel = matches.pop(0) if len(matches) > 1 else matches[0]
            matched.append((weight, kernel, np.ldexp(1.0, _exponent(weight.values) - _exponent(kernel.values))))
    missing = {kernel.path for kernel in kernels} - {kernel.path for _, kernel, _ in matched}
    if missing:
        raise ParityError(
            f"The converter changed or removed the kernels of {sorted(missing)}: they are not in the float .tflite "
            "file, so they cannot be stored as integers. It multiplies a BatchNormalization or Rescaling that follows "
            "a layer directly into the kernel; compress such layers with (None, None), or call what follows a kernel "
            "only behind an activation."
        )
    return matched


def check_integers(path, kernels):
    """Compare the integers in a `.tflite` file with the trained ones, value by value.

    Every kernel must be in the file with its scales, up to one power of two (see `match_kernels`), and the file must
    hold no other integers.

    Args:
        path: the file.
        kernels: `litert_kernels` of the model.

    Returns:
        How many integers were compared.

    Raises:
        ParityError: the integers or the scale of a layer are not in the file, or it holds integers of no layer.
    """
    stored = [weight for weight in read_litert_weights(path) if weight.codes is not None]
    unknown = {id(weight): weight for weight in stored}
    for kernel in kernels:
        if kernel.bits is None:
            continue
        same = [weight for weight in stored if _same_integers(weight, kernel)]
        if not same:
            raise ParityError(f"The file does not hold the {kernel.bits}-bit integers of layer {kernel.path!r}.")
        for weight in same:
            unknown.pop(id(weight), None)
    for weight in unknown.values():
        raise ParityError(f"The file holds {weight.bits}-bit integers of no layer of the model, in {weight.tensor!r}.")
    return sum(weight.codes.size for weight in stored)


def _same_integers(weight, kernel):
    if weight.bits != kernel.bits or not np.array_equal(weight.codes, kernel.operand):
        return False
    factor = np.ldexp(1.0, _exponent(weight.scale) - _exponent(kernel.scale))
    return np.allclose(weight.scale[:, None], factor * kernel.scale, atol=0)


def _key(matrix):
    """Shape and bits of a matrix, the same for all its multiples by a power of two."""
    return matrix.shape, np.ldexp(matrix, -_exponent(matrix)).tobytes()


def _exponent(matrix):
    return np.frexp(np.abs(matrix).max())[1]
