"""Pruning and rounding that make up for their own errors."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.core.optimal_brain import BLOCK, optimal_brain_surgeon

RNG = np.random.default_rng(0)


def correlated(rows, tokens=400, seed=0):
    """Inputs whose neighbours are alike, and their second moment."""
    draw = np.random.default_rng(seed)
    mixing = draw.normal(size=(rows, rows)) * 0.5 ** np.abs(np.subtract.outer(range(rows), range(rows)))
    inputs = draw.normal(size=(tokens, rows)) @ mixing
    return inputs, inputs.T @ inputs / tokens


def output_error(inputs, kernel, other):
    return np.sum((inputs @ (kernel - other)) ** 2) / np.sum((inputs @ kernel) ** 2)


def magnitude(kernel, n, m):
    groups = np.abs(kernel).reshape(-1, m, kernel.shape[1])
    rank = np.argsort(np.argsort(-groups, axis=1, kind="stable"), axis=1)
    return kernel * (rank < n).reshape(kernel.shape)


def to_grid(step):
    return lambda row, weights: np.clip(np.round(weights / step), -7, 7) * step


def test_one_pruned_weight_is_made_up_for_exactly_as_optimal_brain_surgeon_says():
    """Closed form: removing w_q changes the others by -w_q / [H^-1]_qq times column q of H^-1."""
    inputs, moment = correlated(2)
    kernel = np.array([[0.1], [2.0]])
    mask, weights = optimal_brain_surgeon(kernel, moment, n=1, m=2, damping=0.0)
    inverse = np.linalg.inv(moment)
    expected = kernel[:, 0] - kernel[0, 0] / inverse[0, 0] * inverse[:, 0]
    assert mask[:, 0].tolist() == [0.0, 1.0]
    np.testing.assert_allclose(weights[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_a_weight_whose_input_another_input_repeats_costs_nothing():
    inputs = np.repeat(RNG.normal(size=(100, 4)), 2, axis=1)  # every input is there twice
    kernel = RNG.normal(size=(8, 5))
    _, weights = optimal_brain_surgeon(kernel, inputs.T @ inputs / 100, n=1, m=2, damping=1e-6)
    assert output_error(inputs, kernel, weights) < 1e-6
    assert output_error(inputs, kernel, magnitude(kernel, 1, 2)) > 0.05


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2)]), st.integers(0, 1000))
def test_the_pattern_is_obeyed_and_weights_are_those_that_were_rounded(pattern, seed):
    n, m = pattern
    _, moment = correlated(16, seed=seed)
    kernel = np.random.default_rng(seed).normal(size=(16, 3))
    handed_out = {}

    def rounded(row, weights):
        handed_out[row] = weights.astype(np.float32)
        return to_grid(0.25)(row, weights)

    mask, weights = optimal_brain_surgeon(kernel, moment, n=n, m=m, rounded=rounded)
    assert np.all(mask.reshape(-1, m, 3).sum(axis=1) == n)
    assert not weights[mask == 0].any()
    np.testing.assert_array_equal(weights, np.stack([handed_out[row] for row in range(16)]))


@pytest.mark.parametrize("rows", [64, BLOCK + 40, 2 * BLOCK + 8])
@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
def test_the_output_error_is_far_below_that_of_magnitude_and_rounding(rows, pattern):
    inputs, moment = correlated(rows, tokens=4 * rows)
    kernel = RNG.normal(size=(rows, 12))
    rounded = to_grid(0.35)
    n, m = pattern or (None, None)
    _, weights = optimal_brain_surgeon(kernel, moment, n=n, m=m, rounded=rounded)
    naive = rounded(0, kernel if pattern is None else magnitude(kernel, n, m))
    assert output_error(inputs, kernel, rounded(0, weights)) < 0.75 * output_error(inputs, kernel, naive)


def test_blocks_change_nothing_but_the_order_of_summation(monkeypatch):
    inputs, moment = correlated(96)
    kernel = RNG.normal(size=(96, 5))
    whole = optimal_brain_surgeon(kernel, moment, n=2, m=4)
    monkeypatch.setattr(sys.modules[optimal_brain_surgeon.__module__], "BLOCK", 12)
    for block, once in zip(optimal_brain_surgeon(kernel, moment, n=2, m=4), whole, strict=True):
        np.testing.assert_allclose(block, once, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_always_zero_do_no_harm():
    inputs, _ = correlated(8)
    inputs[:, 3] = 0.0
    kernel = RNG.normal(size=(8, 4))
    _, weights = optimal_brain_surgeon(kernel, inputs.T @ inputs, n=2, m=4)
    assert np.isfinite(weights).all()


def test_a_moment_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"must be \[8, 8\] for 8 inputs, got \[4, 4\]"):
        optimal_brain_surgeon(np.ones((8, 2)), np.eye(4))


def test_of_each_group_the_weights_that_cost_least_are_pruned():
    """All six masks of a group are tried; what each costs is measured on the outputs."""
    inputs, moment = correlated(4)
    order = np.argsort(-np.diag(moment))  # rows with the largest inputs come first, with a mask as without
    inputs, moment = inputs[:, order], moment[np.ix_(order, order)]
    kernel = RNG.normal(size=(4, 50))
    mask, _ = optimal_brain_surgeon(kernel, moment, n=2, m=4, damping=0.0)
    costs = {}
    for kept in itertools.combinations(range(4), 2):
        given = np.zeros(kernel.shape)
        given[list(kept)] = 1.0
        returned, weights = optimal_brain_surgeon(kernel, moment, mask=given, damping=0.0)
        np.testing.assert_array_equal(returned, given)
        costs[kept] = np.sum((inputs @ (weights - kernel)) ** 2, axis=0)
    chosen = [tuple(np.flatnonzero(column)) for column in mask.T]
    assert len(set(chosen)) > 3
    for column, kept in enumerate(chosen):
        assert costs[kept][column] <= min(cost[column] for cost in costs.values()) * (1 + 1e-6)


def test_a_pattern_with_too_many_choices_is_judged_weight_by_weight():
    inputs, moment = correlated(32)
    kernel = RNG.normal(size=(32, 100))
    mask, weights = optimal_brain_surgeon(kernel, moment, n=8, m=16)  # 12,870 choices
    assert np.all(mask.reshape(2, 16, 100).sum(axis=1) == 8)
    largest = (magnitude(kernel, 8, 16) != 0).astype(float)
    _, others = optimal_brain_surgeon(kernel, moment, mask=largest)
    assert output_error(inputs, kernel, weights) < 0.8 * output_error(inputs, kernel, others)


def test_rows_with_the_largest_inputs_are_rounded_first():
    _, moment = correlated(6)
    order = []

    def rounded(row, weights):
        order.append(row)
        return np.round(weights)

    optimal_brain_surgeon(RNG.normal(size=(6, 2)), moment, rounded=rounded)
    assert order == np.argsort(-np.diag(moment)).tolist()
