"""`USMEncoder`: log-mel features in, one vector per 40 ms out."""

import keras

from keras_usm_lite.layers.compressed_kernel import compression_config, resolve_compression
from keras_usm_lite.layers.conformer_block import ConformerBlock
from keras_usm_lite.layers.conv_subsampling import ConvSubsampling
from keras_usm_lite.layers.recomputed import recomputed

MAX_LAYERS = 128  # four times the largest preset; a damaged file could ask for a billion


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class USMEncoder(keras.layers.Layer):
    """USM-style Conformer encoder: convolutional subsampling by four, then `num_layers` Conformer blocks.

    Shapes: features `[batch, T, bins]` -> `[batch, ceil(T / 4), dim]`. A mask `[batch, T]` (True = real frame) keeps
    padding out: an utterance has the same result alone and in a padded batch.

    Args:
        num_layers, dim, num_heads, kernel_size: size of the Conformer, see `ConformerBlock` and `preset`.
        subsampling_channels: filters of the two strided convolutions.
        chunk_size: frames (of 40 ms) per attention chunk, None for full attention.
        causal_conv: convolve over past frames only.
        dropout: dropout rate.
        remat: in training, keep the inputs of every block only and compute the rest again in the backward pass: less
            memory, a third more time.
        quantization, sparsity: compression of every pointwise projection, see `QuantDense`.

    Raises:
        ValueError: more than 128 layers, or none.

    Source: USM (arXiv 2303.01037), section 3.1.

    Example:

    >>> encoder = USMEncoder(num_layers=1, dim=16, num_heads=2, kernel_size=5, subsampling_channels=4)
    >>> tuple(encoder(keras.ops.ones((1, 20, 80))).shape)
    (1, 5, 16)
    """

    def __init__(
        self,
        num_layers,
        dim,
        num_heads,
        kernel_size,
        subsampling_channels=32,
        chunk_size=None,
        causal_conv=False,
        dropout=0.1,
        remat=False,
        quantization=None,
        sparsity=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not 1 <= num_layers <= MAX_LAYERS:
            raise ValueError(f"num_layers={num_layers!r} must be from 1 to {MAX_LAYERS} Conformer blocks.")
        self.settings = {
            "num_layers": num_layers,
            "dim": dim,
            "num_heads": num_heads,
            "kernel_size": kernel_size,
            "subsampling_channels": subsampling_channels,
            "chunk_size": chunk_size,
            "causal_conv": causal_conv,
            "dropout": dropout,
            "remat": remat,
        }
        resolve_compression(self, quantization, sparsity)
        self.supports_masking = True
        shared = {"quantization": self.quantization, "sparsity": self.sparsity, "dtype": self.dtype_policy}
        self.subsampling = ConvSubsampling(dim, subsampling_channels, name="subsampling", **shared)
        self.drop = keras.layers.Dropout(dropout, name="dropout", dtype=self.dtype_policy)
        self.blocks = [
            ConformerBlock(
                num_heads,
                kernel_size,
                chunk_size=chunk_size,
                causal_conv=causal_conv,
                dropout=dropout,
                name=f"block_{i}",
                **shared,
            )
            for i in range(num_layers)
        ]

    def build(self, input_shape):
        """Build all blocks for a fixed number of bins."""
        self.subsampling.build(input_shape)
        shape = self.subsampling.compute_output_shape(input_shape)
        for block in self.blocks:
            block.build(shape)

    def call(self, inputs, mask=None, training=None):
        """Encode; `mask` `[batch, T]` marks real frames."""
        x = self.drop(self.subsampling(inputs), training=training)
        mask = self.subsampling.compute_mask(inputs, mask)
        for block in self.blocks:
            if self.settings["remat"] and training:
                x = recomputed(block, x, mask=mask, training=training)
            else:
                x = block(x, mask=mask, training=training)
        return x

    def compute_mask(self, inputs, previous_mask=None):
        """The mask of the output frames."""
        return self.subsampling.compute_mask(inputs, previous_mask)

    def compute_output_shape(self, input_shape):
        """`[batch, T, bins] -> [batch, ceil(T / 4), dim]`."""
        return self.subsampling.compute_output_shape(input_shape)

    def get_config(self):
        """Return the constructor's arguments."""
        return {**super().get_config(), **self.settings, **compression_config(self)}
