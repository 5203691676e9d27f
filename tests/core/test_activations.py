"""Eight-bit activations: the arithmetic of LiteRT's dynamic-range kernels."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops

from keras_usm_lite.core.activations import affine_parameters, input_range, quantize_inputs

ROWS = hnp.arrays(np.float32, (3, 8), elements=st.floats(-100, 100, width=32))


def array(tensor):
    return ops.convert_to_numpy(tensor)


@given(ROWS)
def test_the_error_is_at_most_half_a_step_inside_the_range_and_one_step_at_its_ends(inputs):
    low, high = input_range(inputs)
    scale, _ = affine_parameters(low, high)
    scale, low, high = array(scale), array(low), array(high)
    error = np.abs(array(quantize_inputs(ops.convert_to_tensor(inputs), low, high)) - inputs)
    inside = (inputs > low + scale) & (inputs < high - scale)  # the zero point is rounded, which moves the ends
    assert np.all(error <= np.where(inside, 0.501, 1.001) * scale + 1e-6)


@given(ROWS)
def test_zero_stays_zero_and_the_zero_point_is_a_code(inputs):
    inputs[:, 0] = 0.0
    low, high = input_range(inputs)
    _, zero_point = affine_parameters(low, high)
    zero_point = array(zero_point)
    assert np.all(zero_point == np.round(zero_point)) and zero_point.min() >= -128 and zero_point.max() <= 127
    assert np.all(array(quantize_inputs(ops.convert_to_tensor(inputs), low, high))[:, 0] == 0.0)


@pytest.mark.parametrize(("low", "high", "zero_point"), [(-1.0, 0.0, 127), (0.0, 1.0, -128), (-1.0, 1.0, 0)])
def test_one_sided_ranges_use_every_code(low, high, zero_point):
    scale, found = affine_parameters(ops.convert_to_tensor(low), ops.convert_to_tensor(high))
    assert float(scale) == pytest.approx((high - low) / 255)
    assert abs(float(found) - zero_point) <= 1  # an exact half may round either way


def test_tokens_of_zeros_stay_zeros():
    zeros = ops.zeros((2, 4))
    assert not array(quantize_inputs(zeros, *input_range(zeros))).any()


def test_each_token_has_its_own_range():
    inputs = np.array([[1.0, -0.5], [100.0, 3.3]], "float32")
    together = array(quantize_inputs(ops.convert_to_tensor(inputs), *input_range(inputs)))
    alone = array(quantize_inputs(ops.convert_to_tensor(inputs[:1]), *input_range(inputs[:1])))
    np.testing.assert_allclose(together[:1], alone, rtol=1e-6)


def test_the_type_of_the_inputs_is_kept():
    inputs = ops.cast(ops.ones((2, 4)), "bfloat16")
    assert keras.backend.standardize_dtype(quantize_inputs(inputs, *input_range(inputs)).dtype) == "bfloat16"
