"""`SpecAugment`: hide random bands of frequency and stretches of time during training."""

import keras
from keras import ops

from keras_usm_lite.layers.masking import zero_padding


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class SpecAugment(keras.layers.Layer):
    """Set random frequency bands and time spans of log-mel features to zero, their mean after normalisation.

    Each mask has a width drawn uniformly from `[0, widest]` and a uniform position. The widest time mask is a share of
    the utterance's own length, so that short utterances are not erased. Shapes are static: it compiles on TPU.

    Shapes: `[batch, frames, bins] -> [batch, frames, bins]`; the identity outside training.

    Args:
        frequency_masks: bands hidden per utterance.
        frequency_width: widest band, in bins.
        time_masks: spans hidden per utterance.
        time_share: widest span, as a share of the utterance's frames.
        seed: seed of the layer's random generator.

    Source: Park et al. 2019 (arXiv 1904.08779); adaptive time masks: arXiv 1912.05533.

    Example:

    >>> layer = SpecAugment(seed=0)
    >>> x = ops.ones((2, 100, 80))
    >>> float(ops.min(layer(x))), float(ops.min(layer(x, training=True)))
    (1.0, 0.0)
    """

    def __init__(self, frequency_masks=2, frequency_width=27, time_masks=5, time_share=0.05, seed=None, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= time_share <= 1:
            raise ValueError(f"time_share must lie between 0 and 1, got {time_share!r}.")
        if min(frequency_masks, frequency_width, time_masks) < 0:
            raise ValueError(
                "frequency_masks, frequency_width and time_masks must not be negative, got "
                f"{frequency_masks!r}, {frequency_width!r}, {time_masks!r}."
            )
        self.frequency_masks = frequency_masks
        self.frequency_width = frequency_width
        self.time_masks = time_masks
        self.time_share = time_share
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True
        self.built = True

    def call(self, inputs, mask=None, training=None):
        """Hide bands and spans if `training`."""
        if not training:
            return inputs
        batch, frames, bins = ops.shape(inputs)
        if mask is None:
            lengths = ops.cast(frames, "float32") * ops.ones((batch, 1))
        else:
            lengths = ops.sum(ops.cast(mask, "float32"), axis=1, keepdims=True)
        full_band = ops.full((batch, 1), float(bins))
        keep_bins = self._keep(self.frequency_masks, full_band, ops.full((batch, 1), float(self.frequency_width)), bins)
        keep_frames = self._keep(self.time_masks, lengths, ops.floor(lengths * self.time_share), frames)
        kept = zero_padding(inputs, keep_frames)
        return kept * ops.expand_dims(ops.cast(keep_bins, inputs.dtype), 1)

    def _keep(self, count, extent, widest, size):
        """Return `[batch, size]` 0/1: outside of `count` random intervals within `[0, extent)`."""
        position = ops.cast(ops.expand_dims(ops.arange(size), 0), "float32")
        keep = ops.ones_like(position + extent)
        for _ in range(count):
            width = ops.floor(keras.random.uniform(ops.shape(extent), seed=self.seed_generator) * (widest + 1.0))
            free = ops.maximum(extent - width, 0.0)
            start = ops.floor(keras.random.uniform(ops.shape(extent), seed=self.seed_generator) * (free + 1.0))
            inside = ops.logical_and(position >= start, position < start + width)
            keep = keep * (1.0 - ops.cast(inside, "float32"))
        return keep

    def get_config(self):
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "frequency_masks": self.frequency_masks,
            "frequency_width": self.frequency_width,
            "time_masks": self.time_masks,
            "time_share": self.time_share,
            "seed": self.seed,
        }
