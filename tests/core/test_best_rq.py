"""The arithmetic of BEST-RQ against NumPy and closed forms."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_usm_lite.core.best_rq import masked_cross_entropy, nearest_codes, span_mask, stack_frames


def array(tensor):
    return ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("mask_span", [1, 3, 10, 50])
def test_a_frame_is_hidden_if_and_only_if_a_span_that_began_lately_covers_it(mask_span):
    draws = np.random.default_rng(0).uniform(size=(5, 30))
    expected = [[bool((row[max(0, t - mask_span + 1) : t + 1] < 0.1).any()) for t in range(row.size)] for row in draws]
    assert array(span_mask(draws, 0.1, mask_span)).tolist() == expected


def test_the_share_of_hidden_frames_is_what_probability_says():
    draws = keras.random.uniform((2000, 40), seed=1)
    share = array(span_mask(draws, 0.04, 10)).mean(axis=0)
    np.testing.assert_allclose(share, 1 - 0.96 ** np.minimum(np.arange(40) + 1, 10), atol=0.05)  # > 4 deviations
    assert share[9:].mean() == pytest.approx(1 - 0.96**10, abs=0.015)


@pytest.mark.parametrize("frames, stacks", [(1, 1), (4, 1), (5, 2), (8, 2)])
def test_stacks_hold_the_frames_in_order_and_then_zeros(frames, stacks):
    features = 1 + np.arange(2 * frames * 3, dtype="float32").reshape(2, frames, 3)
    stacked = array(stack_frames(ops.convert_to_tensor(features), 4))
    assert stacked.shape == (2, stacks, 12)
    flat = stacked.reshape(2, -1)
    np.testing.assert_array_equal(flat[:, : frames * 3], features.reshape(2, -1))
    assert not flat[:, frames * 3 :].any()


def test_the_nearest_code_is_the_one_at_the_least_distance_after_normalisation():
    draw = np.random.default_rng(0)
    features, projections, codes = (
        draw.normal(size=(2, 6, 8)),
        draw.normal(size=(3, 8, 4)),
        draw.normal(size=(3, 20, 4)),
    )
    projected = np.einsum("btf,cfd->btcd", features, projections)
    projected /= np.linalg.norm(projected, axis=-1, keepdims=True)
    directions = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    distances = np.linalg.norm(projected[:, :, :, None] - directions, axis=-1)
    found = nearest_codes(features, projections, codes)
    np.testing.assert_array_equal(array(found), distances.argmin(axis=-1))
    assert keras.backend.standardize_dtype(found.dtype) == "int32"
    np.testing.assert_array_equal(array(nearest_codes(7 * features, projections, codes)), array(found))


def test_uniform_predictions_cost_the_logarithm_of_the_codebook_size():
    codes = np.random.default_rng(0).integers(0, 50, size=(2, 5, 3))
    loss = masked_cross_entropy(codes, np.full((2, 5, 3, 50), 1.5), np.ones((2, 5)))
    assert float(loss) == pytest.approx(np.log(50), rel=1e-6)


def test_the_cross_entropy_is_the_weighted_mean_over_frames_and_the_plain_mean_over_codebooks():
    draw = np.random.default_rng(0)
    codes, logits = draw.integers(0, 7, size=(2, 5, 3)), draw.normal(size=(2, 5, 3, 7))
    weights = np.array([[1, 0, 2, 0, 0], [0, 0, 0, 1, 0.5]])
    errors = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, codes[..., None], -1)[..., 0]
    expected = (weights * errors.mean(-1)).sum() / weights.sum()
    assert float(masked_cross_entropy(codes, logits, weights)) == pytest.approx(expected, rel=1e-5)
    elsewhere = np.where(weights[..., None, None] > 0, logits, 100 * logits)
    assert float(masked_cross_entropy(codes, elsewhere, weights)) == pytest.approx(expected, rel=1e-5)


def test_where_nothing_is_hidden_the_loss_is_zero():
    assert float(masked_cross_entropy(np.zeros((1, 2, 1), "int32"), np.ones((1, 2, 1, 3)), np.zeros((1, 2)))) == 0
