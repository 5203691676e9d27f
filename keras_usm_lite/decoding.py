"""CTC decoding: from logits to label sequences."""

import keras
import numpy as np


def greedy_decode(logits):
    """Takes the best class of every frame, then drops repeats and blanks.

    With `B` the map that merges repeated labels and removes blanks, the result is
    `B(argmax_k logits[b, 1, k], ..., argmax_k logits[b, T, k])`.

    Source: A. Graves et al., "Connectionist Temporal Classification", ICML 2006, section 3.2 (best path
    decoding).

    Args:
        logits: `[B, T, V]`, NumPy array or tensor of the Keras backend, class 0 the blank. Frames beyond the
            end of an utterance must say "blank".

    Returns:
        `list[list[int]]`, the labels (1 to V - 1) of each utterance.

    Raises:
        ValueError: if `logits` does not have three axes.

    Example:
        >>> import numpy as np
        >>> frames = [2, 2, 0, 2, 1, 1, 0]
        >>> greedy_decode(np.eye(3)[None, frames])
        [[2, 2, 1]]
    """
    _check_logits(logits)
    best = keras.ops.convert_to_numpy(keras.ops.argmax(logits, axis=-1))
    changed = np.diff(best, axis=1, prepend=0) != 0  # a first frame equal to the blank is dropped anyway
    return [row[keep].tolist() for row, keep in zip(best, changed & (best != 0), strict=True)]


def beam_decode(logits, beam_width=16, top_paths=1):
    """Finds the most probable label sequences by prefix beam search.

    The probability of a label sequence `y` is the sum over all alignments `a` that read as `y`,
    `p(y) = sum_{a: B(a) = y} prod_t softmax(logits[t])[a_t]`. The search keeps the `beam_width` most probable
    prefixes of each frame, with the alignments that end in a blank counted apart from those that end in a
    label. It runs in NumPy, so it gives the same result and takes the same time under every backend.

    Source: A. Y. Hannun et al., "First-Pass Large Vocabulary Continuous Speech Recognition using
    Bi-Directional Recurrent DNNs", arXiv:1408.2873, algorithm 1, without the language model.

    Args:
        logits: `[B, T, V]`, NumPy array or tensor of the Keras backend, class 0 the blank. Frames beyond the
            end of an utterance must say "blank".
        beam_width: number of prefixes kept at each frame.
        top_paths: number of sequences wanted per utterance, at most `beam_width`.

    Returns:
        For each utterance the list of its best sequences, best first and at most `top_paths` of them, each
        as a pair `(labels, log_probability)` of a `list[int]` and the natural logarithm of `p(y)`. The latter
        is a lower bound if the beam has dropped alignments.

    Raises:
        ValueError: if `logits` does not have three axes or has NaN, or unless `1 <= top_paths <= beam_width`.

    Example:
        >>> import numpy as np
        >>> logits = np.log([[[0.6, 0.4], [0.6, 0.4]]])  # the best alignment is blank, blank: 0.36,
        >>> [[(labels, log_probability)]] = beam_decode(logits)
        >>> labels, round(float(np.exp(log_probability)), 2)  # but three read as [1]: 0.24 + 0.24 + 0.16
        ([1], 0.64)
    """
    _check_logits(logits)
    if not 1 <= top_paths <= beam_width:
        raise ValueError(f"1 <= top_paths <= beam_width must hold, got top_paths={top_paths}, beam_width={beam_width}.")
    log_probs = keras.ops.convert_to_numpy(keras.ops.log_softmax(keras.ops.cast(logits, "float32")))
    if np.isnan(log_probs).any():
        raise ValueError("The logits give NaN probabilities. Look for the step at which the loss became NaN.")
    return [_prefix_beam_search(utterance, beam_width)[:top_paths] for utterance in log_probs.astype("float64")]


def _prefix_beam_search(log_probs, beam_width):
    """Returns the surviving `(labels, log_probability)` pairs of `[T, V]` log-probabilities, best first."""
    num_classes = log_probs.shape[1]
    prefixes = [()]
    ends_in_blank, ends_in_label = np.zeros(1), np.full(1, -np.inf)
    for frame in log_probs:
        total = np.logaddexp(ends_in_blank, ends_in_label)
        last = np.array([prefix[-1] if prefix else 0 for prefix in prefixes])
        # Row by row: column 0 leaves the prefix as it is, column k appends the label k.
        by_label = total[:, None] + frame
        by_label[np.arange(len(prefixes)), last] = ends_in_blank + frame[last]  # repeats need a blank between
        by_label[:, 0] = ends_in_label + frame[last]
        by_blank = np.full_like(by_label, -np.inf)
        by_blank[:, 0] = total + frame[0]
        # A prefix that is there already can also be grown from its parent: add that to the way it stays.
        row_of = {prefix: row for row, prefix in enumerate(prefixes)}
        for row, prefix in enumerate(prefixes):
            parent = row_of.get(prefix[:-1]) if prefix else None
            if parent is not None:
                by_label[row, 0] = np.logaddexp(by_label[row, 0], by_label[parent, prefix[-1]])
                by_label[parent, prefix[-1]] = -np.inf

        score = np.logaddexp(by_blank, by_label).ravel()
        width = min(beam_width, score.size)
        best = np.argpartition(score, -width)[-width:]
        best = best[score[best] > -np.inf]
        steps = [divmod(k, num_classes) for k in best.tolist()]
        prefixes = [(*prefixes[row], label) if label else prefixes[row] for row, label in steps]
        ends_in_blank, ends_in_label = by_blank.ravel()[best], by_label.ravel()[best]

    total = np.logaddexp(ends_in_blank, ends_in_label)
    return [(list(prefixes[row]), float(total[row])) for row in np.argsort(-total, kind="stable")]


def _check_logits(logits):
    if len(np.shape(logits)) != 3:
        raise ValueError(f"logits must be [batch, frames, classes], got the shape {tuple(np.shape(logits))}.")
