"""Prune and quantize a kernel at once, so that its products with known inputs change as little as possible."""

import itertools
import math

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from keras_usm_lite.core.reconstruction import BLOCK, damped

MOST_CHOICES = 100  # of what to prune in a group; with more, weights are judged one by one


def optimal_brain_surgeon(kernel, second_moment, n=None, m=None, mask=None, rounded=None, damping=0.01):
    """Return mask and weights that keep `x @ kernel` when they are pruned N:M and rounded to a grid.

    With `H = E[x x^T]` the change of the output is `tr(dW^T H dW)`. Rows are fixed one after the other, groups with the
    largest inputs first; the error of a row is made up for by all rows behind it (optimal brain surgeon):

    ```
    U^T U = (H + lambda)^-1                   U upper triangular, lambda = damping * mean of the diagonal of H
    e_i = (w_i - w^_i) / U_ii                 w^_i: pruned weights zero, the others rounded
    w_k <- w_k - U_ik e_i                     for all rows k > i
    pruned: of each group the set S of m - n weights with the smallest |e_S|^2 = |U_SS^-T w_S|^2, what it costs to
            remove them one after the other, chosen when the first row of the group is reached
    ```

    Args:
        kernel: float array `[rows, columns]`.
        second_moment: `H`, `[rows, rows]`, the mean of `x x^T` over calibration inputs.
        n, m: keep `n` of `m` consecutive rows in each column; None prunes nothing.
        mask: 0/1, `[rows, columns]`: what to keep, chosen already, instead of `n` and `m`.
        rounded: function `(row number, weights [columns]) -> rounded weights`; None rounds nothing.
        damping: share of the mean diagonal of `H` that is added to it, so that inputs never seen do no harm.

    Returns:
        `(mask, weights)`: 0/1 float32, and float32 weights as they were when their turn to be rounded came, zero where
        pruned. Rounding them gives `w^`. Not rounded, they are the better latent weights to train on from: those on
        the grid would all be half a step away from any change.

    Raises:
        ValueError: shapes that do not fit.

    Source: SparseGPT (arXiv 2301.00774), section 3; GPTQ (arXiv 2210.17323), section 3, and its order of rows by the
    size of their inputs.

    Example:

    >>> kernel = np.array([[1.0], [0.9]])
    >>> always_equal = np.ones((2, 2))  # both inputs are the same, so one weight can do the work of both
    >>> mask, weights = optimal_brain_surgeon(kernel, always_equal, n=1, m=2)
    >>> bool(mask.sum() == 1), round(float(weights.sum()), 1)
    (True, 1.9)
    """
    rows, columns = kernel.shape
    if second_moment.shape != (rows, rows):
        raise ValueError(f"second_moment must be [{rows}, {rows}] for {rows} inputs, got {list(second_moment.shape)}.")
    order = _largest_first(np.diag(second_moment), m or 1)
    weights = np.array(kernel, dtype=np.float64)[order]
    factor = _inverse_factor(damped(second_moment, damping)[np.ix_(order, order)])
    keep = np.ones((rows, columns)) if mask is None else np.array(mask, dtype=np.float64)[order]
    latent = np.zeros((rows, columns))
    block = BLOCK if m is None else BLOCK - BLOCK % m
    for start in range(0, rows, block):
        end = min(start + block, rows)
        errors = np.zeros((end - start, columns))
        for row in range(start, end):
            if m is not None and row % m == 0:
                group = slice(row, row + m)
                keep[group] = _cheapest(weights[group], factor[group, group], n)
            fixed = latent[row] = weights[row] * keep[row]
            fixed = fixed if rounded is None else rounded(order[row], fixed) * keep[row]
            error = (weights[row] - fixed) / factor[row, row]
            weights[row + 1 : end] -= factor[row, row + 1 : end, None] * error
            errors[row - start] = error
        weights[end:] -= factor[start:end, end:].T @ errors
    back = np.argsort(order)
    return keep[back].astype(np.float32), latent[back].astype(np.float32)


def _largest_first(power, m):
    """Row numbers, groups of `m` kept together, those with the largest inputs first."""
    groups = np.argsort(-power.reshape(-1, m).sum(axis=1), kind="stable")
    return (groups[:, None] * m + np.arange(m)).ravel()


def _inverse_factor(matrix):
    """Return the upper triangular `U` with `U^T U = matrix^-1`."""
    lower = cholesky(matrix, lower=True)
    inverse_lower = solve_triangular(lower, np.eye(len(matrix)), lower=True)
    return cholesky(inverse_lower.T @ inverse_lower, lower=False)


def _cheapest(weights, factor, n):
    """0/1 array `[m, columns]`: the `n` weights of a group without which the others cost least to remove.

    Ties go to the lower index, as in `nm_mask`.
    """
    m = len(weights)
    if math.comb(m, n) > MOST_CHOICES:
        return _keep_best(weights**2 / np.diag(factor)[:, None] ** 2, n)
    choices = [sorted(choice) for choice in itertools.combinations(range(m - 1, -1, -1), m - n)]
    costs = [
        np.sum(solve_triangular(factor[np.ix_(choice, choice)], weights[choice], trans="T") ** 2, axis=0)
        for choice in choices
    ]
    kept = np.ones((len(choices), m))
    for row, choice in zip(kept, choices, strict=True):
        row[choice] = 0.0
    return kept[np.argmin(costs, axis=0)].T


def _keep_best(scores, n):
    """0/1 array: the `n` largest scores of each column; ties go to the lower index, as in `nm_mask`."""
    order = np.argsort(-scores, axis=0, kind="stable")
    mask = np.zeros_like(scores)
    np.put_along_axis(mask, order[:n], 1.0, axis=0)
    return mask
