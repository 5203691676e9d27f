"""Kernels of any shape and the matrix they are."""

import numpy as np
import pytest
from keras import ops

from keras_usm_lite.core.matrix_view import MatrixView

VIEWS = [
    MatrixView((6, 4), (0,), (1,)),
    MatrixView((3, 8, 5), (0, 1), (2,)),
    MatrixView((10, 4), (1,), (0,)),
    MatrixView((4, 2, 3), (1,), (0, 2)),
    MatrixView((2, 3, 4, 5), (0, 2), (1, 3)),
]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: str(view.shape))
def test_a_kernel_comes_back_from_its_matrix_bit_for_bit(view):
    kernel = np.random.default_rng(0).normal(size=view.shape).astype("float32")
    matrix = view.to_matrix(ops.convert_to_tensor(kernel))
    assert tuple(matrix.shape) == (view.rows, view.columns)
    np.testing.assert_array_equal(ops.convert_to_numpy(view.from_matrix(matrix)), kernel)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: str(view.shape))
def test_columns_of_the_matrix_are_outputs_and_rows_are_summed_over(view):
    kernel = np.random.default_rng(0).normal(size=view.shape)
    sums = ops.convert_to_numpy(view.to_matrix(ops.convert_to_tensor(kernel, "float32"))).sum(axis=0)
    np.testing.assert_allclose(sums, kernel.sum(axis=view.reduced).reshape(-1), rtol=1e-4, atol=1e-5)
