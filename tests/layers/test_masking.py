"""Frame masks: the first `length` frames are real, everything else becomes zero and nothing else changes."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_usm_lite.layers.masking import frame_mask, zero_padding


def array(tensor):
    return ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("make", [list, np.array, lambda v: ops.convert_to_tensor(v, "int32")])
def test_mask_marks_the_first_frames_of_each_row(make):
    mask = array(frame_mask(make([0, 1, 4, 5]), 5))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, np.arange(5) < np.array([[0], [1], [4], [5]]))


def test_lengths_outside_of_the_batch_mean_none_or_all_frames():
    np.testing.assert_array_equal(array(frame_mask([-2, 9], 3)), [[False] * 3, [True] * 3])


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_padded_frames_become_zero_and_real_ones_are_untouched(shape):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    zeroed = array(zero_padding(ops.convert_to_tensor(x), frame_mask([1, 3], 3)))
    np.testing.assert_array_equal(zeroed[0, :1], x[0, :1])
    np.testing.assert_array_equal(zeroed[1], x[1])
    assert not zeroed[0, 1:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_the_type_of_the_values_is_kept(dtype):
    x = zero_padding(ops.ones((1, 2, 3), dtype), frame_mask([1], 2))
    assert keras.backend.standardize_dtype(x.dtype) == dtype


def test_no_mask_means_no_padding():
    x = ops.ones((1, 2, 3))
    assert zero_padding(x, None) is x
