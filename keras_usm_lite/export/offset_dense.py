"""`OffsetDense`: a dense layer whose kernel is a small-integer matrix plus one constant per output."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class OffsetDense(keras.layers.Layer):
    """`y = activation(x @ kernel + sum(x) offset + bias)`.

    The kernel `W = kernel + 1 offset^T` is never formed: the second term is a rank-1 correction. So codes that are not
    centred on zero run on kernels for signed integers: `W = s (q - z)` has `kernel = s q`, `offset = -s z`; the four
    levels `{-3, -1, 1, 3} s` have `kernel = 2 s u` with `u` in `{-2, -1, 0, 1}`, and `offset = s`.

    Shapes: `[..., inputs] -> [..., units]`.

    Args:
        units: outputs.
        activation: as `keras.layers.Dense`.
        use_bias: add a bias.

    Example:

    >>> layer = OffsetDense(2, use_bias=False)
    >>> layer.build((None, 3))
    >>> layer.set_weights([keras.ops.zeros((3, 2)), keras.ops.convert_to_tensor([1.0, -1.0])])
    >>> [float(value) for value in layer(keras.ops.ones((1, 3)))[0]]
    [3.0, -3.0]
    """

    def __init__(self, units, activation=None, use_bias=True, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.supports_masking = True

    def build(self, input_shape):
        """Create kernel, offset and bias."""
        self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1], self.units))
        self.offset = self.add_weight(name="offset", shape=(self.units,), initializer="zeros")
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(self.units,), initializer="zeros")

    def call(self, inputs):
        """Multiply by the kernel and correct."""
        outputs = ops.matmul(inputs, self.kernel) + ops.sum(inputs, axis=-1, keepdims=True) * self.offset
        if self.use_bias:
            outputs = outputs + self.bias
        return self.activation(outputs)

    def compute_output_shape(self, input_shape):
        """`[..., inputs] -> [..., units]`."""
        return (*input_shape[:-1], self.units)

    def get_config(self):
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
        }
