"""`ConvSubsampling`: two stride-2 convolutions that turn 10 ms frames into 40 ms frames."""

import keras
from keras import ops

from keras_usm_lite.layers.compressed_kernel import compression_config, resolve_compression
from keras_usm_lite.layers.quant_dense import QuantDense


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class ConvSubsampling(keras.layers.Layer):
    """Reduce the frame rate by four: `linear(flatten(swish(conv(swish(conv(x))))))`.

    Both convolutions are 3 x 3 with stride 2 and causal in time: output frame `t` sees inputs `4 t - 6 .. 4 t`, and an
    utterance of `T` frames has `ceil(T / 4)` frames afterwards. So padding behind an utterance is never heard.

    Shapes: `[batch, T, bins] -> [batch, ceil(T / 4), units]`.

    Args:
        units: width of the linear projection (the model dimension).
        channels: filters of both convolutions.
        quantization, sparsity: compression of the linear projection, see `QuantDense`.

    Source: Conformer (arXiv 2005.08100), section 2; USM (arXiv 2303.01037), section 3.1.

    Example:

    >>> tuple(ConvSubsampling(16, channels=4)(ops.ones((1, 10, 80))).shape)
    (1, 3, 16)
    """

    def __init__(self, units, channels=32, quantization=None, sparsity=None, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.channels = channels
        resolve_compression(self, quantization, sparsity)
        self.supports_masking = True
        self.convs = [
            keras.layers.Conv2D(
                channels,
                3,
                strides=2,
                activation="swish",
                data_format="channels_last",
                name=f"conv_{i}",
                dtype=self.dtype_policy,
            )
            for i in range(2)
        ]
        self.projection = QuantDense(units, quantization, sparsity, name="projection", dtype=self.dtype_policy)

    def build(self, input_shape):
        """Build the convolutions and the projection for a fixed number of bins."""
        batch, frames, bins = input_shape
        self.convs[0].build((batch, frames, bins + 2, 1))
        bins = _half(bins)
        self.convs[1].build((batch, frames, bins + 2, self.channels))
        self.projection.build((batch, frames, _half(bins) * self.channels))

    def call(self, inputs):
        """Subsample."""
        x = ops.expand_dims(inputs, -1)
        for conv in self.convs:
            x = conv(ops.pad(x, ((0, 0), (2, 0), (1, 1), (0, 0))))
        return self._project(x)

    def past_shapes(self, bins):
        """Return the shapes, without the batch, of what `step` remembers."""
        return [(1, bins, 1), (1, _half(bins), self.channels)]

    def step(self, inputs, pasts, started):
        """Subsample the next frames of a stream, which lags three frames: output `t` needs none after `4 t`.

        Outputs `t .. t + n - 1` are made of the inputs `4 t - 3 .. 4 (t + n) - 4`.

        Args:
            inputs: these `4 n` frames, `[batch, 4 n, bins]`; what lies before the first frame is zero.
            pasts: the frame before the inputs of either convolution, `[batch, *past_shape]`; zeros at the start.
            started: `[batch, 1]`, 0 in the first step, 1 later.

        Returns:
            The pair `(outputs, pasts)`; with the new pasts the next step continues.
        """
        first = ops.concatenate([pasts[0], ops.expand_dims(inputs, -1)], axis=1)
        x = self.convs[0](_pad_bins(first))
        # Before the start the second convolution sees zeros, not what the first one makes of zeros.
        second = ops.concatenate([pasts[1], x[:, :1] * ops.expand_dims(started, (2, 3)), x[:, 1:]], axis=1)
        outputs = self._project(self.convs[1](_pad_bins(second)))
        return outputs, [first[:, -1:], second[:, -1:]]

    def _project(self, x):
        batch, frames = ops.shape(x)[:2]
        return self.projection(ops.reshape(x, (batch, frames, x.shape[2] * x.shape[3])))

    def compute_mask(self, inputs, previous_mask=None):
        """Every fourth entry of the mask."""
        return None if previous_mask is None else previous_mask[:, ::2][:, ::2]

    def compute_output_shape(self, input_shape):
        """`[batch, T, bins] -> [batch, ceil(T / 4), units]`."""
        frames = input_shape[1]
        return (input_shape[0], None if frames is None else _half(_half(frames)), self.units)

    def get_config(self):
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "units": self.units,
            "channels": self.channels,
            **compression_config(self),
        }


def _pad_bins(x):
    return ops.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))


def _half(size):
    return None if size is None else (size + 1) // 2
