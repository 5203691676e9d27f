"""`recomputed`: outputs, random states and losses of a plain call. Gradients: tests/test_mixed_precision.py."""

import keras
import numpy as np

import keras_usm_lite as usm
from keras_usm_lite.layers.recomputed import recomputed

INPUTS = np.ones((2, 8), "float32")


def dropouts(call):
    layer = keras.layers.Dropout(0.5, seed=3)
    layer.build(INPUTS.shape)
    return [keras.ops.convert_to_numpy(call(layer)) for _ in range(3)]


def test_random_states_advance_as_in_plain_calls():
    plain = dropouts(lambda layer: layer(INPUTS, training=True))
    again = dropouts(lambda layer: recomputed(layer, keras.ops.convert_to_tensor(INPUTS), training=True))
    np.testing.assert_array_equal(again, plain)
    assert not np.array_equal(plain[0], plain[1])


def test_losses_of_the_layer_arrive_once():
    layer = usm.QuantDense(4, usm.QuantizationConfig(2, error_loss=1.0))
    layer.build(INPUTS.shape)
    recomputed(layer, keras.ops.convert_to_tensor(INPUTS), training=True)
    (loss,) = (float(keras.ops.convert_to_numpy(loss)) for loss in layer.losses)
    kernel, quantized = map(keras.ops.convert_to_numpy, (layer.kernel, layer.effective_kernel()))
    np.testing.assert_allclose(loss, np.mean((kernel - quantized) ** 2), rtol=1e-5)


def test_a_regularizer_counts_once():
    layer = keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(1.0))
    layer.build(INPUTS.shape)
    recomputed(layer, keras.ops.convert_to_tensor(INPUTS), training=True)
    (loss,) = (float(keras.ops.convert_to_numpy(loss)) for loss in layer.losses)
    np.testing.assert_allclose(loss, np.sum(keras.ops.convert_to_numpy(layer.kernel) ** 2), rtol=1e-5)
