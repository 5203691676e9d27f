"""`BestRQ`: trains an encoder on speech without transcripts."""

import keras
import numpy as np
from keras import ops

from keras_usm_lite.core.best_rq import masked_cross_entropy, nearest_codes, span_mask, stack_frames
from keras_usm_lite.layers.masking import frame_mask, zero_padding
from keras_usm_lite.models.distiller import serialize_model
from keras_usm_lite.models.replicas import replica_share

SUBSAMPLING = 4  # frames of the features per frame of `USMEncoder`
NOISE = 0.1  # standard deviation of what hidden frames are replaced by


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class BestRQ(keras.Model):
    """Pre-trains `encoder`: hide spans of the features and predict, there, a random discrete code of what was hidden.

    Every four feature frames `x` (40 ms, one output frame) have one target per codebook, `argmin_k |code_k - P x|`,
    both sides of length one. Projections `P` and codes are random and never trained. Hidden frames are replaced by
    noise `N(0, 0.1^2)`. The loss is the cross-entropy at hidden real frames, averaged over frames and codebooks; the
    logs show it and `accuracy`, the share of codes guessed (chance: about `1 / codebook_size`).

    Compile it with an optimizer and no loss; `fit` takes `SpeechBatches`, whose labels are not looked at, or features
    alone. `evaluate` hides frames, too. Calling it returns `(logits, hidden)`: float32 `[batch, ceil(T / 4),
    num_codebooks, codebook_size]` and booleans `[batch, ceil(T / 4)]`.

    The encoder learns in place: give it `recogniser.encoder` of a `USMForCTC`, and the recogniser starts from what was
    learned. From one program to another, in two lines:

    ```
    keras.saving.save_weights(best_rq.encoder, "encoder.weights.h5")
    keras.saving.load_weights(recogniser.encoder, "encoder.weights.h5")
    ```

    Args:
        encoder: a built `USMEncoder`. Features should have mean 0 and deviation 1, as those of `LogMel` do; otherwise
            few codes are ever nearest.
        num_codebooks: independent targets per frame.
        codebook_size: codes per codebook. The literature takes thousands; small models and corpora need fewer.
        code_dim: dimensions that the features are projected to.
        mask_prob: probability that a span begins at an output frame; with `mask_span`, one third of all is hidden.
        mask_span: output frames per span (10 are 400 ms).
        seed: int that projections, codes and spans are derived from; the codes are the same on every backend.

    Raises:
        ValueError: an encoder that is not built, or numbers out of range.

    Source: Chiu et al. 2022 (arXiv 2202.01855); several codebooks: USM (arXiv 2303.01037), section 3.2.

    Example:

    >>> import keras_usm_lite as usm
    >>> recogniser = usm.USMForCTC(9, num_layers=1)
    >>> best_rq = BestRQ(recogniser.encoder, num_codebooks=2, codebook_size=64)
    >>> best_rq.compile("adam")
    >>> history = best_rq.fit(np.ones((4, 40, 80), "float32"), batch_size=4, verbose=0).history
    >>> sorted(history), best_rq.targets(np.ones((1, 10, 80))).shape[1:] == (3, 2)
    (['accuracy', 'loss'], True)
    """

    def __init__(
        self,
        encoder,
        num_codebooks=16,
        codebook_size=1024,
        code_dim=16,
        mask_prob=0.04,
        mask_span=10,
        seed=0,
        name=None,
    ):
        _check(encoder, num_codebooks, codebook_size, code_dim, mask_prob, mask_span)
        super().__init__(name=name, dtype=encoder.dtype_policy, autocast=False)
        self.encoder = encoder
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.mask_prob = mask_prob
        self.mask_span = mask_span
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        features = encoder.get_build_config()["input_shape"]
        draw = np.random.default_rng(seed)
        self.projections = self._frozen(draw, "projections", SUBSAMPLING * features[-1])
        self.codes = self._frozen(draw, "codes", codebook_size)
        self.head = keras.layers.Dense(num_codebooks * codebook_size, name="head", dtype="float32")
        self.head.build(encoder.compute_output_shape(tuple(features)))
        self._accuracy = keras.metrics.Mean(name="accuracy")
        self.built = True

    def _frozen(self, draw, name, rows):
        values = draw.normal(size=(self.num_codebooks, rows, self.code_dim)).astype("float32")
        return self.add_weight(
            values.shape, lambda shape, dtype: values, dtype="float32", trainable=False, autocast=False, name=name
        )

    def call(self, inputs, training=None):
        """Hide spans, predict codes; return the logits and which real frames were hidden."""
        features, mask = _unpack(inputs)
        batch, frames = ops.shape(features)[:2]
        stacks = (frames + SUBSAMPLING - 1) // SUBSAMPLING
        draws = keras.random.uniform((batch, stacks), seed=self.seed_generator)
        hidden = span_mask(draws, self.mask_prob, self.mask_span)
        noise = keras.random.normal(ops.shape(features), stddev=NOISE, seed=self.seed_generator)
        hidden_features = ops.expand_dims(ops.repeat(hidden, SUBSAMPLING, axis=1)[:, :frames], -1)
        features = zero_padding(ops.where(hidden_features, noise, features), mask)
        logits = self.head(self.encoder(features, mask=mask, training=training))
        if mask is not None:
            hidden = ops.logical_and(hidden, self.encoder.compute_mask(features, mask))
        return ops.reshape(logits, (batch, stacks, self.num_codebooks, self.codebook_size)), hidden

    def targets(self, inputs):
        """Return the codes to predict, int32 `[batch, ceil(T / 4), num_codebooks]`, hidden or not."""
        features, mask = _unpack(inputs)
        stacked = stack_frames(zero_padding(features, mask), SUBSAMPLING)
        return nearest_codes(stacked, self.projections, self.codes)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Return the cross-entropy at hidden frames plus the losses of the encoder's own layers."""
        logits, hidden = y_pred
        weights = ops.cast(hidden, "float32")
        if sample_weight is not None:
            weights = weights * ops.reshape(ops.cast(sample_weight, "float32"), (-1, 1))
        codes = self.targets(x)
        hits = ops.mean(ops.cast(ops.equal(ops.cast(ops.argmax(logits, axis=-1), "int32"), codes), "float32"), axis=-1)
        self._accuracy.update_state(hits, sample_weight=weights)
        own = sum(ops.sum(loss) for loss in self.losses)
        return replica_share() * (masked_cross_entropy(codes, logits, weights) + own)

    def get_config(self):
        """Return the constructor's arguments, the encoder serialised."""
        return {
            "name": self.name,
            "encoder": serialize_model(self.encoder),
            "num_codebooks": self.num_codebooks,
            "codebook_size": self.codebook_size,
            "code_dim": self.code_dim,
            "mask_prob": self.mask_prob,
            "mask_span": self.mask_span,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        """Rebuild the encoder and the `BestRQ`."""
        return cls(**{**config, "encoder": keras.saving.deserialize_keras_object(config["encoder"])})


def _unpack(inputs):
    """Return float32 features and the mask of the real frames, None if all are."""
    if not isinstance(inputs, dict):
        return ops.convert_to_tensor(inputs, "float32"), None
    features = ops.convert_to_tensor(inputs["features"], "float32")
    return features, frame_mask(inputs["lengths"], ops.shape(features)[1])


def _check(encoder, num_codebooks, codebook_size, code_dim, mask_prob, mask_span):
    if not encoder.built:
        raise ValueError(
            f"The encoder {encoder.name!r} is not built; call encoder.build((None, None, number_of_bins)) first, or "
            "take that of a USMForCTC."
        )
    counts = {"num_codebooks": num_codebooks, "codebook_size": codebook_size, "code_dim": code_dim}
    for label, value in {**counts, "mask_span": mask_span}.items():
        if value < 1:
            raise ValueError(f"{label} must be at least 1, got {value!r}.")
    if not 0 < mask_prob <= 1:
        raise ValueError(f"mask_prob must lie above 0 and not above 1, got {mask_prob!r}.")
