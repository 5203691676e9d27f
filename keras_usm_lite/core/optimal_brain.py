"""Prune and quantize a kernel at once, so that its products with known inputs change as little as possible."""

import numpy as np
from scipy.linalg import cholesky, solve_triangular

BLOCK = 128  # rows whose errors are handed on together: matrix products instead of one row at a time


def optimal_brain_surgeon(kernel, second_moment, n=None, m=None, rounded=None, damping=0.01):
    """Return mask and weights that keep `x @ kernel` when they are pruned N:M and rounded to a grid.

    With `H = E[x x^T]` the change of the output is `tr(dW^T H dW)`. Rows are fixed one after the other; the error of a
    row is made up for by all rows behind it (optimal brain surgeon):

    ```
    U^T U = H^-1                              U upper triangular
    pruned: the m - n smallest w_ij^2 / U_ii^2 of each group, chosen when its first row is reached
    e_i = (w_i - w^_i) / U_ii                 w^_i: pruned weights zero, the others rounded
    w_k <- w_k - U_ik e_i                     for all rows k > i
    ```

    Args:
        kernel: float array `[rows, columns]`.
        second_moment: `H`, `[rows, rows]`, the mean of `x x^T` over calibration inputs.
        n, m: keep `n` of `m` consecutive rows in each column; None prunes nothing.
        rounded: function `(row number, weights [columns]) -> rounded weights`; None rounds nothing.
        damping: share of the mean diagonal of `H` that is added to it, so that inputs never seen do no harm.

    Returns:
        `(mask, weights)`: 0/1 float32, and float32 weights as they were when their turn to be rounded came, zero where
        pruned. Rounding them gives `w^`. Not rounded, they are the better latent weights to train on from: those on
        the grid would all be half a step away from any change.

    Raises:
        ValueError: shapes that do not fit.

    Source: SparseGPT (arXiv 2301.00774), section 3; GPTQ (arXiv 2210.17323), section 3.

    Example:

    >>> kernel = np.array([[1.0], [0.9]])
    >>> always_equal = np.ones((2, 2))  # both inputs are the same, so one weight can do the work of both
    >>> mask, weights = optimal_brain_surgeon(kernel, always_equal, n=1, m=2)
    >>> bool(mask.sum() == 1), round(float(weights.sum()), 1)
    (True, 1.9)
    """
    weights = np.array(kernel, dtype=np.float64)
    rows, columns = weights.shape
    if second_moment.shape != (rows, rows):
        raise ValueError(f"second_moment must be [{rows}, {rows}] for {rows} inputs, got {list(second_moment.shape)}.")
    factor = _inverse_factor(np.array(second_moment, dtype=np.float64), damping)
    weights[np.diag(second_moment) == 0] = 0.0  # inputs that are always zero
    mask, latent = np.ones((rows, columns)), np.zeros((rows, columns))
    block = BLOCK if m is None else BLOCK - BLOCK % m
    for start in range(0, rows, block):
        end = min(start + block, rows)
        errors = np.zeros((end - start, columns))
        for row in range(start, end):
            if m is not None and row % m == 0:
                group = slice(row, row + m)
                mask[group] = _keep_best(weights[group] ** 2 / np.diag(factor)[group, None] ** 2, n)
            fixed = latent[row] = weights[row] * mask[row]
            fixed = fixed if rounded is None else rounded(row, fixed) * mask[row]
            error = (weights[row] - fixed) / factor[row, row]
            weights[row + 1 : end] -= factor[row, row + 1 : end, None] * error
            errors[row - start] = error
        weights[end:] -= factor[start:end, end:].T @ errors
    return mask.astype(np.float32), latent.astype(np.float32)


def matched_kernel(kernel, second_moment, cross_moment, damping=0.01):
    """Return the kernel that makes of disturbed inputs what `kernel` makes of the exact ones, as nearly as it can.

    Layers before this one were compressed, so it sees `x^` where the float model has `x`. The kernel with the smallest
    `E|x W - x^ W'|^2 + lambda |W' - W|^2` is

    ```
    W' = W + (H + lambda)^-1 (E[x^ x^T] - H) W        H = E[x^ x^^T], lambda = damping * mean of its diagonal
    ```

    and pruned and rounded kernels are as far from `W` in that sense as their products with `x^` are from those of `W'`:
    so `optimal_brain_surgeon` may start from `W'` as if there were no disturbance.

    Args:
        kernel: `W`, float array `[rows, columns]`.
        second_moment: `H`, `[rows, rows]`, of the disturbed inputs.
        cross_moment: `E[x^ x^T]`, `[rows, rows]`; a row for each disturbed input.
        damping: as in `optimal_brain_surgeon`; more stays closer to `kernel`.

    Returns:
        `W'`, float64 `[rows, columns]`.

    Source: the asymmetric calibration of GPTAQ (arXiv 2504.02692), section 3, solved for the whole kernel at once.

    Example: the input arrives at half its size, so the kernel must be twice as large.

    >>> matched_kernel(np.array([[3.0]]), np.array([[1.0]]), np.array([[2.0]]), damping=0.0).tolist()
    [[6.0]]
    """
    factor = _inverse_factor(np.array(second_moment, dtype=np.float64), damping)
    return kernel + factor.T @ (factor @ ((cross_moment - second_moment) @ kernel))


def _inverse_factor(matrix, damping):
    """Return the upper triangular `U` with `U^T U = (matrix + damping)^-1`."""
    diagonal = np.diag(matrix)
    unseen = diagonal == 0
    matrix[np.diag_indices_from(matrix)] += unseen + damping * max(diagonal.mean(), np.finfo(np.float32).tiny)
    lower = cholesky(matrix, lower=True)
    inverse_lower = solve_triangular(lower, np.eye(len(matrix)), lower=True)
    return cholesky(inverse_lower.T @ inverse_lower, lower=False)


def _keep_best(scores, n):
    """0/1 array: the `n` largest scores of each column; ties go to the lower index, as in `nm_mask`."""
    order = np.argsort(-scores, axis=0, kind="stable")
    mask = np.zeros_like(scores)
    np.put_along_axis(mask, order[:n], 1.0, axis=0)
    return mask
