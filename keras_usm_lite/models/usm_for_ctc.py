"""`USMForCTC`: the complete recogniser, log-mel features in, CTC logits out."""

import keras
from keras import ops

from keras_usm_lite.layers.compressed_kernel import compression_config, resolve_compression
from keras_usm_lite.layers.masking import frame_mask
from keras_usm_lite.layers.quant_dense import QuantDense
from keras_usm_lite.layers.spec_augment import SpecAugment
from keras_usm_lite.models.presets import preset as preset_arguments
from keras_usm_lite.models.usm_encoder import USMEncoder

IMPOSSIBLE = -1e4  # logit of every token but blank on padded frames; finite in 16-bit floats


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class USMForCTC(keras.Model):
    """USM-style Conformer with a CTC head.

    Padded frames say "blank" with certainty. So `keras.losses.CTC` over all frames equals the loss over the real ones,
    and decoders need no lengths.

    Inputs: features `[batch, T, bins]`, or `{"features": ..., "lengths": int [batch]}` with the number of real frames
    of each row. Output: float32 logits `[batch, ceil(T / 4), vocab_size]`, blank = 0.

    Args:
        vocab_size: tokens including the blank (`tokenizer.vocab_size`).
        preset: size by name, see `models.presets.PRESETS`.
        quantization, sparsity: compression of every pointwise projection of the encoder; None for a float model.
            The CTC head stays float: it is small, and errors there are not averaged out. (`usm.compress` reaches it.)
        spec_augment: apply `SpecAugment` in training: True, False, or a dict of its arguments (hide less than the
            defaults do where there are only a few hours of speech).
        num_mel_bins: bins of the features.
        **encoder_arguments: arguments of `USMEncoder` that differ from the preset, such as `chunk_size`, `dropout`.

    Raises:
        ValueError: an unknown preset or a vocabulary without room for blank and a token.

    Source: USM-Lite (arXiv 2312.08553), section 3; USM (arXiv 2303.01037), section 3.

    Example:

    >>> model = USMForCTC(41, preset="tiny", quantization="int4", sparsity="2:4")
    >>> tuple(model(ops.ones((1, 100, 80))).shape)
    (1, 25, 41)
    """

    def __init__(
        self,
        vocab_size,
        preset="tiny",
        quantization=None,
        sparsity=None,
        spec_augment=True,
        num_mel_bins=80,
        name=None,
        dtype=None,
        **encoder_arguments,
    ):
        super().__init__(name=name, dtype=dtype)
        if vocab_size < 2:
            raise ValueError(f"vocab_size counts the blank and must be at least 2, got {vocab_size!r}.")
        self.vocab_size = vocab_size
        self.preset = preset
        self.num_mel_bins = num_mel_bins
        self.encoder_arguments = encoder_arguments
        resolve_compression(self, quantization, sparsity)
        self.spec_augment_arguments = {} if spec_augment is True else spec_augment
        self.spec_augment = None
        if spec_augment is not False:
            self.spec_augment = SpecAugment(name="spec_augment", dtype=self.dtype_policy, **self.spec_augment_arguments)
        self.encoder = USMEncoder(
            **{**preset_arguments(preset), **encoder_arguments},
            quantization=self.quantization,
            sparsity=self.sparsity,
            name="encoder",
            dtype=self.dtype_policy,
        )
        self.head = QuantDense(vocab_size, quantization=None, name="head", dtype="float32")
        self.build((None, None, num_mel_bins))

    def build(self, input_shape=None):
        """Build the encoder and the head; shapes other than the number of bins do not matter."""
        if self.built:
            return
        self.encoder.build((None, None, self.num_mel_bins))
        self.head.build(self.encoder.compute_output_shape((None, None, self.num_mel_bins)))
        self.built = True

    def call(self, inputs, training=None):
        """Compute logits; padded frames are certain blanks."""
        features, mask = self._unpack(inputs)
        if self.spec_augment is not None:
            features = self.spec_augment(features, mask=mask, training=training)
        logits = self.head(self.encoder(features, mask=mask, training=training))
        if mask is None:
            return logits
        mask = self.encoder.compute_mask(features, mask)
        blank = ops.cast(ops.arange(self.vocab_size) != 0, logits.dtype) * IMPOSSIBLE
        return ops.where(ops.expand_dims(mask, -1), logits, blank)

    def _unpack(self, inputs):
        if not isinstance(inputs, dict):
            return inputs, None
        features = inputs["features"]
        return features, frame_mask(inputs["lengths"], ops.shape(features)[1])

    def compute_output_shape(self, input_shape):
        """`[batch, T, bins] -> [batch, ceil(T / 4), vocab_size]`."""
        shape = input_shape["features"] if isinstance(input_shape, dict) else input_shape
        return (*self.encoder.compute_output_shape(shape)[:2], self.vocab_size)

    def get_config(self):
        """Return the constructor's arguments."""
        return {
            "name": self.name,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "vocab_size": self.vocab_size,
            "preset": self.preset,
            **compression_config(self),
            "spec_augment": self.spec_augment_arguments,
            "num_mel_bins": self.num_mel_bins,
            **self.encoder_arguments,
        }
