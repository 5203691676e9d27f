"""`CoTrainer`: trains one set of latent weights at several precisions at once."""

import keras
import numpy as np
from keras import ops

from keras_usm_lite.compression import compressed_layers
from keras_usm_lite.core.distillation import posterior_kl
from keras_usm_lite.core.scales import estimate_scale
from keras_usm_lite.layers.compressed_kernel import FLOAT_BITS
from keras_usm_lite.models.distiller import frame_weights, serialize_model
from keras_usm_lite.models.replicas import replica_share

LOW_SHARE = (0.2, 0.9)  # how likely the first and the last layer are low-bit in the stochastic branch


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class CoTrainer(keras.Model):
    """Trains a quantized `student` at its own precision and, with the same weights, at a higher one.

    ```
    L = L_high + low_weight L_low + kl_weight KL(stop_gradient(p_high) || p_low) [+ low_weight L_mixed]
    ```

    plus the student's own regularisation. Each `L` is the compiled loss of a branch: `low` uses the bits in force in
    the layers; `high` raises every layer below `high_bits` to that; `mixed` (`stochastic=True`, in training only) draws
    for each layer which of the two it gets, low with a probability that rises log-linearly from 0.2 (first layer) to
    0.9 (last layer). KL is averaged over real frames. The logs show `high_loss`, `low_loss`, `kl_loss` and
    `mixed_loss`.

    All branches of a step see the same dropout and SpecAugment masks, so that KL measures precision alone. (On PyTorch,
    dropout without a seed of its own draws anew.) A scale that is stored for the configured bits ("mse", "learned",
    frozen) cannot serve others: at high precision it gives way to the absmax scale of the current kernel.

    Compile and fit it as you would the student; export `co_trainer.student`. Calling it returns the student's logits at
    low precision; in training, `(low, high)` or `(low, high, mixed)`.

    Args:
        student: a built model with quantized layers. Output: logits.
        high_bits: bits of the high-precision branch, 2 to 8, or None for float.
        low_weight: weight of the loss of the low (and the mixed) branch.
        kl_weight: weight of the divergence of the low branch from the high one.
        stochastic: add the mixed branch.
        seed: seed of the draws of the mixed branch.

    Raises:
        ValueError: a student that is not built or that has no layer below `high_bits`, or numbers out of range.

    Source: Li et al. 2025 (arXiv 2505.21245).

    Example:

    >>> from keras_usm_lite.layers.quant_dense import QuantDense
    >>> student = keras.Sequential([keras.Input((4,)), QuantDense(3, quantization="int2")])
    >>> trainer = CoTrainer(student, high_bits=4)
    >>> trainer.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = trainer.fit(np.ones((8, 4)), np.ones((8,)), verbose=0).history
    >>> sorted(history)
    ['high_loss', 'kl_loss', 'loss', 'low_loss']
    """

    def __init__(
        self,
        student,
        high_bits=8,
        low_weight=0.5,
        kl_weight=1.0,
        stochastic=False,
        seed=None,
        name=None,
    ):
        _check(student, high_bits, low_weight, kl_weight)
        super().__init__(name=name, autocast=False, dtype=student.dtype_policy)  # by which Keras scales losses
        self.student = student
        self.high_bits = high_bits
        self.low_weight = low_weight
        self.kl_weight = kl_weight
        self.stochastic = stochastic
        self.seed = seed
        names = ["low_loss", "high_loss", "kl_loss"]
        if stochastic:
            self.seed_generator = keras.random.SeedGenerator(seed)
            names.append("mixed_loss")
        self._trackers = [keras.metrics.Mean(name=name) for name in names]
        self.built = True

    def call(self, inputs, training=None):
        """Return the logits at low precision; in training, those of every branch."""
        if not training:
            return self.student(inputs, training=False)
        raised = [self._at_high_bits(inputs, training=True)]
        if self.stochastic:
            raised.append(self._at_high_bits(inputs, training=True, low_layers=self._draw_low_layers()))
        # Last, because the other branches leave no trace: the seeds advance and the losses are added once.
        return (self.student(inputs, training=True), *raised)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Return the weighted sum of the losses of the branches and keep track of each."""
        own = self._own_loss()
        if not isinstance(y_pred, (tuple, list)):  # evaluation
            y_pred = (y_pred, self._at_high_bits(x, training=False))
        low, high, *mixed = (self._compiled_loss(x, y, logits, sample_weight, training) for logits in y_pred)
        target = ops.stop_gradient(y_pred[1])
        kl = posterior_kl(target, y_pred[0], weights=frame_weights(target, sample_weight))
        for tracker, term in zip(self._trackers, (low, high, kl, *mixed), strict=False):  # no mixed in evaluation
            tracker.update_state(term, sample_weight=ops.shape(target)[0])
        return replica_share() * (own + high + self.low_weight * (low + sum(mixed)) + self.kl_weight * kl)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Give the logits at low precision to the compiled metrics."""
        logits = y_pred[0] if isinstance(y_pred, (tuple, list)) else y_pred
        return super().compute_metrics(x, y, logits, sample_weight)

    def _own_loss(self):
        """Regularisation and other losses of the student's layers, as of its last call."""
        return sum(ops.sum(loss) for loss in self.losses)

    def _compiled_loss(self, x, y, logits, sample_weight, training):
        return super().compute_loss(x, y, logits, sample_weight, training) / replica_share() - self._own_loss()

    def _at_high_bits(self, inputs, training, low_layers=None):
        """Call the student with raised layers, changing no variable: not its bits, nor its random seeds.

        Args:
            inputs, training: of the student.
            low_layers: None, or booleans `[layers]`: True for a layer that stays at its own bits.
        """
        state = [(variable, variable) for variable in self.student.variables]
        for i, layer in enumerate(_quantized_layers(self.student)):
            stays = False if low_layers is None else low_layers[i]
            state += _raised(layer, FLOAT_BITS if self.high_bits is None else self.high_bits, stays)
        with keras.StatelessScope(state):  # of two values for a variable, the last counts
            return self.student(inputs, training=training)

    def _draw_low_layers(self):
        share = np.geomspace(*LOW_SHARE, num=len(_quantized_layers(self.student)), dtype="float32")
        return ops.less(keras.random.uniform(share.shape, seed=self.seed_generator), share)

    def compute_output_shape(self, input_shape):
        """The shape of the student's logits."""
        return self.student.compute_output_shape(input_shape)

    def get_config(self):
        """Return the constructor's arguments, the student serialised."""
        return {
            "name": self.name,
            "student": serialize_model(self.student),
            "high_bits": self.high_bits,
            "low_weight": self.low_weight,
            "kl_weight": self.kl_weight,
            "stochastic": self.stochastic,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        """Rebuild the student and the `CoTrainer`."""
        return cls(**{**config, "student": keras.saving.deserialize_keras_object(config["student"])})


def _raised(layer, bits, stays):
    """Return `(variable, value)` pairs with which a layer multiplies by a kernel of at least `bits` bits.

    Where the boolean scalar `stays` is true, or where it has as many bits, the values are those the variables have.
    """
    own = ops.convert_to_tensor(layer.bits)
    stays, bits = ops.logical_or(stays, own >= bits), ops.full_like(own, bits)
    pairs = [(layer.bits, bits), (layer.scale_frozen, 0.0 if layer.quantization.live else 1.0)]
    if not layer.quantization.live:
        kernel = ops.stop_gradient(layer.masked_kernel())
        scale, zero_point = estimate_scale(kernel, method="absmax", bits=bits, **layer._scale_layout())
        pairs.append((layer.kernel_scale, scale))
        if zero_point is not None:
            pairs.append((layer.kernel_zero_point, zero_point))
    return [(variable, ops.where(stays, ops.convert_to_tensor(variable), value)) for variable, value in pairs]


def _quantized_layers(model):
    return [layer for layer in compressed_layers(model) if layer.quantization is not None]


def _check(student, high_bits, low_weight, kl_weight):
    for label, value in (("low_weight", low_weight), ("kl_weight", kl_weight)):
        if value < 0:
            raise ValueError(f"{label} must not be negative, got {value!r}.")
    if high_bits is not None and (not isinstance(high_bits, int) or not 2 <= high_bits <= 8):
        raise ValueError(f"high_bits must be an integer from 2 to 8, or None for float, got {high_bits!r}.")
    if not student.built:
        raise ValueError(f"The student {student.name!r} is not built; call it on a batch, or build() it, first.")
    bits = [layer.quantization.bits for layer in _quantized_layers(student)]
    if not bits or min(bits) >= (high_bits or FLOAT_BITS):
        raise ValueError(
            f"The student {student.name!r} has {len(bits)} quantized layers, of {sorted(set(bits))} bits; co-training "
            f"needs one below high_bits={high_bits}. Quantize it further (usm.compress), or raise high_bits."
        )
