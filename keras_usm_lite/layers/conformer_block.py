"""`ConformerBlock`: one block of a USM encoder, every pointwise projection compressible."""

import keras

from keras_usm_lite.layers.compressed_kernel import compression_config, resolve_compression
from keras_usm_lite.layers.feed_forward import FeedForward
from keras_usm_lite.layers.light_conv import LightConv
from keras_usm_lite.layers.relative_attention import RelativeSelfAttention


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class ConformerBlock(keras.layers.Layer):
    """Feed-forward, attention, convolution, feed-forward.

    ```
    x = x + 1/2 FeedForward(x)
    x = x + RelativeSelfAttention(Norm(x))
    x = x + LightConv(x)
    x = x + 1/2 FeedForward(x)
    y = Norm(x)
    ```

    With width d the matrices hold `23 d^2` weights (feed-forward 16, attention 4, convolution 3) and the depthwise
    kernel `k d`.

    Shapes: `[batch, frames, dim] -> [batch, frames, dim]`. A Keras mask `[batch, frames]` (True = real frame) keeps
    padding out of attention and convolution.

    Args:
        num_heads: attention heads.
        kernel_size: frames seen by the depthwise convolution.
        chunk_size: frames per attention chunk, None for full attention.
        causal_conv: convolve over past frames only.
        ffn_multiplier: hidden width of the feed-forward modules as a multiple of the width.
        dropout: dropout rate.
        quantization, sparsity: compression of all pointwise projections, see `QuantDense`.

    Raises:
        ValueError: a size that is no positive integer, heads that do not divide the width into even sizes, or a width
            that the sparsity pattern does not divide.

    Source: Conformer (arXiv 2005.08100), section 2.4; USM (arXiv 2303.01037), section 3.1.

    Example:

    >>> block = ConformerBlock(num_heads=2, kernel_size=5, quantization="int4", sparsity="2:4")
    >>> tuple(block(keras.ops.ones((1, 10, 8))).shape)
    (1, 10, 8)
    """

    def __init__(
        self,
        num_heads,
        kernel_size,
        chunk_size=None,
        causal_conv=False,
        ffn_multiplier=4,
        dropout=0.1,
        quantization=None,
        sparsity=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.chunk_size = chunk_size
        self.causal_conv = causal_conv
        self.ffn_multiplier = ffn_multiplier
        self.dropout = dropout
        resolve_compression(self, quantization, sparsity)
        self.supports_masking = True
        dtype = self.dtype_policy
        shared = {"quantization": self.quantization, "sparsity": self.sparsity, "dtype": dtype}
        norm = {"epsilon": 1e-5, "dtype": dtype}
        self.ffn_start = FeedForward(ffn_multiplier, dropout, name="ffn_start", **shared)
        self.attention_norm = keras.layers.LayerNormalization(name="attention_norm", **norm)
        self.attention = RelativeSelfAttention(num_heads, chunk_size, name="attention", **shared)
        self.drop = keras.layers.Dropout(dropout, name="dropout", dtype=dtype)
        self.conv = LightConv(kernel_size, causal_conv, dropout, name="conv", **shared)
        self.ffn_end = FeedForward(ffn_multiplier, dropout, name="ffn_end", **shared)
        self.norm = keras.layers.LayerNormalization(name="norm", **norm)

    def build(self, input_shape):
        """Build the modules for the width of the input."""
        for layer in (self.ffn_start, self.attention_norm, self.attention, self.conv, self.ffn_end, self.norm):
            layer.build(input_shape)

    def call(self, inputs, mask=None, training=None):
        """Apply the block; `mask` `[batch, frames]` marks real frames."""
        x = inputs + 0.5 * self.ffn_start(inputs, training=training)
        attended = self.attention(self.attention_norm(x), mask=mask, training=training)
        x = x + self.drop(attended, training=training)
        x = x + self.conv(x, mask=mask, training=training)
        x = x + 0.5 * self.ffn_end(x, training=training)
        return self.norm(x)

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        return input_shape

    def get_config(self):
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "kernel_size": self.kernel_size,
            "chunk_size": self.chunk_size,
            "causal_conv": self.causal_conv,
            "ffn_multiplier": self.ffn_multiplier,
            "dropout": self.dropout,
            **compression_config(self),
        }
