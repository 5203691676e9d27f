"""FeedForward: the equation, frame by frame."""

import numpy as np
import pytest
from keras import ops
from keras.src.testing import TestCase

from keras_usm_lite.layers.feed_forward import FeedForward


def array(tensor):
    return ops.convert_to_numpy(tensor)


def built(**kwargs):
    layer = FeedForward(**kwargs)
    layer.build((None, None, 8))
    draw = np.random.default_rng(0)
    for weight in layer.trainable_variables:
        weight.assign(draw.normal(size=weight.shape))
    return layer


def frames(*shape):
    return 3 + 2 * np.random.default_rng(1).normal(size=(*shape, 8)).astype("float32")


class LayerContract(TestCase):
    def test_feed_forward_keeps_every_promise_of_a_keras_layer(self):
        self.run_layer_test(
            FeedForward,
            init_kwargs={"multiplier": 2, "dropout": 0.2, "quantization": "int4", "sparsity": "2:4"},
            input_shape=(2, 5, 8),
            expected_output_shape=(2, 5, 8),
            expected_num_trainable_weights=6,
            expected_num_non_trainable_weights=10,
            expected_num_seed_generators=1,
            expected_num_losses=0,
            supports_masking=True,
        )


@pytest.mark.parametrize("compression", [{}, {"quantization": "int4", "sparsity": "2:4"}])
def test_the_layer_is_its_equation(compression):
    layer = built(**compression)
    if compression:
        layer.up.update_mask(), layer.down.update_mask()
    x = frames(2, 5)
    norm = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    norm = norm * array(layer.norm.gamma) + array(layer.norm.beta)
    up = norm @ array(layer.up.effective_kernel()) + array(layer.up.bias)
    down = up / (1 + np.exp(-up)) @ array(layer.down.effective_kernel()) + array(layer.down.bias)
    np.testing.assert_allclose(array(layer(x)), down, rtol=1e-4, atol=1e-4)


def test_each_frame_is_transformed_on_its_own():
    layer = built()
    x = frames(2, 5)
    np.testing.assert_allclose(array(layer(x[:, 2:3])), array(layer(x))[:, 2:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("multiplier", [1, 4])
def test_the_hidden_width_is_a_multiple_of_the_width(multiplier):
    layer = built(multiplier=multiplier)
    assert tuple(layer.up.kernel.shape) == (8, 8 * multiplier)
    assert tuple(layer.down.kernel.shape) == (8 * multiplier, 8)


def test_dropout_acts_in_training_only():
    layer = built(dropout=0.5)
    x = frames(2, 50)
    np.testing.assert_array_equal(array(layer(x, training=False)), array(layer(x)))
    y, kept = array(layer(x)), array(layer(x, training=True))
    assert 0.4 < np.mean(kept == 0) < 0.6
    assert np.abs(kept - 2 * y)[kept != 0].min() > 1e-6  # what is kept has lost hidden units, too
