"""LightConv: a numpy closed form is the judge; which frames are seen, and that padding is not among them."""

import numpy as np
import pytest
from keras import ops
from keras.src.testing import TestCase

from keras_usm_lite.layers.light_conv import LightConv
from keras_usm_lite.layers.masking import frame_mask

DIM = 8


def array(tensor):
    return ops.convert_to_numpy(tensor)


def built(kernel_size, causal=False, **kwargs):
    """A layer whose biases are not zero, so that padding would be heard if it could."""
    layer = LightConv(kernel_size, causal, **kwargs)
    layer.build((None, None, DIM))
    draw = np.random.default_rng(0)
    for weight in layer.trainable_variables:
        weight.assign(draw.normal(size=weight.shape))
    return layer


def frames(*shape):
    return np.random.default_rng(1).normal(size=(*shape, DIM)).astype("float32")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normalised(x, norm):
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    return x * array(norm.gamma) + array(norm.beta)


def expected_light_conv(layer, x, seen_before):
    """The module on `[frames, dim]`; frame `t` sees frames from `t - seen_before` on."""
    value, gate = np.split(normalised(x, layer.norm) @ array(layer.expand.effective_kernel()), 2, axis=-1)
    bias_value, bias_gate = np.split(array(layer.expand.bias), 2)
    gated = (value + bias_value) * sigmoid(gate + bias_gate)
    kernel = array(layer.depthwise.kernel)[..., 0]
    padded = np.pad(gated, ((seen_before, len(kernel)), (0, 0)))
    convolved = np.stack([(padded[t : t + len(kernel)] * kernel).sum(axis=0) for t in range(len(x))])
    hidden = normalised(convolved, layer.conv_norm)
    return hidden * sigmoid(hidden) @ array(layer.project.effective_kernel()) + array(layer.project.bias)


class LayerContract(TestCase):
    def test_light_conv_keeps_every_promise_of_a_keras_layer(self):
        self.run_layer_test(
            LightConv,
            init_kwargs={"kernel_size": 3, "causal": True, "quantization": "int4", "sparsity": "2:4"},
            input_shape=(2, 5, 8),
            expected_output_shape=(2, 5, 8),
            expected_num_trainable_weights=9,
            expected_num_non_trainable_weights=10,
            expected_num_seed_generators=1,
            expected_num_losses=0,
            supports_masking=True,
        )


@pytest.mark.parametrize("compression", [{}, {"quantization": "int4", "sparsity": "2:4"}])
@pytest.mark.parametrize("kernel_size", [1, 4, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_the_layer_is_its_equation(causal, kernel_size, compression):
    layer = built(kernel_size, causal, **compression)
    if compression:
        layer.expand.update_mask(), layer.project.update_mask()
    x = frames(2, 9)
    seen_before = kernel_size - 1 if causal else (kernel_size - 1) // 2
    expected = [expected_light_conv(layer, row, seen_before) for row in x]
    np.testing.assert_allclose(array(layer(x)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "kernel_size, causal, before, after",
    [(5, True, 4, 0), (5, False, 2, 2), (4, True, 3, 0), (4, False, 1, 2), (1, False, 0, 0)],
)
def test_a_frame_sees_its_window_and_nothing_else(kernel_size, causal, before, after):
    length = 12
    x = np.repeat(frames(1, length), length + 1, axis=0)
    x[np.arange(length), np.arange(length), 0] += 3.0  # row s differs from the last row in frame s alone
    y = array(built(kernel_size, causal)(x))
    changed = np.abs(y[:-1] - y[-1:]).max(axis=-1) > 1e-4
    source, output = np.arange(length)[:, None], np.arange(length)
    np.testing.assert_array_equal(changed, (output - before <= source) & (source <= output + after))


@pytest.mark.parametrize("compression", [{}, {"quantization": "int4", "sparsity": "2:4"}])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_never_heard(causal, compression):
    layer = built(5, causal, **compression)
    if compression:
        layer.expand.update_mask(), layer.project.update_mask()
    lengths = [9, 7, 1]
    x = frames(3, 9)
    y = array(layer(x, mask=frame_mask(lengths, 9)))
    for row, source, length in zip(y, x, lengths, strict=True):
        np.testing.assert_allclose(row[:length], array(layer(source[None, :length]))[0], rtol=1e-4, atol=1e-4)
    if not causal:  # without the mask it would be heard
        assert np.abs(array(layer(x))[1, :7] - y[1, :7]).max() > 0.1


def test_dropout_acts_in_training_only():
    layer = built(3, dropout=0.5)
    x = frames(2, 50)
    np.testing.assert_array_equal(array(layer(x, training=False)), array(layer(x)))
    assert 0.4 < np.mean(array(layer(x, training=True)) == 0) < 0.6


def test_a_kernel_without_frames_is_refused():
    with pytest.raises(ValueError, match="kernel_size must be at least 1 frame, got 0"):
        LightConv(0)


@pytest.mark.parametrize("kernel_size", [1, 2, 5])
def test_steps_of_a_causal_layer_give_the_frames_of_the_whole(kernel_size):
    layer = built(kernel_size, causal=True)
    x, lengths = frames(2, 9), [9, 8]
    whole = array(layer(x, mask=frame_mask(lengths, 9)))
    (shape,) = layer.past_shapes(x.shape[-1])
    past, found = np.zeros((2, *shape), "float32"), []
    for begin, end in [(0, 4), (4, 5), (5, 9)]:
        mask = frame_mask(np.clip(np.array(lengths) - begin, 0, None), end - begin)
        outputs, past = layer.step(x[:, begin:end], past, mask)
        found.append(array(outputs))
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=1e-4, atol=1e-4)


def test_a_layer_that_sees_the_future_cannot_step():
    with pytest.raises(ValueError, match="frames of the future.*causal_conv=True"):
        built(3).step(frames(1, 4), np.zeros((1, 2, frames(1, 4).shape[-1])))
