"""Scale estimators against closed forms and the weight-error table of the method."""

import numpy as np
import pytest
from keras import ops

from keras_usm_lite.core.nm_mask import nm_mask
from keras_usm_lite.core.quantize import dequantize, quantize
from keras_usm_lite.core.scales import absmax_scale, estimate_scale, mean_scale, mse_scale, to_blocks


def array(tensor):
    return ops.convert_to_numpy(tensor)


def relative_error(kernel, mask=None, **settings):
    """`||w - w^||^2 / ||w||^2`, pruned weights counted as lost."""
    pruned = kernel if mask is None else kernel * mask
    scale, zero_point = estimate_scale(pruned, mask, **settings)
    bits, codebook = settings["bits"], settings.get("codebook", "symmetric")
    restored = array(dequantize(quantize(pruned, scale, zero_point, bits=bits, codebook=codebook), scale, zero_point))
    return float(np.sum((kernel - restored) ** 2) / np.sum(kernel**2))


@pytest.fixture(scope="module")
def gaussian():
    return np.random.default_rng(1).normal(size=(1536, 256)).astype("float32")


@pytest.mark.parametrize("bits, expected", [(4, 0.0220), (3, 0.1194), (2, 0.7796)])
def test_absmax_error_on_gaussian_weights_is_the_published_one(gaussian, bits, expected):
    assert relative_error(gaussian, method="absmax", bits=bits) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("bits, expected", [(4, 0.0123), (3, 0.0421), (2, 0.1522)])
def test_clip_search_error_on_gaussian_weights_codebook_full(gaussian, bits, expected):
    # the reference is one best factor with the lowest code allowed; ours searches per channel, so it may be smaller
    error = relative_error(gaussian, method="mse", bits=bits, codebook="full")
    assert error == pytest.approx(expected, rel=0.06)


def test_four_level_code_halves_the_error_of_ternary_at_two_bits(gaussian):
    # the best uniform quantizer of a Gaussian has error 0.1188 with 4 levels and 0.1902 with 3 (Max 1960)
    assert relative_error(gaussian, method="mse", bits=2, codebook="midrise") == pytest.approx(0.1188, rel=0.02)
    assert relative_error(gaussian, method="mse", bits=2, codebook="symmetric") == pytest.approx(0.1902, rel=0.02)


def test_one_bit_scale_is_the_mean_magnitude_and_its_error_is_known(gaussian):
    scale, _ = mean_scale(gaussian)
    np.testing.assert_allclose(array(scale)[0], np.abs(gaussian).mean(axis=0), rtol=1e-5)
    error = relative_error(gaussian, method="mse", bits=1, codebook="midrise")
    assert error == pytest.approx(1 - 2 / np.pi, rel=0.02)


def test_mse_scale_is_never_worse_than_absmax(gaussian):
    for bits in (2, 3, 4, 8):
        worse = relative_error(gaussian, method="absmax", bits=bits)
        assert relative_error(gaussian, method="mse", bits=bits) <= worse * (1 + 1e-6)


def test_sparse_then_int4_error_is_the_published_one(gaussian):
    mask = array(nm_mask(np.abs(gaussian), 2, 4))
    assert relative_error(gaussian, mask, method="absmax", bits=4) == pytest.approx(0.1430, rel=0.02)
    mask = array(nm_mask(np.abs(gaussian), 1, 4))
    assert relative_error(gaussian, mask, method="absmax", bits=4) == pytest.approx(0.3874, rel=0.02)


def test_pruned_weights_do_not_vote_on_the_scale():
    kernel = np.float32([[1.0], [0.0], [1.1], [0.0]])
    kept = np.float32([[1.0], [0.0], [1.0], [0.0]])
    with_mask, _ = mean_scale(kernel, mask=kept)
    without, _ = mean_scale(kernel)
    assert float(with_mask[0, 0]) == pytest.approx(1.05)
    assert float(without[0, 0]) == pytest.approx(0.525)
    midrise = array(mse_scale(kernel, 1, "midrise", mask=kept)[0])
    assert midrise[0, 0] > array(mse_scale(kernel, 1, "midrise")[0])[0, 0]


def test_absmax_scale_is_the_same_before_and_after_pruning(gaussian):
    mask = array(nm_mask(np.abs(gaussian), 1, 4))
    np.testing.assert_array_equal(array(absmax_scale(gaussian, 4)[0]), array(absmax_scale(gaussian * mask, 4)[0]))


def test_asymmetric_zero_point_is_an_integer_inside_the_code_range():
    kernel = np.random.default_rng(3).uniform(-0.2, 1.0, size=(64, 8)).astype("float32")
    scale, zero_point = absmax_scale(kernel, 4, "asymmetric")
    zero_point = array(zero_point)
    np.testing.assert_array_equal(zero_point, np.round(zero_point))
    assert zero_point.min() >= -8 and zero_point.max() <= 7
    symmetric = relative_error(kernel, method="absmax", bits=4)
    assert relative_error(kernel, method="absmax", bits=4, codebook="asymmetric") < symmetric


def test_all_zero_channels_get_scale_one():
    for scale, _ in (
        absmax_scale(np.zeros((4, 2)), 4),
        mean_scale(np.zeros((4, 2))),
        mse_scale(np.zeros((4, 2)), 2),
    ):
        np.testing.assert_array_equal(array(scale), 1.0)


def test_sub_channels_have_their_own_scale_and_less_error(gaussian):
    scale, _ = estimate_scale(gaussian, method="absmax", bits=4, block_size=64)
    assert tuple(scale.shape) == (24, 256)
    assert relative_error(gaussian, method="absmax", bits=4, block_size=64) == pytest.approx(0.0117, rel=0.03)
    assert relative_error(gaussian, method="absmax", bits=4, block_size=32) == pytest.approx(0.0095, rel=0.03)
    assert tuple(to_blocks(gaussian, 64).shape) == (24, 64, 256)


def test_one_scale_per_tensor(gaussian):
    scale, _ = estimate_scale(gaussian, method="absmax", bits=8, per_tensor=True)
    assert tuple(scale.shape) == (1, 1)
    assert float(scale[0, 0]) == pytest.approx(np.abs(gaussian).max() / 127)
