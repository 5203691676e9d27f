"""FiniteLoss: a loss that is no number ends the training with an error that says when."""

import keras
import numpy as np
import pytest

from keras_usm_lite.callbacks import FiniteLoss, NonFiniteError


class Synchronous(keras.callbacks.Callback):
    """With this in the list, Keras calls no callback in another thread."""

    def on_train_batch_end(self, batch, logs=None):
        pass


def fit(x, callbacks, epochs=3):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(x, np.ones((len(x), 1)), epochs=epochs, batch_size=1, shuffle=False, verbose=0, callbacks=callbacks)


@pytest.mark.parametrize("others", [[], [Synchronous()]])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_error_names_value_batch_and_epoch_and_what_to_do(value, others):
    x = np.ones((6, 2))
    x[4] = value
    with pytest.raises(NonFiniteError, match="The loss is (nan|inf) after batch 4 of epoch 0.*lower the learning rate"):
        fit(x, [FiniteLoss(), *others])


def test_weights_that_the_last_step_spoils_are_noticed():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e38), "mse")
    with pytest.raises(NonFiniteError, match="is not finite after the last step.*lower the learning rate"):
        model.fit(np.full((1, 2), 30.0), np.full((1, 1), 1e3), verbose=0, callbacks=[FiniteLoss()])


def test_a_finite_training_is_left_alone():
    fit(np.ones((6, 2)), [FiniteLoss()])


def test_it_never_makes_the_device_wait():
    assert keras.callbacks.CallbackList([FiniteLoss()])._async_train == keras.callbacks.CallbackList([])._async_train
