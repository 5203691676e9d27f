"""build_optimizer: the training step is traced once, and the training is the one it was."""

import keras
import numpy as np
import pytest

from keras_usm_lite.optimizers.build_optimizer import build_optimizer

X, Y = np.ones((8, 2), "float32"), np.ones((8, 1), "float32")


class Counted(keras.layers.Dense):
    """Counts how often Python runs through it in training."""

    traces = 0

    def call(self, inputs, training=False):
        self.traces += bool(training)
        return super().call(inputs)


def compiled():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), Counted(1)])
    model.compile("adam", "mse", jit_compile=False)
    return model


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the others trace once, or not at all")
def test_tensorflow_traces_the_step_once_and_without_it_twice():
    traces = []
    for build in (lambda model: None, build_optimizer):
        model = compiled()
        build(model)
        model.fit(X, Y, verbose=0)
        traces.append(model.layers[0].traces)
    assert traces == [2, 1]


def test_the_training_stays_the_same():
    losses = []
    for build in (lambda model: None, build_optimizer):
        model = compiled()
        build(model)
        losses.append(model.fit(X, Y, epochs=3, verbose=0, shuffle=False).history["loss"])
    assert losses[1] == losses[0]


def test_a_model_that_is_not_built_is_left_to_keras():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("adam", "mse")
    build_optimizer(model)
    assert not model.optimizer.built
    model.fit(X, Y, verbose=0)
    assert model.optimizer.built


def test_a_model_that_is_not_compiled_stays_as_it_is():
    build_optimizer(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]))
