"""Row permutations that put weights into better N:M groups (NumPy: this is offline work)."""

import itertools

import numpy as np

TOLERANCE = 1e-6  # a swap must gain this share of its two groups; less is rounding
ESCAPE = 4  # rows that change places to leave a local optimum


def permute_rows(weights, n, m, sweeps=300, seed=0):
    """Order the rows of a matrix so that its N:M mask keeps more magnitude.

    `maximize over orders:  sum over groups G of m rows, columns c, of the n largest |w_rc| with r in G`

    In every sweep the groups meet in pairs and each pair makes the swap of two rows that gains most, if one gains.
    After `rows / m - 1` sweeps each group has met every other; if none of them swapped, the order is a local optimum:
    it is remembered if it is the best so far, and the search goes on from the best with a few rows moved at random.

    The time is proportional to `sweeps * rows * columns * m`; the gain grows ever more slowly with the sweeps. The same
    seed gives the same order.

    Args:
        weights: matrix `[rows, columns]`, rows along the reduction axis: a kernel, or any scores to keep.
        n, m: the pattern, `1 <= n < m`; `m` must divide `rows`.
        sweeps: how long to search; 0 returns the identity.
        seed: of the pairings and the random moves.

    Returns:
        int array `[rows]`: row `i` of the better matrix is row `order[i]` of the given one. `weights[order]` never
        keeps less than `weights`.

    Raises:
        ValueError: not a matrix of finite numbers, a pattern that does not fit it, or negative sweeps.

    Source: Pool and Yu 2021, "Channel Permutations for N:M Sparsity" (NeurIPS): greedy swaps with random escapes.

    Example: the two large rows share a group, where 1:2 can keep only one.

    >>> weights = np.array([[5.0], [4.0], [1.0], [0.0]])
    >>> order = permute_rows(weights, n=1, m=2)
    >>> kept_magnitude(weights, 1, 2), kept_magnitude(weights[order], 1, 2)
    (6.0, 9.0)
    """
    magnitudes = _magnitudes(weights, n, m)
    if sweeps < 0:
        raise ValueError(f"sweeps must not be negative, got {sweeps!r}.")
    draw = np.random.default_rng(seed)
    order = best = np.arange(len(magnitudes)).reshape(-1, m)
    swaps = 0
    for pairs, complete in itertools.islice(_meetings(len(order), draw), sweeps):
        order, count = _swap_best(order, pairs, magnitudes, n)
        swaps += count
        if complete:
            if not swaps:
                best = _better(order, best, magnitudes, n)
                order = _escape(best, draw)
            swaps = 0
    return _better(order, best, magnitudes, n).ravel()


def kept_magnitude(weights, n, m):
    """Sum of the `n` largest magnitudes in every `m` consecutive rows of each column, in float64.

    Example:

    >>> kept_magnitude([[3.0], [-1.0], [2.0], [5.0]], n=2, m=4)
    8.0
    """
    groups = np.sort(_magnitudes(weights, n, m).reshape(-1, m, np.shape(weights)[1]), axis=1)
    return float(np.sum(groups[:, m - n :], dtype=np.float64))


def swap_gains(pairs, n):
    """What every swap of a row of one group with a row of another would add to the magnitude kept.

    Without row `i`, a group keeps `sum_c (t_c + rest)`, where `t_c` is the smallest of the `n` weights it then keeps in
    column `c`; a row `w` that joins it replaces `t_c` by `max(t_c, w_c)`. So all swaps need no sorting of their own.

    Args:
        pairs: magnitudes `[pairs, 2, m, columns]` of two groups each.
        n: weights kept per group and column.

    Returns:
        Array `[pairs, m, m]`: gain of swapping row `i` of the first group with row `j` of the second.

    Example: swapping the 4 with the 1 (or the 5 with the 1) keeps 4 + 5 instead of 5 + 1.

    >>> pairs = np.array([[[[5.0], [4.0]], [[1.0], [0.0]]]])
    >>> swap_gains(pairs, n=1)[0].tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    m = pairs.shape[2]
    ranked = np.sort(pairs, axis=2)
    last_kept, first_pruned = ranked[:, :, m - n, None], ranked[:, :, m - n - 1, None]
    smallest = np.where(pairs >= last_kept, first_pruned, last_kept)
    lost = np.sum(np.maximum(pairs, last_kept), axis=-1)  # by removing a row: itself or, if it is pruned, t_c
    gains = -lost[:, 0, :, None] - lost[:, 1, None, :]
    for row in range(m):
        gains[:, row, :] += np.sum(np.maximum(smallest[:, 0, row, None], pairs[:, 1]), axis=-1)
        gains[:, :, row] += np.sum(np.maximum(smallest[:, 1, row, None], pairs[:, 0]), axis=-1)
    return gains


def _magnitudes(weights, n, m):
    magnitudes = np.abs(np.asarray(weights, dtype=np.float32))
    if magnitudes.ndim != 2 or not np.isfinite(magnitudes).all():
        raise ValueError(f"weights must be a matrix of finite numbers, got shape {magnitudes.shape}.")
    if not 1 <= n < m or len(magnitudes) % m:
        raise ValueError(
            f"Pattern {n}:{m} does not fit {len(magnitudes)} rows: it needs 1 <= n < m, and m must divide the rows."
        )
    return magnitudes


def _meetings(groups, draw):
    """Yield `(pairs, complete)` for ever: a shuffled tournament, in which all groups meet, and then the next."""
    even = groups + groups % 2  # with an odd number one group rests
    while groups > 1:
        names = draw.permutation(even)
        for turn in range(even - 1):
            ring = np.concatenate([names[:1], np.roll(names[1:], turn)])
            pairs = np.stack([ring, ring[::-1]], axis=1)[: even // 2]
            yield pairs[np.all(pairs < groups, axis=1)], turn == even - 2


def _swap_best(order, pairs, magnitudes, n):
    """Make the best swap of every pair of groups; return the order and the number of swaps that gained."""
    order = order.copy()
    m, count = order.shape[1], 0
    at_once = max(1, 2**17 // (2 * m * magnitudes.shape[1]))  # pairs that fit into the processor's cache
    for start in range(0, len(pairs), at_once):
        some = pairs[start : start + at_once]
        weights = magnitudes[order[some]]
        gains = swap_gains(weights, n).reshape(len(some), -1)
        choice = np.argmax(gains, axis=1)
        worth = np.max(gains, axis=1) > TOLERANCE * np.sum(weights, axis=(1, 2, 3))
        (left, right), row, other = some[worth].T, choice[worth] // m, choice[worth] % m
        order[left, row], order[right, other] = order[right, other], order[left, row]
        count += int(np.sum(worth))
    return order, count


def _escape(order, draw):
    """Return the order with a few random rows moved around."""
    rows = order.ravel().copy()
    some = draw.choice(len(rows), min(ESCAPE, len(rows)), replace=False)
    rows[some] = rows[np.roll(some, 1)]
    return rows.reshape(order.shape)


def _better(order, other, magnitudes, n):
    m = order.shape[1]
    gain = kept_magnitude(magnitudes[order.ravel()], n, m) - kept_magnitude(magnitudes[other.ravel()], n, m)
    return order if gain > 0 else other
