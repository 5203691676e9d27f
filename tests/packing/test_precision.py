"""Reduced precision: the error never exceeds the bound that the docstring states, and comes close to it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from keras_usm_lite.packing.precision import (
    SCALE_ERROR,
    check_scale,
    reduce,
    reduced_arrays,
    restore,
    round_scale,
    stored_type,
)

SCALES = st.floats(2.0**-14, 65504, width=32)


@settings(max_examples=150, deadline=None)
@given(arrays_of.arrays("float32", (3, 4), elements=SCALES), st.sampled_from(list(SCALE_ERROR)))
def test_a_rounded_scale_is_within_its_relative_bound(scale, precision):
    rounded = round_scale(scale, precision)
    assert rounded.dtype.name == precision
    assert np.all(np.abs(rounded.astype("float64") - scale) <= SCALE_ERROR[precision] * scale)


@pytest.mark.parametrize(("precision", "bound"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_the_bound_of_a_scale_is_reached(precision, bound):
    assert SCALE_ERROR[precision] == bound
    worst = np.float32([1 + bound - 2.0**-20])  # just below half way to the next number of the type
    error = abs(float(round_scale(worst, precision)[0]) - worst[0]) / worst[0]
    assert 0.99 * bound < error <= bound


def test_a_float32_scale_is_exact_and_bfloat16_holds_the_smallest():
    scale = np.float32([2.0**-100, 1e-20, 0.1, -3.0, 2.0**100])
    np.testing.assert_array_equal(round_scale(scale, "float32"), scale)
    np.testing.assert_allclose(round_scale(scale, "bfloat16").astype("float32"), scale, rtol=2.0**-8)


@pytest.mark.parametrize("scale", [1.1e-5, 65536.0, 1e-9])
def test_a_scale_that_float16_cannot_hold_is_refused_with_the_way_out(scale):
    with pytest.raises(ValueError, match="cannot be stored in float16.*scales='bfloat16' or 'float32'"):
        round_scale(np.float32([0.1, scale]), "float16")


@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf, -np.inf, 1e-38, 1e38])
def test_a_scale_that_is_no_scale_is_refused(scale):
    for refuse in (check_scale, lambda array: round_scale(array, "float32")):
        with pytest.raises(ValueError, match="not a number of a magnitude between"):
            refuse(np.float32([0.1, scale]))


SHAPES = st.sampled_from([(3, 5), (1, 7), (2, 3, 2, 2), (4, 1), (2, 0), (5,), (0,)])


@settings(max_examples=100, deadline=None)
@given(st.data(), SHAPES)
def test_int8_is_within_its_bound_row_by_row(data, shape):
    elements = st.one_of(st.just(0.0), st.floats(2.0**-99, 2.0**99, width=32), st.floats(-1.0, -(2.0**-9), width=32))
    array = data.draw(arrays_of.arrays("float32", shape, elements=elements))
    parts = reduce(array, "int8", vectors="int8")
    assert {suffix: (part.dtype.name, part.shape) for suffix, part in parts.items()} == reduced_arrays(
        shape, "float32", "int8"
    )
    restored = restore(parts, "float32")
    rows = array.reshape(1 if array.ndim == 1 else len(array), -1).astype("float64")
    bound = np.abs(rows).max(axis=1, initial=0) / 254 * (1 + 2.0**-16)  # the products are float32
    assert np.all(np.abs(restored.reshape(rows.shape) - rows) <= bound[:, None])
    assert restored.dtype == np.float32 and restored.shape == shape


@settings(max_examples=100, deadline=None)
@given(arrays_of.arrays("float32", (2, 6), elements=st.floats(-65504, 65504, width=32)))
def test_float16_is_within_its_bound(array):
    restored = restore(reduce(array, "float16"), "float32")
    wide = array.astype("float64")
    assert restored.dtype == np.float32
    assert np.all(np.abs(restored - wide) <= np.maximum(2.0**-11 * np.abs(wide), 2.0**-25))


def test_a_row_of_zeros_stays_zero():
    assert not restore(reduce(np.zeros((2, 3), "float32"), "int8"), "float32").any()


@pytest.mark.parametrize("others", ["float32", "float16", "int8"])
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32", "int64", "float16", "float64"])
def test_only_float32_is_reduced(dtype, others):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    assert stored_type(dtype, 2, others) == dtype
    assert reduced_arrays((2, 3), dtype, dtype) == {"": (dtype, (2, 3))}
    parts = reduce(array, others)
    assert list(parts) == [""] and restore(parts, dtype).dtype == dtype
    np.testing.assert_array_equal(restore(parts, dtype), array)


def test_vectors_and_scalars_are_float16_where_matrices_are_int8():
    for array in (np.float32([1e-9, 5.0]), np.float32(3.3)):
        parts = reduce(array, "int8")
        assert list(parts) == [""] and parts[""].dtype == np.float16
        np.testing.assert_array_equal(parts[""], array.astype("float16"))


@pytest.mark.parametrize("others", ["float32", "float16", "int8"])
def test_the_type_of_vectors_can_be_chosen_by_itself(others):
    for vectors in ("float32", "float16", "int8"):
        assert reduce(np.float32([1.0, 0.3]), others, vectors)[""].dtype == vectors
        for array in (np.float32([[1.0, 0.3]]), np.float32(1.0)):  # no vectors
            assert reduce(array, others, vectors)[""].dtype == reduce(array, others)[""].dtype


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"70000 is beyond float16.*others='float32'"):
        reduce(np.float32([1, 70000]), "float16")
    with pytest.raises(ValueError, match="not finite, which int8 cannot"):
        reduce(np.float32([[1, np.nan]]), "int8")
    with pytest.raises(ValueError, match=r"70000 is beyond float16.*vectors='float32'"):
        reduce(np.float32([1, 70000]), "int8", vectors="float16")
    with pytest.raises(ValueError, match=r"not finite, which int8 cannot.*vectors='float32'"):
        reduce(np.float32([1, np.nan]), "float32", vectors="int8")
    assert np.isnan(reduce(np.float32([np.nan]), "float16")[""]).all()


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_row_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match="row scale"):
        restore({"": np.ones((1, 2), "int8"), ".row_scale": np.float32([scale])}, "float32")
