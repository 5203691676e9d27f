"""Row permutations against brute force, exhaustive search, planted structure and the published efficacy."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.core.permutation import kept_magnitude, permute_rows, swap_gains


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def kept(weights, n, m):
    """The same sum, column by column and group by group."""
    groups = np.abs(weights).reshape(-1, m, weights.shape[1])
    return sum(sum(sorted(group[:, column])[-n:]) for group in groups for column in range(weights.shape[1]))


def best_possible(weights, n, m):
    """The most that any grouping of the rows keeps: every first row tries every company."""

    def search(rows):
        if not rows:
            return 0.0
        first, others = rows[0], rows[1:]
        return max(
            kept(weights[[first, *company]], n, m) + search([row for row in others if row not in company])
            for company in itertools.combinations(others, m - 1)
        )

    return search(list(range(len(weights))))


@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)])
def test_kept_magnitude_is_what_the_mask_keeps(n, m):
    weights = normal(3 * m, 5)
    assert kept_magnitude(weights, n, m) == pytest.approx(kept(weights, n, m), rel=1e-6)


@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)])
@pytest.mark.parametrize("ties", [False, True])
def test_gain_of_every_swap_equals_making_it(n, m, ties):
    weights = normal(2 * m, 6)
    weights = np.round(weights) if ties else weights
    gains = swap_gains(np.abs(weights).reshape(1, 2, m, 6), n)[0]
    for first, second in itertools.product(range(m), range(m)):
        swapped = weights.copy()
        swapped[[first, m + second]] = weights[[m + second, first]]
        assert gains[first, second] == pytest.approx(kept(swapped, n, m) - kept(weights, n, m), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (5, 16)]), st.integers(1, 5), st.integers(1, 4), st.integers())
def test_result_is_a_permutation_that_never_keeps_less(pattern, groups, columns, seed):
    n, m = pattern
    weights = normal(groups * m, columns, seed=abs(seed))
    order = permute_rows(weights, n, m, sweeps=20)
    np.testing.assert_array_equal(np.sort(order), np.arange(groups * m))
    assert kept(weights[order], n, m) >= kept(weights, n, m) * (1 - 1e-12)


@pytest.mark.parametrize("n, m, rows", [(1, 2, 8), (2, 4, 8), (1, 4, 12), (2, 4, 12)])
@pytest.mark.parametrize("seed", range(3))
def test_small_matrices_get_the_best_order_there_is(n, m, rows, seed):
    weights = normal(rows, 3, seed=seed)
    order = permute_rows(weights, n, m)
    assert kept(weights[order], n, m) == pytest.approx(best_possible(weights, n, m), rel=1e-6)


def test_planted_groups_that_lose_nothing_are_found():
    large, small = 1.0 + np.random.default_rng(0).random((32, 10)), np.zeros((32, 10))
    weights = np.concatenate([large, small])  # the worst order: half of the groups hold large rows only
    assert kept(weights, 2, 4) < 0.6 * np.sum(weights)
    assert kept(weights[permute_rows(weights, 2, 4)], 2, 4) == pytest.approx(np.sum(weights))


def test_a_matrix_that_loses_nothing_stays_in_its_order():
    weights = np.tile([[1.0], [0.0], [2.0], [0.0]], (4, 3))
    np.testing.assert_array_equal(permute_rows(weights, 2, 4), np.arange(16))


@pytest.mark.parametrize("seed", range(3))
def test_random_matrices_get_the_published_share_of_what_unstructured_pruning_keeps_more(seed):
    """128 outputs, 64 inputs, uniform: dense 4083, unstructured 3060, 2:4 2852, greedy 2913 to 2921 (30 to 35 %)."""
    weights = np.random.default_rng(seed).random((64, 128))
    unstructured = np.sum(np.sort(weights.ravel())[weights.size // 2 :])
    default = kept_magnitude(weights, 2, 4)
    permuted = kept_magnitude(weights[permute_rows(weights, 2, 4)], 2, 4)
    assert 0.28 < (permuted - default) / (unstructured - default) < 0.45


def test_more_sweeps_keep_more_and_none_keep_the_order():
    weights = normal(128, 32)
    shares = [kept_magnitude(weights[permute_rows(weights, 2, 4, sweeps)], 2, 4) for sweeps in (0, 5, 50)]
    assert shares[0] == kept_magnitude(weights, 2, 4) < shares[1] < shares[2]


def test_search_depends_on_its_seed_alone_and_on_no_scale_or_sign():
    weights = normal(64, 16)
    order = permute_rows(weights, 2, 4, seed=7)
    np.testing.assert_array_equal(order, permute_rows(-1024.0 * weights, 2, 4, seed=7))
    assert np.any(order != permute_rows(weights, 2, 4, seed=8))


def test_weights_that_cannot_be_permuted_are_refused():
    with pytest.raises(ValueError, match="2:4 does not fit 6 rows"):
        permute_rows(np.ones((6, 2)), 2, 4)
    with pytest.raises(ValueError, match="4:4 does not fit"):
        permute_rows(np.ones((8, 2)), 4, 4)
    with pytest.raises(ValueError, match="finite"):
        permute_rows(np.full((8, 2), np.nan), 2, 4)
    with pytest.raises(ValueError, match="matrix.*shape \\(8,\\)"):
        permute_rows(np.ones(8), 2, 4)
    with pytest.raises(ValueError, match="sweeps must not be negative, got -1"):
        permute_rows(np.ones((8, 2)), 2, 4, sweeps=-1)
