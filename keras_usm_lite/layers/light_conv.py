"""`LightConv`: the Conformer's light convolution module."""

import keras
from keras import ops

from keras_usm_lite.layers.compressed_kernel import compression_config, resolve_compression
from keras_usm_lite.layers.masking import zero_padding
from keras_usm_lite.layers.quant_dense import QuantDense


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class LightConv(keras.layers.Layer):
    """`pointwise(swish(norm(depthwise(glu(pointwise(norm(x)))))))`.

    `glu(a, b) = a * sigmoid(b)`; the depthwise convolution has kernel `k` along time and sees zeros beyond the ends of
    the utterance. Normalisation is layer normalisation: no statistics are shared between utterances, devices, or
    training and serving.

    Shapes: `[batch, frames, dim] -> [batch, frames, dim]`.

    Args:
        kernel_size: frames seen by the depthwise convolution.
        causal: see past frames only (streaming) instead of a centred window.
        dropout: dropout rate of the result.
        quantization, sparsity: compression of the two pointwise projections, see `QuantDense`.

    Source: Conformer (arXiv 2005.08100), section 2.2.

    Example:

    >>> tuple(LightConv(5)(ops.ones((1, 10, 8))).shape)
    (1, 10, 8)
    """

    def __init__(self, kernel_size, causal=False, dropout=0.1, quantization=None, sparsity=None, **kwargs):
        super().__init__(**kwargs)
        if kernel_size < 1:
            raise ValueError(f"kernel_size must be at least 1 frame, got {kernel_size!r}.")
        self.kernel_size = kernel_size
        self.causal = causal
        self.dropout = dropout
        resolve_compression(self, quantization, sparsity)
        self.supports_masking = True

    def build(self, input_shape):
        """Create the projections and the depthwise convolution for the width of the input."""
        batch, frames, dim = input_shape
        shared = {"quantization": self.quantization, "sparsity": self.sparsity, "dtype": self.dtype_policy}
        self.norm = keras.layers.LayerNormalization(epsilon=1e-5, name="norm", dtype=self.dtype_policy)
        self.expand = QuantDense(2 * dim, name="expand", **shared)
        self.depthwise = keras.layers.DepthwiseConv1D(
            self.kernel_size, use_bias=False, data_format="channels_last", name="depthwise", dtype=self.dtype_policy
        )
        self.conv_norm = keras.layers.LayerNormalization(epsilon=1e-5, name="conv_norm", dtype=self.dtype_policy)
        self.project = QuantDense(dim, name="project", **shared)
        self.drop = keras.layers.Dropout(self.dropout, name="dropout", dtype=self.dtype_policy)
        for layer in (self.norm, self.expand, self.conv_norm, self.project):
            layer.build(input_shape)
        self.depthwise.build((batch, None if frames is None else frames + self.kernel_size - 1, dim))

    def call(self, inputs, mask=None, training=None):
        """Convolve along time; `mask` `[batch, frames]` marks real frames."""
        before = self.kernel_size - 1 if self.causal else (self.kernel_size - 1) // 2
        x = ops.pad(self._gate(inputs, mask, training), ((0, 0), (before, self.kernel_size - 1 - before), (0, 0)))
        return self._convolve(x, training)

    def past_shapes(self, dim):
        """Return the shapes, without the batch, of what `step` remembers."""
        return [(self.kernel_size - 1, dim)]

    def step(self, inputs, past, mask=None):
        """Convolve the next frames of a stream.

        Args:
            inputs: the frames, `[batch, frames, dim]`.
            past: the gated frames before them, `[batch, kernel_size - 1, dim]`; zeros at the start.
            mask: None, or real frames, `[batch, frames]`.

        Returns:
            The pair `(outputs, past)`; with the new past the next step continues.

        Raises:
            ValueError: the layer is not causal.
        """
        if not self.causal:
            raise ValueError(
                f"LightConv {self.path!r} sees frames of the future, so it cannot run on a stream. Train the model "
                "with causal_conv=True."
            )
        x = ops.concatenate([past, self._gate(inputs, mask)], axis=1)
        return self._convolve(x), x[:, inputs.shape[1] :]

    def _gate(self, inputs, mask, training=None):
        value, gate = ops.split(self.expand(self.norm(inputs), training=training), 2, axis=-1)
        return zero_padding(value * ops.sigmoid(gate), mask)

    def _convolve(self, x, training=None):
        x = self.project(ops.silu(self.conv_norm(self.depthwise(x))), training=training)
        return self.drop(x, training=training)

    def free_channels(self):
        """The inner channels, for `permute_channels`."""
        return self.project, 1, [self.expand, self.depthwise, self.conv_norm]

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        return input_shape

    def get_config(self):
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "causal": self.causal,
            "dropout": self.dropout,
            **compression_config(self),
        }
