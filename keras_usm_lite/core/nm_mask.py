"""N:M masks: which weights of every group of M stay (non-zeros:M, groups along the reduction axis)."""

from keras import ops


def nm_mask(scores, n, m):
    """Keep the `n` largest scores in every `m` consecutive rows of each column.

    For a group `g` of `m` scores, `rank_j = #{i : g_i > g_j or (g_i == g_j and i < j)}` and
    `mask_j = 1[rank_j < n]`. Ranks are counted by comparison instead of sorting: it is the cheapest form
    inside a compiled step, and a tie always goes to the lower index, on every backend.

    Args:
        scores: float tensor `[rows, columns]`; rows run along the reduction axis.
        n: non-zeros kept per group, an int or a scalar tensor, `1 <= n <= m`.
        m: group size; must divide `rows`.

    Returns:
        float32 tensor of the shape of `scores`, 1 where the weight is kept and 0 where it is pruned.

    Raises:
        ValueError: `rows` is not a multiple of `m`.

    Source: USM-Lite (arXiv 2312.08553), section 2; Mishra et al. 2021 (arXiv 2104.08378), section 3.

    Example:

    >>> mask = nm_mask([[3.0], [-1.0], [2.0], [5.0]], n=2, m=4)
    >>> [float(v) for v in mask[:, 0]]
    [1.0, 0.0, 0.0, 1.0]
    """
    scores = ops.convert_to_tensor(scores, dtype="float32")
    rows, columns = scores.shape
    if rows % m:
        raise ValueError(
            f"N:M sparsity groups {m} consecutive inputs of a kernel, but this kernel has {rows} inputs, which "
            f"is not a multiple of {m}. Choose a width divisible by {m}, or a pattern whose M divides {rows}."
        )
    groups = ops.reshape(scores, (rows // m, m, columns))
    position = ops.reshape(ops.arange(m), (1, m, 1))
    rank = ops.zeros_like(groups)
    for i in range(m):
        rival = groups[:, i : i + 1, :]
        beats = ops.where(position > i, rival >= groups, rival > groups)
        rank = rank + ops.cast(beats, "float32")
    return ops.reshape(ops.cast(rank < n, "float32"), (rows, columns))


def nm_violations(kernel, n, m):
    """Count the groups of `m` consecutive rows that hold more than `n` non-zero weights.

    Args:
        kernel: tensor `[rows, columns]`.
        n: non-zeros allowed per group.
        m: group size; must divide `rows`.

    Returns:
        Scalar int32 tensor.

    Example:

    >>> int(nm_violations([[1.0], [2.0], [0.0], [3.0]], n=2, m=4))
    1
    """
    kernel = ops.convert_to_tensor(kernel)
    rows, columns = kernel.shape
    groups = ops.reshape(kernel, (rows // m, m, columns))
    non_zeros = ops.sum(ops.cast(groups != 0, "int32"), axis=1)
    return ops.sum(ops.cast(non_zeros > n, "int32"))
