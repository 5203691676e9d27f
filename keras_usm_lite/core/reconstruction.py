"""Kernels whose products with known inputs come as close as they can to wanted ones, by least squares.

`matched_kernel` says what is wanted of a layer whose inputs are not what they were. The others minimise the change of
the outputs, over what they are free to choose:

```
tr((W - W')^T A (W - W'))        A = H + lambda, H = E[x x^T] of the inputs, lambda = damping * mean of its diagonal
```
"""

import numpy as np

ITERATIONS, SWEEPS = 20, 3  # of conjugate gradients and of coordinate descent; more brings next to nothing
BLOCK = 128  # rows whose changes are handed on together: matrix products instead of one row at a time


def damped(second_moment, damping):
    """Return `A`, in which inputs that are always zero have a one on the diagonal."""
    matrix = np.array(second_moment, dtype=np.float64)
    diagonal = np.diag(matrix)
    matrix[np.diag_indices_from(matrix)] += (diagonal == 0) + damping * max(diagonal.mean(), np.finfo(np.float32).tiny)
    return matrix


def matched_kernel(kernel, second_moment, cross_moment, damping=0.01):
    """Return the kernel that makes of disturbed inputs what `kernel` makes of the exact ones, as nearly as it can.

    Layers before this one were compressed, so it sees `x^` where the float model has `x`. The kernel with the smallest
    `E|x W - x^ W'|^2 + lambda |W' - W|^2` is

    ```
    W' = W + A^-1 (E[x^ x^T] - H) W        A, H: of the disturbed inputs x^
    ```

    and other kernels are as far from that aim as their products with `x^` are from those of `W'`: what prunes and
    rounds for given inputs may start from `W'` as if there were no disturbance.

    Args:
        kernel: `W`, float array `[rows, columns]`.
        second_moment: `H`, `[rows, rows]`.
        cross_moment: `E[x^ x^T]`, `[rows, rows]`; a row for each disturbed input.
        damping: share of the mean diagonal of `H` that is added to it; more stays closer to `kernel`.

    Returns:
        `W'`, float64 `[rows, columns]`; zero for inputs that are always zero.

    Source: the asymmetric calibration of GPTAQ (arXiv 2504.02692), section 3, solved for the whole kernel at once.

    Example: the input arrives at half its size, so the kernel must be twice as large.

    >>> matched_kernel(np.array([[3.0]]), np.array([[1.0]]), np.array([[2.0]]), damping=0.0).tolist()
    [[6.0]]
    """
    change = np.linalg.solve(damped(second_moment, damping), (cross_moment - second_moment) @ kernel)
    return np.where(np.diag(second_moment)[:, None] == 0, 0.0, kernel + change)


def refitted(kernel, second_moment, mask, start, damping=0.01):
    """Return the weights within a mask that stand in best for a dense kernel.

    Optimal brain surgery lets only later rows make up for a pruned weight; here all survivors do:

    ```
    min tr((W - W')^T A (W - W'))   subject to   W' = mask * W'
    ```

    by conjugate gradients, all columns at once, preconditioned by the diagonal of `A`.

    Args:
        kernel: `W`, `[rows, columns]`.
        second_moment, damping: as in `matched_kernel`.
        mask: 0/1, `[rows, columns]`.
        start: weights to begin with, `[rows, columns]`.

    Returns:
        `W'`, float64 `[rows, columns]`.

    Source: Hestenes and Stiefel (1952); for pruned layers ALPS (arXiv 2406.07831), section 3.

    Example: two inputs that are always equal, one of which is pruned.

    >>> kernel, mask = np.array([[1.0], [0.9]]), np.array([[1.0], [0.0]])
    >>> refitted(kernel, np.ones((2, 2)), mask, start=kernel, damping=1e-9).round(3).tolist()
    [[1.9], [0.0]]
    """
    matrix = damped(second_moment, damping)
    diagonal = np.diag(matrix)[:, None]
    weights = start * mask
    rest = matrix @ (kernel - weights) * mask
    direction = rest / diagonal
    power = np.sum(rest * direction, axis=0)
    for _ in range(ITERATIONS):
        image = matrix @ direction * mask
        step = power / np.maximum(np.sum(direction * image, axis=0), np.finfo(np.float64).tiny)
        weights = weights + step * direction
        rest = rest - step * image
        before, power = power, np.sum(rest * rest / diagonal, axis=0)
        direction = rest / diagonal + power / np.maximum(before, np.finfo(np.float64).tiny) * direction
    return weights


def polished(kernel, second_moment, latent, rounded, mask=None, damping=0.01):
    """Return latent weights of which hardly any would gain from being rounded to another value.

    Cyclic coordinate descent, some sweeps over the rows, largest inputs first:

    ```
    w_i = w^_i + [A (W - W^)]_i / A_ii        the best value, with all others as they are rounded now
    w^_i = round(w_i)
    ```

    Args:
        kernel: `W`, `[rows, columns]`, what rounded weights should stand in for.
        second_moment, damping: as in `matched_kernel`.
        latent: weights to begin with, such as those of `optimal_brain_surgeon`.
        rounded: function `(row number, weights [columns]) -> rounded weights`.
        mask: 0/1, `[rows, columns]`; None keeps all.

    Returns:
        Latent weights, float32 `[rows, columns]`, zero where pruned; rounding them gives `w^`.

    Source: coordinate descent on the rounded weights as in CDQuant (arXiv 2406.17542), section 3.

    Example: three equal inputs share what each of them cannot hold.

    >>> def whole(row, weights):
    ...     return np.round(weights)
    >>> kernel = np.full((3, 1), 0.4)
    >>> float(whole(0, polished(kernel, np.ones((3, 3)), kernel, whole)).sum())
    1.0
    """
    order = np.argsort(-np.diag(second_moment), kind="stable")
    matrix = damped(second_moment, damping)[np.ix_(order, order)]
    keep = np.ones(kernel.shape) if mask is None else np.asarray(mask)[order]
    latent = np.asarray(latent, dtype=np.float64)[order] * keep
    values = np.stack([rounded(row, weights) for row, weights in zip(order, latent, strict=True)]) * keep
    gradient = matrix @ (np.asarray(kernel)[order] - values)
    for start in SWEEPS * list(range(0, len(order), BLOCK)):
        block = slice(start, start + BLOCK)
        before, inside, within = values[block].copy(), gradient[block].copy(), matrix[block, block]
        for number, row in enumerate(order[block]):
            best = (before[number] + inside[number] / within[number, number]) * keep[start + number]
            latent[start + number] = best
            values[start + number] = rounded(row, best) * keep[start + number]
            inside -= within[:, number, None] * (values[start + number] - before[number])
        gradient -= matrix[:, block] @ (values[block] - before)
    found = np.empty(latent.shape, dtype=np.float32)
    found[order] = latent
    return found
