"""`FeedForward`: the Conformer's half-step feed-forward module."""

import keras

from keras_usm_lite.layers.compressed_kernel import compression_config, resolve_compression
from keras_usm_lite.layers.quant_dense import QuantDense


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class FeedForward(keras.layers.Layer):
    """`down(dropout(swish(up(norm(x)))))`, to be added to `x` with weight 1/2.

    Shapes: `[batch, frames, dim] -> [batch, frames, dim]`.

    Args:
        multiplier: hidden width as a multiple of the input width.
        dropout: dropout rate after the activation and after the second projection.
        quantization, sparsity: compression of both projections, see `QuantDense`.

    Source: Conformer (arXiv 2005.08100), section 2.3.

    Example:

    >>> tuple(FeedForward()(keras.ops.ones((1, 5, 8))).shape)
    (1, 5, 8)
    """

    def __init__(self, multiplier=4, dropout=0.1, quantization=None, sparsity=None, **kwargs):
        super().__init__(**kwargs)
        self.multiplier = multiplier
        self.dropout = dropout
        resolve_compression(self, quantization, sparsity)
        self.supports_masking = True

    def build(self, input_shape):
        """Create the two projections for the width of the input."""
        dim = input_shape[-1]
        shared = {"quantization": self.quantization, "sparsity": self.sparsity, "dtype": self.dtype_policy}
        self.norm = keras.layers.LayerNormalization(epsilon=1e-5, name="norm", dtype=self.dtype_policy)
        self.up = QuantDense(dim * self.multiplier, activation="swish", name="up", **shared)
        self.down = QuantDense(dim, name="down", **shared)
        self.drop = keras.layers.Dropout(self.dropout, name="dropout", dtype=self.dtype_policy)
        self.norm.build(input_shape)
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], dim * self.multiplier))

    def call(self, inputs, training=None):
        """Transform each frame on its own."""
        x = self.up(self.norm(inputs), training=training)
        x = self.down(self.drop(x, training=training), training=training)
        return self.drop(x, training=training)

    def free_channels(self):
        """The hidden channels, for `permute_channels`."""
        return self.down, 1, [self.up]

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        return input_shape

    def get_config(self):
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "multiplier": self.multiplier,
            "dropout": self.dropout,
            **compression_config(self),
        }
