"""N:M masks against closed forms and hypothesis properties (the tfmot judge lives in tests/test_outside_judges.py)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import ops

from keras_usm_lite.core.nm_mask import nm_mask, nm_violations

PATTERNS = [(1, 4), (2, 4), (3, 4), (4, 8), (1, 8), (5, 16), (1, 2)]


def numpy_mask(scores, n, m):
    """The same mask by a stable sort, written independently."""
    groups = scores.reshape(-1, m, scores.shape[1])
    order = np.argsort(-groups, axis=1, kind="stable")
    mask = np.zeros_like(groups)
    np.put_along_axis(mask, order[:, :n], 1.0, axis=1)
    return mask.reshape(scores.shape)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 3),
    st.integers(1, 4),
    st.data(),
)
def test_mask_equals_a_stable_sort_even_with_ties(pattern, groups, columns, data):
    n, m = pattern
    values = st.sampled_from([0.0, 0.5, 1.0, 2.0])
    scores = data.draw(arrays(np.float32, (groups * m, columns), elements=values))
    mask = ops.convert_to_numpy(nm_mask(scores, n, m))
    np.testing.assert_array_equal(mask, numpy_mask(scores, n, m))
    assert np.all(mask.reshape(groups, m, columns).sum(axis=1) == n)


def test_mask_keeps_the_largest_magnitudes_of_random_kernels():
    scores = np.random.default_rng(0).random((64, 5)).astype("float32")
    for n, m in PATTERNS:
        np.testing.assert_array_equal(ops.convert_to_numpy(nm_mask(scores, n, m)), numpy_mask(scores, n, m))


def test_masking_twice_changes_nothing():
    kernel = np.random.default_rng(1).normal(size=(32, 3)).astype("float32")
    once = ops.convert_to_numpy(nm_mask(np.abs(kernel), 2, 4))
    twice = ops.convert_to_numpy(nm_mask(np.abs(kernel * once), 2, 4))
    np.testing.assert_array_equal(once, twice)


def test_n_may_be_a_tensor_so_that_a_compiled_step_can_change_it():
    scores = np.random.default_rng(2).random((8, 2)).astype("float32")
    for n in (1, 2, 3):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(nm_mask(scores, ops.convert_to_tensor(float(n)), 4)),
            numpy_mask(scores, n, 4),
        )


def test_rows_that_do_not_divide_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="6 inputs.*not a multiple of 4.*divisible by 4"):
        nm_mask(np.ones((6, 2)), 2, 4)


def test_violations_count_groups_that_hold_too_many_non_zeros():
    kernel = np.zeros((8, 2), "float32")
    kernel[:3, 0] = 1.0
    kernel[4:8, 1] = 1.0
    assert int(nm_violations(kernel, 2, 4)) == 2
    assert int(nm_violations(kernel, 3, 4)) == 1
    assert int(nm_violations(kernel, 4, 4)) == 0
