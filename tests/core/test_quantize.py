"""Quantizer arithmetic: closed forms, hypothesis properties and straight-through gradients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import ops

from keras_usm_lite.core.quantize import (
    CODEBOOKS,
    code_range,
    dequantize,
    expand_scale,
    quantize,
    round_codes,
    straight_through,
    train_codes,
)
from keras_usm_lite.core.scales import absmax_scale

kernels = arrays(np.float32, (8, 3), elements=st.floats(-4, 4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3))


def array(tensor):
    return ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_code_range_holds_at_most_two_to_the_bits_codes(bits, codebook):
    low, high = code_range(bits, codebook)
    count = (high - low) // 2 + 1 if codebook == "midrise" else high - low + 1
    assert count == 2**bits - (codebook == "symmetric")


@settings(max_examples=60, deadline=None)
@given(kernels, st.sampled_from([2, 3, 4, 8]), st.sampled_from(["symmetric", "full", "asymmetric"]))
def test_absmax_error_is_at_most_half_a_step_and_zero_stays_zero(kernel, bits, codebook):
    kernel[0] = 0.0
    scale, zero_point = absmax_scale(kernel, bits, codebook)
    codes = quantize(kernel, scale, zero_point, bits=bits, codebook=codebook)
    restored = array(dequantize(codes, scale, zero_point))
    step = array(scale)
    # an asymmetric zero point is rounded, which may push one end of the range out by half a step more
    slack = 1.0 if codebook == "asymmetric" else 0.5
    assert np.all(np.abs(restored - kernel) <= slack * step * (1 + 1e-5))
    assert np.all(restored[0] == 0.0)


@settings(max_examples=60, deadline=None)
@given(kernels, st.sampled_from([1, 2, 3, 4]), st.sampled_from(CODEBOOKS))
def test_quantizing_what_is_already_on_the_grid_changes_nothing(kernel, bits, codebook):
    bits = max(bits, 1 if codebook == "midrise" else 2)
    scale, zero_point = absmax_scale(kernel, bits, codebook)
    codes = array(quantize(kernel, scale, zero_point, bits=bits, codebook=codebook))
    grid = dequantize(codes, scale, zero_point)
    np.testing.assert_array_equal(array(quantize(grid, scale, zero_point, bits=bits, codebook=codebook)), codes)


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, (16,), elements=st.floats(-40, 40, width=32)), st.sampled_from(CODEBOOKS))
def test_rounding_is_monotone(values, codebook):
    codes = array(round_codes(np.sort(values), 4, codebook))
    assert np.all(np.diff(codes) >= 0)


def test_two_bit_codebooks_are_the_documented_ones():
    ramp = np.linspace(-5, 5, 101).astype("float32")
    found = {name: sorted(set(array(round_codes(ramp, 2, name)).astype(int).tolist())) for name in CODEBOOKS}
    assert found == {
        "symmetric": [-1, 0, 1],
        "full": [-2, -1, 0, 1],
        "midrise": [-3, -1, 1, 3],
        "asymmetric": [-2, -1, 0, 1],
    }


def test_midrise_codes_with_half_the_scale_are_the_four_symmetric_levels():
    levels = array(dequantize(np.array([-3, -1, 1, 3]), 0.5))
    np.testing.assert_array_equal(levels, [-1.5, -0.5, 0.5, 1.5])


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (16, 1), elements=st.floats(-100, 100, width=32)),
    st.sampled_from(CODEBOOKS),
    st.booleans(),
)
def test_training_codes_are_exactly_the_served_integers(weights, codebook, clip_gradient):
    scale = np.float32([[0.37]])
    served = array(quantize(weights, scale, bits=4, codebook=codebook))
    trained = array(train_codes(weights, scale, bits=4, codebook=codebook, clip_gradient=clip_gradient))
    np.testing.assert_array_equal(trained, served)


def test_scale_rows_serve_consecutive_inputs():
    expanded = array(expand_scale(ops.convert_to_tensor([[1.0, 2.0], [3.0, 4.0]]), 6))
    np.testing.assert_array_equal(expanded, [[1, 2]] * 3 + [[3, 4]] * 3)


def test_straight_through_takes_the_hard_value():
    np.testing.assert_array_equal(array(straight_through([0.2, 0.8], [0.0, 1.0])), [0.0, 1.0])
