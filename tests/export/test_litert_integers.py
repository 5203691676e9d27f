"""Trained integers are found among the matrices of a file by their values, whatever they are called there."""

import types

import numpy as np
import pytest

from keras_usm_lite.export.litert_integers import match_kernels
from keras_usm_lite.export.parity_error import ParityError

DRAW = np.random.default_rng(0)


def matrix(values, path="layer"):
    return types.SimpleNamespace(values=np.asarray(values, np.float32), path=path)


def test_a_kernel_is_found_with_the_power_of_two_that_the_converter_multiplied_into_it():
    kernels = [matrix(DRAW.normal(size=(4, 8)), path) for path in ("a", "b")]
    weights = [matrix(kernels[1].values / 2), matrix(DRAW.normal(size=(4, 8))), matrix(kernels[0].values)]
    matched = match_kernels(weights, kernels)
    assert [(kernel.path, factor) for _, kernel, factor in matched] == [("b", 0.5), ("a", 1.0)]


def test_kernels_of_equal_values_take_one_matrix_each():
    values = DRAW.normal(size=(4, 8))
    matched = match_kernels([matrix(values), matrix(values)], [matrix(values, "a"), matrix(values, "b")])
    assert [kernel.path for _, kernel, _ in matched] == ["a", "b"]


def test_a_kernel_that_the_converter_changed_is_named_with_the_usual_cause():
    kernel = matrix(DRAW.normal(size=(4, 8)), "model/dense")
    with pytest.raises(ParityError, match="model/dense.*BatchNormalization"):
        match_kernels([matrix(kernel.values * 1.1)], [kernel])
