"""StepCallback: the number of the next step, over epochs, restarts and every way of stepping."""

import keras
import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.callbacks.step_callback import StepCallback

X = np.ones((10, 4), "float32")  # five batches of two
Y = np.ones((10, 1), "float32")


class Recorder(StepCallback):
    """Writes down every step it is told, and the bias at that moment."""

    def __init__(self):
        super().__init__()
        self.steps, self.biases = [], []

    def on_step(self, step):
        self.steps.append(step)
        self.synchronize()
        self.biases.append(float(keras.ops.convert_to_numpy(self.model.layers[-1].bias)[0]))


def compiled(optimizer=None, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile(optimizer or keras.optimizers.SGD(0.01), "mse", **options)
    return model


def steps(model, **options):
    recorder = Recorder()
    model.fit(X, Y, batch_size=2, verbose=0, callbacks=[recorder], **options)
    return recorder.steps


def test_steps_are_counted_from_zero_over_all_epochs_whatever_validation_does():
    assert steps(compiled(), epochs=3, validation_data=(X, Y)) == list(range(15))


def test_the_call_comes_before_the_step_and_sees_the_variables_of_that_moment():
    model, recorder = compiled(), Recorder()
    model.fit(X, Y, batch_size=2, epochs=2, verbose=0, shuffle=False, callbacks=[recorder])
    bias, expected = 0.0, []
    for _ in range(10):  # all rows are alike: the kernel's four weights move as the bias does
        expected.append(bias)
        bias += 0.01 * 2 * (1 - 5 * bias)
    np.testing.assert_allclose(recorder.biases, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch has no steps_per_execution")
def test_with_several_steps_per_execution_the_call_comes_at_the_first_of_them():
    assert steps(compiled(steps_per_execution=2), epochs=2) == [0, 2, 4, 5, 7, 9]


def test_a_second_fit_goes_on_counting():
    model = compiled()
    assert steps(model) == [0, 1, 2, 3, 4]
    assert steps(model) == [5, 6, 7, 8, 9]


def test_a_model_compiled_anew_starts_anew():
    model = compiled()
    steps(model)
    model.compile("sgd", "mse")
    assert steps(model) == [0, 1, 2, 3, 4]


def test_a_reloaded_model_goes_on_counting(tmp_path):
    model = compiled()
    steps(model)
    model.save(tmp_path / "model.keras")
    assert steps(keras.models.load_model(tmp_path / "model.keras"), epochs=2) == list(range(5, 15))


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(0.01, gradient_accumulation_steps=3),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01)),
    ],
)
def test_a_step_is_a_batch_also_with_accumulated_gradients_and_scaled_losses(optimizer):
    assert steps(compiled(optimizer), epochs=2) == list(range(10))


@pytest.mark.parametrize("callback", [usm.callbacks.NMPruning, usm.callbacks.CompressionMonitor])
def test_a_model_that_is_not_built_is_refused_with_the_fix(callback):
    model = keras.Sequential([usm.QuantDense(4, "int4", "2:4")])
    model.compile("sgd", "mse")
    recorder = callback()
    recorder.set_model(model)
    with pytest.raises(ValueError, match="is not built; call it on a batch before fit"):
        recorder.on_train_begin()
