"""The arithmetic of BEST-RQ: which frames to hide, what to predict there, how wrong a prediction is."""

import keras
from keras import ops


def span_mask(draws, mask_prob, mask_span):
    """Return the frames that lie in a hidden span: `masked_t = any(draws_s < mask_prob for s in t - span + 1 .. t)`.

    Each frame begins a span with probability `mask_prob`, and spans may overlap, so that from frame `mask_span - 1` on
    the share `1 - (1 - mask_prob)^mask_span` of the frames is hidden. Shapes are static: it compiles on TPU.

    Args:
        draws: float `[batch, frames]`, uniform in [0, 1).
        mask_prob: probability that a frame begins a span.
        mask_span: frames per span.

    Returns:
        Booleans `[batch, frames]`.

    Source: Chiu et al. 2022 (arXiv 2202.01855), section 3.1.

    Example:

    >>> ops.convert_to_numpy(span_mask([[0.9, 0.1, 0.9, 0.9, 0.9]], mask_prob=0.2, mask_span=2)).tolist()
    [[False, True, True, False, False]]
    """
    begins = ops.cast(ops.convert_to_tensor(draws) < mask_prob, "int32")
    begun = ops.cumsum(begins, axis=1)
    ended = ops.pad(begun, ((0, 0), (mask_span, 0)))[:, : ops.shape(begun)[1]]
    return begun > ended


def stack_frames(features, factor):
    """Join every `factor` frames into one; zeros complete the last.

    Args:
        features: `[batch, frames, bins]`.
        factor: frames per stack.

    Returns:
        `[batch, ceil(frames / factor), factor * bins]`.

    Example:

    >>> ops.convert_to_numpy(stack_frames(ops.ones((1, 3, 1)), 2)).tolist()
    [[[1.0, 1.0], [1.0, 0.0]]]
    """
    batch, frames, bins = ops.shape(features)
    stacks = (frames + factor - 1) // factor
    padded = ops.pad(features, ((0, 0), (0, factor - 1), (0, 0)))
    return ops.reshape(padded[:, : stacks * factor], (batch, stacks, factor * features.shape[-1]))


def nearest_codes(features, projections, codes):
    """Return, for each codebook, the code that points most nearly in the direction of the projected features.

    `argmin_k | code_k / |code_k| - P x / |P x| | = argmax_k <code_k / |code_k|, P x>`

    Args:
        features: float `[batch, frames, size]`.
        projections: `P`, float `[codebooks, size, code_dim]`.
        codes: float `[codebooks, codebook_size, code_dim]`.

    Returns:
        int32 `[batch, frames, codebooks]`; the lowest of equally near codes. No gradient passes.

    Source: Chiu et al. 2022 (arXiv 2202.01855), equation 1.

    Example:

    >>> codes = [[[1.0, 0.0], [0.0, 5.0]]]
    >>> ops.convert_to_numpy(nearest_codes([[[3.0, 2.0], [-1.0, 0.1]]], [[[1.0, 0.0], [0.0, 1.0]]], codes)).tolist()
    [[[0], [1]]]
    """
    features, projections, codes = (ops.convert_to_tensor(x, "float32") for x in (features, projections, codes))
    projected = ops.einsum("btf,cfd->btcd", features, projections)
    similarity = ops.einsum("btcd,ckd->btck", projected, ops.normalize(codes, axis=-1))
    return ops.stop_gradient(ops.cast(ops.argmax(similarity, axis=-1), "int32"))


def masked_cross_entropy(codes, logits, weights):
    """Return the cross-entropy of predicted codes, averaged over codebooks and weighted frames.

    `sum_t w_t mean_c(-log softmax(logits_tc)[code_tc]) / sum_t w_t`, in float32.

    Args:
        codes: int `[batch, frames, codebooks]`.
        logits: float `[batch, frames, codebooks, codebook_size]`.
        weights: `[batch, frames]`, 0 for frames that do not count.

    Returns:
        float32 scalar, in nats; 0 if all weights are, `log(codebook_size)` for uniform predictions.

    Source: Chiu et al. 2022 (arXiv 2202.01855), section 3; several codebooks: USM (arXiv 2303.01037), section 3.2.

    Example:

    >>> round(float(masked_cross_entropy([[[0], [1]]], [[[[0.0, 0.0]], [[9.0, 0.0]]]], [[1.0, 0.0]])), 4)  # log(2)
    0.6931
    """
    logits, weights = (ops.convert_to_tensor(x, "float32") for x in (logits, weights))
    errors = ops.sparse_categorical_crossentropy(codes, logits, from_logits=True)
    errors = ops.mean(errors, axis=-1)
    return ops.sum(weights * errors) / ops.maximum(ops.sum(weights), keras.config.epsilon())
