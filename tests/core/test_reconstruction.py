"""Least squares for kernels: against lstsq, and against every other choice there is."""

import numpy as np
import pytest

from keras_usm_lite.core.optimal_brain import optimal_brain_surgeon
from keras_usm_lite.core.reconstruction import damped, matched_kernel, polished, refitted

RNG = np.random.default_rng(0)


def correlated(rows, tokens=400):
    """Inputs whose neighbours are alike, and their second moment."""
    mixing = RNG.normal(size=(rows, rows)) * 0.5 ** np.abs(np.subtract.outer(range(rows), range(rows)))
    inputs = RNG.normal(size=(tokens, rows)) @ mixing
    return inputs, inputs.T @ inputs / tokens


def costs(kernel, other, moment, damping):
    """What is minimised, for every column."""
    change = kernel - other
    return np.sum(change * (damped(moment, damping) @ change), axis=0)


def test_a_matched_kernel_is_the_least_squares_solution_for_disturbed_inputs():
    exact, _ = correlated(12)
    disturbed = np.tanh(exact) + 0.3 * RNG.normal(size=exact.shape)
    kernel, tokens = RNG.normal(size=(12, 5)), len(exact)
    moment, cross = disturbed.T @ disturbed / tokens, disturbed.T @ exact / tokens
    found = matched_kernel(kernel, moment, cross, damping=1e-9)
    np.testing.assert_allclose(found, np.linalg.lstsq(disturbed, exact @ kernel, rcond=None)[0], rtol=1e-5, atol=1e-6)
    # Damping is ridge regression towards the kernel: more rows, which ask for the kernel itself.
    ridge = np.sqrt(0.1 * np.diag(moment).mean() * tokens) * np.eye(12)
    rows, wanted = np.vstack([disturbed, ridge]), np.vstack([exact @ kernel, ridge @ kernel])
    found = matched_kernel(kernel, moment, cross, damping=0.1)
    np.testing.assert_allclose(found, np.linalg.lstsq(rows, wanted, rcond=None)[0], rtol=1e-6, atol=1e-8)


def test_without_a_disturbance_the_kernel_stays_and_inputs_never_seen_get_no_weights():
    inputs, moment = correlated(6)
    kernel = RNG.normal(size=(6, 3))
    np.testing.assert_array_equal(matched_kernel(kernel, moment, moment), kernel)
    disturbed = inputs * np.array([1, 1, 0, 1, 1, 1])
    found = matched_kernel(kernel, disturbed.T @ disturbed, disturbed.T @ inputs)
    assert np.isfinite(found).all() and not found[2].any() and found[[0, 1, 3, 4, 5]].all()


def test_refitted_weights_are_the_least_squares_solution_within_the_mask():
    inputs, moment = correlated(16)
    kernel = RNG.normal(size=(16, 6))
    mask = (RNG.random(size=kernel.shape) < 0.5).astype(float)
    found = refitted(kernel, moment, mask, start=kernel, damping=1e-9)
    assert not found[mask == 0].any()
    for column in range(6):
        kept = mask[:, column] > 0
        expected = np.linalg.lstsq(inputs[:, kept], inputs @ kernel[:, column], rcond=None)[0]
        np.testing.assert_allclose(found[kept, column], expected, rtol=1e-3, atol=1e-3)


def test_refitting_brings_what_optimal_brain_surgery_leaves():
    """There earlier rows do nothing for later ones."""
    _, moment = correlated(64)
    kernel = RNG.normal(size=(64, 12))
    mask, weights = optimal_brain_surgeon(kernel, moment, n=1, m=4)
    before = costs(kernel, weights, moment, 0.01)
    after = costs(kernel, refitted(kernel, moment, mask, weights), moment, 0.01)
    assert np.all(after < before) and after.sum() < 0.92 * before.sum()


def test_a_refit_with_nothing_left_to_do_returns_its_start():
    _, moment = correlated(8)
    kernel = RNG.normal(size=(8, 3))
    np.testing.assert_array_equal(refitted(kernel, moment, np.ones((8, 3)), start=kernel), kernel)
    np.testing.assert_array_equal(refitted(kernel, moment, np.zeros((8, 3)), start=kernel), 0.0)


def to_grid(row, weights):
    return np.clip(np.round(weights / 0.5), -2, 2) * 0.5


@pytest.mark.parametrize("rows", [12, 150])
def test_no_single_other_integer_would_be_better_after_polishing(rows):
    """More than one block of rows; each candidate is tried by brute force."""
    _, moment = correlated(rows, tokens=4 * rows)
    kernel = RNG.normal(size=(rows, 5))
    mask = (RNG.random(size=kernel.shape) < 0.7).astype(float)
    latent = polished(kernel, moment, kernel, to_grid, mask)
    values = to_grid(None, latent)
    assert not latent[mask == 0].any()
    best = costs(kernel, values, moment, 0.01)
    assert best.sum() < 0.7 * costs(kernel, to_grid(None, kernel * mask), moment, 0.01).sum()
    better = 0
    for row in range(rows):
        for value in (-1.0, -0.5, 0.0, 0.5, 1.0):
            other = values.copy()
            other[row] = value * mask[row]
            better += np.sum(costs(kernel, other, moment, 0.01) < best - 1e-9)
    assert better <= 0.01 * 5 * values.size


def test_rows_are_rounded_on_their_own_grids():
    _, moment = correlated(6)
    kernel = RNG.normal(size=(6, 2))
    seen = {}

    def rounded(row, weights):
        seen[row] = weights.copy()
        return np.round(weights / (row + 1)) * (row + 1)

    latent = polished(kernel, moment, kernel, rounded)
    for row in range(6):
        np.testing.assert_allclose(latent[row], seen[row], rtol=1e-6)
