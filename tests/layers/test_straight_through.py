"""Straight-through gradients are finite differences: of the loss with rounding errors held, of the staircase."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.core.quantize import quantize

INPUTS, UNITS, BATCH = 12, 3, 6
RATE = 0.1  # of the one step: small enough that no gain of a scale meets its limit
KERNEL = np.random.default_rng(3).normal(size=(INPUTS, UNITS))
QUANTIZATION = {
    "absmax": usm.QuantizationConfig(bits=4),
    "absmax of two bits": usm.QuantizationConfig(bits=2),
    "absmax per tensor": usm.QuantizationConfig(bits=3, per_tensor=True),
    "absmax in blocks": usm.QuantizationConfig(bits=3, form="fake", block_size=4),
    "asymmetric": usm.QuantizationConfig(bits=4, codebook="asymmetric"),
    "mean": usm.QuantizationConfig(bits=1),
    "mse": usm.QuantizationConfig(bits=2, scale="mse"),
    "stopped": usm.QuantizationConfig(bits=4, stop_scale_gradient=True),
    "learned": usm.QuantizationConfig(bits=3, scale="learned"),
}
SPARSITY = {
    "dense": None,
    "hard": usm.SparsityConfig(n=1, m=4, gradient="hard"),
    "ste": usm.SparsityConfig(n=1, m=4, gradient="ste"),
    "sr_ste": usm.SparsityConfig(n=2, m=4, gradient="sr_ste", sr_ste_decay=0.2),
}


def array(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


class Surrogate:
    """The loss near one kernel in NumPy, float64; mask, rounding errors and zero points stay as they are there."""

    def __init__(self, layer, upstream):
        self.config, self.sparsity, self.upstream = layer.quantization, layer.sparsity, upstream
        self.mask = np.ones((INPUTS, UNITS)) if layer.sparsity is None else array(layer.mask)
        self.kernel, self.stored = array(layer.kernel), array(layer.kernel_scale)
        self.limit = 2 ** (self.config.bits - 1) - 1
        self.removed = (self.mask - 1) * self.kernel
        codes, _, *zero_point = (array(part) for part in layer.quantized_kernel())
        self.errors = codes - self.clipped(self.kernel, self.stored) - (zero_point[0] if zero_point else 0)

    def masked(self, kernel):
        hard = self.sparsity is None or self.sparsity.gradient == "hard"
        return self.mask * kernel if hard else kernel + self.removed

    def scale(self, masked, stored):
        config = self.config
        if config.scale in ("mse", "learned"):
            return stored
        if config.stop_scale_gradient:
            masked = self.mask * self.kernel
        parts = masked.reshape((1, -1, 1) if config.per_tensor else (-1, config.block_size or INPUTS, UNITS))
        if config.scale == "mean":
            return (np.abs(parts).sum(axis=1) / self.mask.sum(axis=0)).repeat(INPUTS, axis=0)
        if config.codebook == "asymmetric":
            found = (np.maximum(parts, 0).max(axis=1) - np.minimum(parts, 0).min(axis=1)) / 15
        else:
            found = np.abs(parts).max(axis=1) / self.limit
        return found.repeat(INPUTS // len(found), axis=0)

    def clipped(self, kernel, stored):
        masked = self.masked(kernel)
        codes = masked / self.scale(masked, stored)
        return np.clip(codes, -self.limit, self.limit) if self.config.scale == "learned" else codes

    def loss(self, kernel, stored):
        effective = (self.clipped(kernel, stored) + self.errors) * self.scale(self.masked(kernel), stored)
        decay = 0.0
        if self.sparsity is not None and self.sparsity.gradient == "sr_ste":
            decay = 0.5 * self.sparsity.sr_ste_decay * np.sum(((1 - self.mask) * kernel) ** 2)
        return np.sum(self.upstream * effective) + decay

    def differences(self, step=1e-6):
        """Central differences of the loss by every weight, and by every stored scale."""
        found = []
        for place, values in enumerate((self.kernel, self.stored)):
            slopes = np.zeros_like(values)
            for index in np.ndindex(values.shape):
                ends = []
                for sign in (1, -1):
                    moved = [self.kernel, self.stored]
                    moved[place] = values.copy()
                    moved[place][index] += sign * step
                    ends.append(self.loss(*moved))
                slopes[index] = (ends[0] - ends[1]) / (2 * step)
            found.append(slopes)
        return found


def one_step(layer):
    """Gradients of one real training step of SGD, and what arrives at the effective kernel."""
    draw = np.random.default_rng(1)
    x, target = draw.normal(size=(BATCH, INPUTS)), draw.normal(size=(BATCH, UNITS))
    before = {v.path: array(v) for v in layer.trainable_variables}
    surrogate = Surrogate(layer, x.T @ target / BATCH)
    model = keras.Sequential([keras.Input((INPUTS,)), layer])
    model.compile(keras.optimizers.SGD(RATE), loss=lambda y_true, y_pred: ops.sum(y_true * y_pred, axis=-1))
    model.train_on_batch(x.astype("float32"), target.astype("float32"))
    return {v.name: (before[v.path] - array(v)) / RATE for v in layer.trainable_variables}, surrogate


@pytest.mark.parametrize(("method", "pruning"), [(q, s) for q in QUANTIZATION for s in SPARSITY])
def test_the_gradient_is_the_finite_difference_of_the_loss_with_rounding_held(method, pruning):
    layer = usm.QuantDense(UNITS, QUANTIZATION[method], sparsity=SPARSITY[pruning], use_bias=False)
    layer.build((None, INPUTS))
    layer.kernel.assign(KERNEL)
    if layer.sparsity is not None:
        layer.update_mask()
    layer.update_scale()
    layer.kernel_scale.assign(0.83 * layer.kernel_scale)  # a stored scale with weights outside, none at the edge
    survivors = array(layer.masked_kernel())
    assert (survivors.min(axis=0) < 0).all() and (survivors.max(axis=0) > 0).all(), "no kink at zero, please"
    gradients, surrogate = one_step(layer)
    by_weight, by_scale = surrogate.differences()
    np.testing.assert_allclose(gradients["kernel"], by_weight, rtol=1e-3, atol=2e-5)
    if method == "learned":
        factor = 1 / np.sqrt(INPUTS * surrogate.limit)
        np.testing.assert_allclose(gradients["scale_gain"], factor * by_scale, rtol=1e-3, atol=2e-5)
        assert np.abs(by_scale).min() > 1e-3


@pytest.mark.parametrize("clip_gradient", [False, True])
def test_inside_the_range_the_gradient_is_the_slope_of_the_staircase_over_whole_steps(clip_gradient):
    scale, weights = np.float32(0.25), np.linspace(-1.4, 1.4, 23, dtype="float32")[:, None]
    up, down = (array(quantize(weights + sign * scale, scale, bits=4)) for sign in (1, -1))
    layer = usm.QuantDense(
        1, usm.QuantizationConfig(bits=4, scale="learned" if clip_gradient else "mse"), use_bias=False
    )
    layer.build((None, len(weights)))
    layer.kernel.assign(weights)
    layer.kernel_scale.assign([[scale]])
    model = keras.Sequential([keras.Input((len(weights),)), layer])
    model.compile(keras.optimizers.SGD(1.0), loss=lambda y_true, y_pred: ops.sum(y_pred, axis=-1))
    model.train_on_batch(np.ones((1, len(weights)), "float32"), np.zeros((1, 1), "float32"))
    np.testing.assert_allclose(weights - array(layer.kernel), (up - down) / 2, rtol=1e-5)


def test_equally_large_weights_share_the_gradient_of_the_scale_and_an_empty_channel_has_none():
    layer = usm.QuantDense(UNITS, "int4", use_bias=False)
    layer.build((None, INPUTS))
    kernel = KERNEL.copy()
    kernel[:, 0] = 0.0
    kernel[[2, 7, 9], 1] = [4.0, -4.0, 4.0]
    layer.kernel.assign(kernel)
    gradients, surrogate = one_step(layer)
    through_scale = gradients["kernel"] - surrogate.upstream
    slope = (surrogate.upstream * surrogate.errors).sum(axis=0) / 7  # of the loss by the largest magnitude
    expected = np.zeros_like(kernel)
    expected[[2, 7, 9], 1] = np.array([1, -1, 1]) * slope[1] / 3
    largest = np.abs(kernel[:, 2]).argmax()
    expected[largest, 2] = np.sign(kernel[largest, 2]) * slope[2]
    np.testing.assert_allclose(through_scale, expected, atol=2e-5)
    assert np.abs(slope[1:]).min() > 1e-3
