"""Sixteen-bit arithmetic, accumulated gradients, rematerialisation and several steps per call train the same model."""

import keras
import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.callbacks import NMPruning, QuantizationSchedule
from keras_usm_lite.callbacks.step_callback import StepCallback

SIZE = {"num_layers": 1, "dim": 16, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": 16}
DRAW = np.random.default_rng(0)
FEATURES = {"features": DRAW.normal(size=(16, 32, 16)).astype("float32"), "lengths": np.full(16, 32, "int32")}
LABELS = DRAW.integers(1, 9, (16, 3)).astype("int32")
BATCHES = 4  # in an epoch
JIT = "auto" if keras.backend.backend() == "jax" else False  # XLA has tests of its own, and compiles for long


def recognizer(dtype="float32", **arguments):
    keras.utils.set_random_seed(0)
    settings = {"dropout": 0.0, "spec_augment": False, **SIZE, **arguments}
    return usm.USMForCTC(9, quantization="int4", sparsity="2:4", dtype=dtype, **settings)


def train(model, optimizer, epochs=6, callbacks=(), **compile_arguments):
    """Train with masks from step 4 and int4 from step 8 on; return the losses of the epochs."""
    model.compile(optimizer, loss=keras.losses.CTC(), jit_compile=JIT, **compile_arguments)
    schedules = [NMPruning(start_step=4), QuantizationSchedule([(0, 8), (8, 4)]), *callbacks]
    size = len(LABELS) // BATCHES
    history = model.fit(FEATURES, LABELS, batch_size=size, epochs=epochs, shuffle=False, verbose=0, callbacks=schedules)
    return history.history["loss"]


def array(weight):
    return keras.ops.convert_to_numpy(weight)


@pytest.fixture(scope="module")
def float32():
    """The losses in float32."""
    return train(recognizer(), keras.optimizers.AdamW(3e-3))


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_sixteen_bits_reach_the_loss_of_float32_within_three_percent(float32, dtype):
    optimizer = keras.optimizers.AdamW(3e-3)
    if dtype == "mixed_float16":
        # The default first scale, 2^15, overflows here and costs steps; with a fitting one no step is skipped.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=16.0)
    model = recognizer(dtype)
    losses = train(model, optimizer)
    np.testing.assert_allclose(losses, float32, rtol=0.03)
    assert losses[-1] < 0.9 * losses[0]
    for layer in usm.compressed_layers(model):
        assert layer.compute_dtype == dtype.removeprefix("mixed_")
        assert {weight.dtype for weight in layer.weights} == {"float32"}
        assert keras.backend.standardize_dtype(layer.effective_kernel().dtype) == "float32"
        assert array(layer.mask).mean() == 0.5 and layer.active_bits == 4
    assert keras.backend.standardize_dtype(model(FEATURES).dtype) == "float32"


class Skip(StepCallback):
    """Makes a loss-scaling optimizer skip the steps of this set, as an overflow would."""

    def __init__(self, skipped):
        super().__init__()
        self.skipped = skipped

    def on_step(self, step):
        self.synchronize()
        self.model.optimizer.dynamic_scale.assign(float("inf") if step in self.skipped else 1.0)


class Updates(keras.callbacks.Callback):
    """Notes how many updates of the weights there were after each batch."""

    def on_train_begin(self, logs=None):
        self.counts = [0]

    def on_train_batch_end(self, batch, logs=None):
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        self.counts.append(int(array(self.model.optimizer.inner_optimizer.iterations)))

    def skipped(self):
        return {step for step, applied in enumerate(np.diff(self.counts)) if not applied}


def test_the_default_loss_scale_of_float16_costs_the_steps_that_overflow_and_nothing_else():
    """A float32 training that is made to skip the same steps has the same losses; masks and bits come in time."""
    model, updates = recognizer("mixed_float16"), Updates()
    losses = train(model, "adamw", callbacks=[updates])
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert updates.skipped(), "nothing overflowed: the claim is not tested"
    exact = recognizer()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(), initial_scale=1.0)
    optimizer.build(exact.trainable_variables)
    followers = [Skip(updates.skipped()), Updates()]
    expected = train(exact, optimizer, callbacks=followers)
    assert followers[1].skipped() == updates.skipped()
    np.testing.assert_allclose(losses, expected, rtol=0.01)
    for layer in usm.compressed_layers(model):
        assert array(layer.mask).mean() == 0.5 and layer.active_bits == 4


def test_two_accumulated_batches_are_one_batch_of_twice_the_size():
    """The mean over two halves is the mean over the whole; masks and bits change at the same examples."""
    halves, whole = recognizer(), recognizer()
    for model, batch, accumulate, scale in ((halves, 4, 2, 2), (whole, 8, None, 1)):
        optimizer = keras.optimizers.SGD(0.01, gradient_accumulation_steps=accumulate)
        model.compile(optimizer, loss=keras.losses.CTC(), jit_compile=JIT)
        schedules = [NMPruning(start_step=2 * scale), QuantizationSchedule([(0, 8), (2 * scale, 4)])]
        model.fit(FEATURES, LABELS, batch_size=batch, epochs=2, shuffle=False, verbose=0, callbacks=schedules)
    for one, other in zip(halves.weights, whole.weights, strict=True):
        np.testing.assert_allclose(array(one), array(other), rtol=1e-3, atol=1e-4, err_msg=one.path)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="stateless calls are not for torch's own gradients")
def test_rematerialisation_changes_no_result_not_even_of_dropout():
    with_dropout = [recognizer(dropout=0.1, remat=remat) for remat in (False, True)]
    losses = [train(model, keras.optimizers.AdamW(3e-3)) for model in with_dropout]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    for one, other in zip(*(model.weights for model in with_dropout), strict=True):
        np.testing.assert_allclose(array(one), array(other), rtol=1e-3, atol=1e-4, err_msg=one.path)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras has no steps_per_execution on PyTorch")
def test_several_steps_per_call_make_the_same_masks_and_losses(float32):
    model = recognizer()
    losses = train(model, keras.optimizers.AdamW(3e-3), steps_per_execution=BATCHES)
    np.testing.assert_allclose(losses, float32, rtol=1e-3)
    for layer in usm.compressed_layers(model):
        assert array(layer.mask).mean() == 0.5 and layer.active_bits == 4
