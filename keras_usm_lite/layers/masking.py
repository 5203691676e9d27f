"""Frame masks: which frames of a padded batch are real (Keras' convention: True = valid)."""

from keras import ops


def frame_mask(lengths, num_frames):
    """Return `[batch, num_frames]` booleans, True for the first `lengths[b]` frames.

    Example:

    >>> ops.convert_to_numpy(frame_mask([1, 3], 3)).tolist()
    [[True, False, False], [True, True, True]]
    """
    positions = ops.expand_dims(ops.arange(num_frames, dtype="int32"), 0)
    return positions < ops.expand_dims(ops.cast(lengths, "int32"), -1)


def zero_padding(x, mask):
    """Set padded frames of `[batch, frames, ...]` to zero; `mask=None` means that no frame is padding.

    Example:

    >>> x = zero_padding(ops.ones((1, 2, 1)), ops.convert_to_tensor([[True, False]]))
    >>> [float(v) for v in ops.reshape(x, (-1,))]
    [1.0, 0.0]
    """
    if mask is None:
        return x
    mask = ops.cast(mask, x.dtype)
    return x * ops.reshape(mask, (*ops.shape(mask), *(1,) * (len(x.shape) - 2)))
