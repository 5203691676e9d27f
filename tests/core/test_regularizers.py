"""Penalties against closed forms and known distributions."""

import numpy as np
import pytest

from keras_usm_lite.core.regularizers import kurtosis_error, quantization_error


def test_quantization_error_is_the_mean_square_distance():
    rng = np.random.default_rng(0)
    weights, quantized = rng.normal(size=(2, 8, 3)).astype("float32")
    assert float(quantization_error(weights, quantized)) == pytest.approx(np.mean((weights - quantized) ** 2), rel=1e-5)


def test_kurtosis_is_right_for_uniform_and_gaussian_channels():
    rng = np.random.default_rng(0)
    assert float(kurtosis_error(rng.uniform(-1, 3, size=(200000, 2)))) == pytest.approx(0.0, abs=1e-3)
    assert float(kurtosis_error(rng.normal(2, 5, size=(200000, 2)))) == pytest.approx(1.44, rel=0.05)


def test_an_all_zero_channel_is_finite():
    assert np.isfinite(float(kurtosis_error(np.zeros((8, 2)))))
