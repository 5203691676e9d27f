"""`bake`: a copy of a model with plain Keras layers that hold the effective kernels."""

import keras
from keras import ops

from keras_usm_lite.layers.compressed_layer import CompressedLayer
from keras_usm_lite.layers.kernel_kinds import kernel_of
from keras_usm_lite.layers.quant_dense import QuantDense
from keras_usm_lite.models.compressed_model import CompressedModel
from keras_usm_lite.rewrite import rewrite


def bake(model):
    """Return a copy of a model in which every compressed layer is the plain Keras layer with its effective kernel.

    The values are exactly what the compressed model multiplies by, so exporters and converters that know nothing of
    this package find the integer grid and the N:M zeros in the float weights. Inputs are not rounded any more: a
    simulation of int8 activations stays behind, for the integer runtime does it itself.

    Args:
        model: a built model with compressed layers.

    Returns:
        A model of the same class with float layers only; of a `CompressedModel`, the model inside.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), QuantDense(2, "int4")])
    >>> [type(layer).__name__ for layer in bake(model).layers]
    ['Dense']
    """
    baked = rewrite(model, plain_layer)
    return baked.model if isinstance(baked, CompressedModel) else baked


def plain_layer(layer):
    """Return the Keras layer that a compressed layer becomes and how it is filled, or None for other layers."""
    if isinstance(layer, CompressedLayer):
        return type(layer.layer).from_config(layer.layer.get_config()), lambda plain: _fill_inner(layer, plain)
    if isinstance(layer, QuantDense):
        dense = keras.layers.Dense(
            layer.units, activation=layer.activation, use_bias=layer.use_bias, name=layer.name, dtype=layer.dtype_policy
        )
        return dense, lambda plain: _fill_dense(layer, plain)
    return None


def _fill_inner(layer, plain):
    plain.set_weights(layer.layer.get_weights())
    kernel_of(plain).assign(ops.convert_to_numpy(layer.kernel_view.from_matrix(layer.effective_kernel())))


def _fill_dense(layer, plain):
    plain.kernel.assign(ops.convert_to_numpy(layer.effective_kernel()))
    if layer.use_bias:
        plain.bias.assign(ops.convert_to_numpy(layer.bias))
