"""SpecAugment: what it hides, how much of it, how often, and what it leaves alone."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.testing import TestCase

import keras_usm_lite as usm
from keras_usm_lite.layers.masking import frame_mask


def array(tensor):
    return ops.convert_to_numpy(tensor)


def hidden(layer, shape, lengths=None):
    """Where the layer put zeros in `[batch, frames, bins]` of ones."""
    mask = None if lengths is None else frame_mask(lengths, shape[1])
    return array(layer(ops.ones(shape), mask=mask, training=True)) == 0


def bands(**kwargs):
    return usm.SpecAugment(time_masks=0, seed=0, **kwargs)


def spans(**kwargs):
    return usm.SpecAugment(frequency_masks=0, seed=0, **kwargs)


def runs(row):
    """Number of separate stretches of True."""
    return int(np.sum(np.diff(row.astype(int), prepend=0) == 1))


def cover(size, widest):
    """Chance of each of `size` positions to lie in one interval of uniform width `0..widest` and uniform start."""
    position = np.arange(size)
    by_width = [
        np.mean([(start <= position) & (position < start + width) for start in range(size - width + 1)], axis=0)
        for width in range(widest + 1)
    ]
    return np.mean(by_width, axis=0)


class LayerContract(TestCase):
    def test_spec_augment_keeps_every_promise_of_a_keras_layer(self):
        self.run_layer_test(
            usm.SpecAugment,
            init_kwargs={"frequency_masks": 1, "frequency_width": 3, "time_masks": 2, "time_share": 0.2, "seed": 1},
            input_shape=(2, 20, 8),
            expected_output_shape=(2, 20, 8),
            expected_num_trainable_weights=0,
            expected_num_non_trainable_weights=0,
            expected_num_non_trainable_variables=1,
            expected_num_seed_generators=1,
            expected_num_losses=0,
            supports_masking=True,
        )


def test_inference_is_the_identity():
    x = np.random.default_rng(0).normal(size=(2, 50, 16)).astype("float32")
    layer = usm.SpecAugment(seed=0)
    for training in (None, False):
        np.testing.assert_array_equal(array(layer(x, training=training)), x)


def test_what_is_not_hidden_is_unchanged_and_some_of_it_is_hidden():
    x = 5 + np.random.default_rng(0).normal(size=(8, 50, 16)).astype("float32")
    y = array(usm.SpecAugment(frequency_width=6, time_share=0.2, seed=0)(x, training=True))
    np.testing.assert_array_equal(y, np.where(y == 0, 0, x))
    assert 0.05 < np.mean(y == 0) < 0.95


def test_masks_hide_whole_bands_and_whole_frames():
    zeros = hidden(usm.SpecAugment(frequency_width=6, time_share=0.2, seed=0), (8, 50, 16))
    band, span = zeros.all(axis=1, keepdims=True), zeros.all(axis=2, keepdims=True)
    np.testing.assert_array_equal(zeros, band | span)


@pytest.mark.parametrize("count, width", [(1, 5), (2, 3), (3, 1), (0, 9), (4, 0)])
def test_bands_are_no_more_and_no_wider_than_asked_for(count, width):
    zeros = hidden(bands(frequency_masks=count, frequency_width=width), (500, 2, 40))[:, 0]
    assert zeros.sum(axis=1).max() == count * width  # reached by some of 500 draws, passed by none
    assert max(runs(row) for row in zeros) == (count if width else 0)


@pytest.mark.parametrize("count, share", [(1, 0.1), (2, 0.05), (3, 0.025), (0, 0.5), (4, 0.0)])
def test_spans_are_no_more_and_no_wider_than_asked_for(count, share):
    zeros = hidden(spans(time_masks=count, time_share=share), (500, 40, 2))[:, :, 0]
    assert zeros.sum(axis=1).max() == count * round(share * 40)
    assert max(runs(row) for row in zeros) == (count if share else 0)


@pytest.mark.parametrize("length", [5, 19, 30, 50, 99])
def test_a_span_never_exceeds_its_share_of_the_utterance(length):
    zeros = hidden(spans(time_masks=1, time_share=0.05), (1000, length, 1))[:, :, 0]
    assert zeros.sum(axis=1).max() == int(0.05 * length)


def test_spans_lie_in_the_utterance_and_scale_with_its_length():
    lengths = np.repeat([10, 20, 40], 300)
    zeros = hidden(spans(time_masks=1, time_share=0.5), (900, 40, 1), lengths)[:, :, 0]
    assert not np.any(zeros & (np.arange(40) >= lengths[:, None]))
    for length in (10, 20, 40):
        assert zeros[lengths == length].sum(axis=1).max() == length // 2


def test_each_bin_is_hidden_as_often_as_the_definition_says():
    zeros = hidden(bands(frequency_masks=2, frequency_width=6), (6000, 1, 20))[:, 0]
    np.testing.assert_allclose(zeros.mean(axis=0), 1 - (1 - cover(20, 6)) ** 2, atol=0.03)


def test_each_frame_is_hidden_as_often_as_the_definition_says():
    zeros = hidden(spans(time_masks=3, time_share=0.25), (6000, 24, 1), np.full(6000, 16))[:, :, 0]
    np.testing.assert_allclose(zeros[:, :16].mean(axis=0), 1 - (1 - cover(16, 4)) ** 3, atol=0.03)


def test_a_band_wider_than_the_features_hides_at_most_everything():
    zeros = hidden(bands(frequency_masks=1, frequency_width=27), (200, 1, 8))[:, 0]
    assert zeros.all(axis=1).any() and not zeros.all()


def test_utterances_and_steps_differ_but_a_seed_repeats_them():
    first, again = (usm.SpecAugment(seed=7) for _ in range(2))
    step_1, step_2 = (hidden(first, (4, 100, 80)) for _ in range(2))
    assert np.any(step_1 != step_2) and np.any(step_1[0] != step_1[1])
    np.testing.assert_array_equal(hidden(again, (4, 100, 80)), step_1)
    np.testing.assert_array_equal(hidden(again, (4, 100, 80)), step_2)


def test_16_bit_features_stay_16_bit():
    y = usm.SpecAugment(dtype="mixed_bfloat16")(ops.ones((2, 30, 8), "bfloat16"), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"


def test_shapes_are_known_before_any_value_is():
    assert usm.SpecAugment()(keras.Input((100, 80), batch_size=4), training=True).shape == (4, 100, 80)
    assert usm.SpecAugment()(keras.Input((None, 80)), training=True).shape == (None, None, 80)


def test_bad_arguments_are_refused_with_their_value():
    with pytest.raises(ValueError, match="time_share.*between 0 and 1, got 1.5"):
        usm.SpecAugment(time_share=1.5)
    with pytest.raises(ValueError, match="must not be negative, got -1, 27, 5"):
        usm.SpecAugment(frequency_masks=-1)
    with pytest.raises(ValueError, match="must not be negative, got 2, -3, 5"):
        usm.SpecAugment(frequency_width=-3)
    with pytest.raises(ValueError, match="must not be negative, got 2, 27, -2"):
        usm.SpecAugment(time_masks=-2)
