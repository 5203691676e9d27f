"""ConvSubsampling: how many frames come out, which inputs each of them sees, and that padding is never heard."""

import math

import numpy as np
import pytest
from keras import ops
from keras.src.testing import TestCase

from keras_usm_lite.layers.conv_subsampling import ConvSubsampling
from keras_usm_lite.layers.masking import frame_mask

BINS = 8


def array(tensor):
    return ops.convert_to_numpy(tensor)


def built(**kwargs):
    """A layer whose biases are not zero, so that padding would be heard if it could."""
    layer = ConvSubsampling(6, channels=4, **kwargs)
    layer.build((None, None, BINS))
    draw = np.random.default_rng(0)
    for weight in layer.trainable_variables:
        weight.assign(0.5 * draw.normal(size=weight.shape))
    return layer


def features(*shape):
    return np.random.default_rng(1).normal(size=(*shape, BINS)).astype("float32")


class LayerContract(TestCase):
    def test_conv_subsampling_keeps_every_promise_of_a_keras_layer(self):
        self.run_layer_test(
            ConvSubsampling,
            init_kwargs={"units": 6, "channels": 4, "quantization": "int4", "sparsity": "2:4"},
            input_shape=(2, 9, BINS),
            expected_output_shape=(2, 3, 6),
            expected_num_trainable_weights=6,
            expected_num_non_trainable_weights=5,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=True,
        )


@pytest.mark.parametrize("frames", range(1, 14))
def test_an_utterance_of_t_frames_has_half_of_half_of_them_rounded_up(frames):
    layer = built()
    expected = math.ceil(math.ceil(frames / 2) / 2)
    assert tuple(layer(features(1, frames)).shape) == (1, expected, 6)
    assert layer.compute_output_shape((1, frames, BINS)) == (1, expected, 6)
    mask = array(layer.compute_mask(None, frame_mask([frames], 13)))
    np.testing.assert_array_equal(mask[0], np.arange(4) < expected)


def test_any_number_of_frames_is_allowed_in_a_graph():
    assert built().compute_output_shape((None, None, BINS)) == (None, None, 6)
    assert built().compute_mask(None, None) is None


def test_output_frame_t_sees_inputs_from_4t_minus_6_to_4t():
    frames = 21
    x = np.repeat(features(1, frames), frames + 1, axis=0)
    x[np.arange(frames), np.arange(frames)] += 1.0  # row s differs from the last row in frame s alone
    y = array(built()(x))
    changed = np.abs(y[:-1] - y[-1:]).max(axis=-1) > 1e-6
    source, output = np.arange(frames)[:, None], np.arange(y.shape[1])
    np.testing.assert_array_equal(changed, (4 * output - 6 <= source) & (source <= 4 * output))


def swish(x):
    return x / (1 + np.exp(-x))


def convolve(x, kernel, bias):
    """3 x 3 convolution with stride 2 of `[frames, bins, channels]`: two zeros before the first frame, one bin each
    side."""
    x = np.pad(x, ((2, 0), (1, 1), (0, 0)))
    rows, columns = (x.shape[0] - 1) // 2, (x.shape[1] - 1) // 2
    patches = [[x[2 * r : 2 * r + 3, 2 * c : 2 * c + 3] for c in range(columns)] for r in range(rows)]
    return swish(np.einsum("rcijk,ijko->rco", np.array(patches), kernel) + bias)


def test_the_layer_is_its_equation():
    layer = built()
    x = features(1, 11)
    y = x[0, :, :, None]
    for conv in layer.convs:
        y = convolve(y, array(conv.kernel), array(conv.bias))
    expected = y.reshape(len(y), -1) @ array(layer.projection.kernel) + array(layer.projection.bias)
    np.testing.assert_allclose(array(layer(x))[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compression", [{}, {"quantization": "int4", "sparsity": "2:4"}])
def test_padding_behind_an_utterance_is_never_heard(compression):
    layer = built(**compression)
    if compression:
        layer.projection.update_mask()
    lengths = [1, 6, 7, 8, 9]
    x = 10 * features(len(lengths), 16)  # the padding is as loud as the speech
    for row, source, length in zip(array(layer(x)), x, lengths, strict=True):
        alone = array(layer(source[None, :length]))[0]
        np.testing.assert_allclose(row[: len(alone)], alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("steps", [[3], [1, 1, 1], [1, 2]])
def test_steps_give_the_frames_of_the_whole(steps):
    layer = built()
    x = features(2, 12)
    stream = np.concatenate([np.zeros((2, 3, BINS), "float32"), x], axis=1)  # three frames late
    pasts, found = [np.zeros((2, *shape), "float32") for shape in layer.past_shapes(BINS)], []
    for begin, end in zip(np.cumsum([0, *steps]), np.cumsum(steps), strict=False):
        started = np.full((2, 1), begin > 0, "float32")
        outputs, pasts = layer.step(stream[:, 4 * begin : 4 * end], pasts, started)
        found.append(array(outputs))
    np.testing.assert_allclose(np.concatenate(found, axis=1), array(layer(x)), rtol=1e-5, atol=1e-5)
