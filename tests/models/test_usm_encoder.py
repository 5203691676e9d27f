"""USMEncoder: shapes, masks, reach in time, and that an utterance is the same alone and in a padded batch."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.testing import TestCase

import keras_usm_lite as usm
from keras_usm_lite.layers.masking import frame_mask

BINS = 8
SIZE = {"num_layers": 2, "dim": 16, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4}
COMPRESSED = {"quantization": "int4", "sparsity": "2:4"}


def array(tensor):
    return ops.convert_to_numpy(tensor)


def built(**kwargs):
    """An encoder whose biases are not zero, so that padding would be heard if it could."""
    keras.utils.set_random_seed(0)
    encoder = usm.USMEncoder(**SIZE, **kwargs)
    encoder.build((None, None, BINS))
    draw = np.random.default_rng(0)
    for weight in encoder.trainable_variables:
        weight.assign(array(weight) + 0.2 * draw.normal(size=weight.shape))
    for layer in encoder._flatten_layers():
        if isinstance(layer, usm.QuantDense) and layer.sparsity:
            layer.update_mask()
    return encoder


def features(*shape):
    return np.random.default_rng(1).normal(size=(*shape, BINS)).astype("float32")


class LayerContract(TestCase):
    def test_usm_encoder_keeps_every_promise_of_a_keras_layer(self):
        self.run_layer_test(
            usm.USMEncoder,
            init_kwargs={**SIZE, "num_layers": 1, "chunk_size": 2, "causal_conv": True, **COMPRESSED},
            input_shape=(2, 9, BINS),
            expected_output_shape=(2, 3, 16),
            expected_num_trainable_weights=6 + 29,
            expected_num_non_trainable_weights=5 + 50,
            expected_num_seed_generators=1 + 4,
            expected_num_losses=0,
            supports_masking=True,
        )


def test_dropout_of_everything_leaves_the_norms_of_silence_in_training():
    encoder = built(dropout=1 - 1e-7)
    x = features(1, 16)
    y = np.zeros((1, 4, SIZE["dim"]))
    for block in encoder.blocks:
        y = block.norm(y)
    np.testing.assert_allclose(array(encoder(x, training=True)), array(y), rtol=1e-5, atol=1e-5)
    assert np.abs(array(encoder(x)) - array(y)).max() > 0.1


def test_the_encoder_is_subsampling_followed_by_its_blocks():
    encoder = built()
    x = features(1, 16)
    expected = encoder.subsampling(x)
    for block in encoder.blocks:
        expected = block(expected)
    assert len(encoder.blocks) == 2
    np.testing.assert_allclose(array(encoder(x)), array(expected), rtol=1e-5, atol=1e-5)


def test_an_utterance_is_the_same_alone_and_in_a_padded_batch():
    encoder = built(**COMPRESSED)
    lengths = [20, 14, 7]
    x = features(3, 20)
    y = array(encoder(x, mask=frame_mask(lengths, 20)))
    for row, source, length in zip(y, x, lengths, strict=True):
        alone = array(encoder(source[None, :length]))[0]
        np.testing.assert_allclose(row[: len(alone)], alone, rtol=1e-5, atol=5e-5)
    assert np.abs(array(encoder(x))[1, :3] - y[1, :3]).max() > 1e-3  # without the mask it would be heard


@pytest.mark.parametrize("chunk_size", [2, 3])
def test_a_streaming_encoder_of_any_depth_hears_no_further_than_its_chunk(chunk_size):
    encoder = built(chunk_size=chunk_size, causal_conv=True)
    x = features(1, 24)
    later = x.copy()
    later[:, 4 * chunk_size - 3 :] += 1.0  # the first input frame after the last one of the first chunk
    first, rest = np.split(np.abs(array(encoder(later)) - array(encoder(x)))[0], [chunk_size])
    np.testing.assert_allclose(first, 0, atol=1e-5)
    assert rest.max() > 0.1


def test_a_mask_made_by_keras_is_obeyed_and_handed_on():
    inputs = keras.Input((None, BINS))
    encoder = built()
    outputs = encoder(keras.layers.Masking()(inputs))
    assert outputs.shape == (None, None, 16)
    model = keras.Model(inputs, [outputs, keras.layers.GlobalAveragePooling1D()(outputs)])
    x = features(1, 20)
    alone = array(encoder(x[:, :14]))
    x[:, 14:] = 0
    frames, average = model.predict(x, verbose=0)
    np.testing.assert_allclose(frames[:, :4], alone, rtol=1e-5, atol=5e-5)
    np.testing.assert_allclose(average, alone.mean(axis=1), rtol=1e-5, atol=5e-5)


def test_dropout_acts_in_training_only():
    encoder = built(dropout=0.5)
    x = features(1, 16)
    np.testing.assert_array_equal(array(encoder(x, training=False)), array(encoder(x)))
    assert np.abs(array(encoder(x, training=True)) - array(encoder(x))).max() > 0.1
