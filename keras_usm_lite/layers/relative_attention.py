"""`RelativeSelfAttention`: self-attention with rotary relative positions, full or within chunks."""

import keras
from keras import ops

from keras_usm_lite.layers.compressed_kernel import compression_config, resolve_compression
from keras_usm_lite.layers.quant_dense import QuantDense

ROTARY_BASE = 10000.0
MASKED = -1e9


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class RelativeSelfAttention(keras.layers.Layer):
    """Multi-head self-attention whose scores depend on relative positions only.

    `out = softmax(R(q) R(k)^T / sqrt(d_head)) v`, projected by `output`; `R` rotates pairs of features of frame `t`
    by angles `t * 10000^(-2 i / d_head)`, so that a score depends on the distance of two frames.

    With `chunk_size = c`, frame `i` attends to frame `j` only if `i // c == j // c` (USM's chunk-wise attention): the
    receptive field does not grow with depth, chunks can be computed one after the other, and `T` frames have `c T`
    scores instead of `T^2`.

    Shapes: `[batch, frames, dim] -> [batch, frames, dim]`.

    Args:
        num_heads: heads; `dim / num_heads` must be an even integer.
        chunk_size: frames per chunk, or None for full attention.
        quantization, sparsity: compression of the four projections, see `QuantDense`.

    Raises:
        ValueError: heads that do not divide the width; a number of heads or a chunk size that is no positive integer.

    Source: USM (arXiv 2303.01037), section 3.3 (chunk-wise attention); rotary positions: arXiv 2104.09864.

    Example:

    >>> tuple(RelativeSelfAttention(2, chunk_size=4)(ops.ones((1, 10, 8))).shape)
    (1, 10, 8)
    """

    def __init__(self, num_heads, chunk_size=None, quantization=None, sparsity=None, **kwargs):
        super().__init__(**kwargs)
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(
                f"chunk_size must be None (full attention) or a whole number of frames, got {chunk_size!r}."
            )
        if not isinstance(num_heads, int) or num_heads < 1:
            raise ValueError(f"num_heads must be an integer of at least 1, got {num_heads!r}.")
        self.num_heads = num_heads
        self.chunk_size = chunk_size
        resolve_compression(self, quantization, sparsity)
        self.supports_masking = True

    def build(self, input_shape):
        """Create the projections for the width of the input."""
        dim = input_shape[-1]
        if dim % self.num_heads or (dim // self.num_heads) % 2:
            raise ValueError(
                f"num_heads={self.num_heads} must divide the width {dim} into heads of even size (rotary positions "
                "turn pairs of features). Choose another num_heads or width."
            )
        self.head_dim = dim // self.num_heads
        shared = {"quantization": self.quantization, "sparsity": self.sparsity, "dtype": self.dtype_policy}
        self.query = QuantDense(dim, use_bias=False, name="query", **shared)
        self.key = QuantDense(dim, use_bias=False, name="key", **shared)
        self.value = QuantDense(dim, use_bias=False, name="value", **shared)
        self.output_projection = QuantDense(dim, use_bias=False, name="output", **shared)
        for projection in (self.query, self.key, self.value, self.output_projection):
            projection.build(input_shape)

    def call(self, inputs, mask=None, training=None):
        """Attend; `mask` `[batch, frames]` marks real frames, which are the only ones attended to."""
        projections = (self.query, self.key, self.value)
        tensors = [projection(inputs, training=training) for projection in projections]
        if self.chunk_size is None:
            context = self._attend(*tensors, mask)
        else:
            batch, frames = ops.shape(inputs)[:2]
            if mask is None:
                mask = ops.ones((batch, frames), "bool")
            size = min(self.chunk_size, frames) if isinstance(frames, int) else ops.minimum(self.chunk_size, frames)
            *tensors, mask = [_chunks(x, size) for x in (*tensors, mask)]  # as if each were an utterance
            context = ops.reshape(self._attend(*tensors, mask), (batch, -1, self.num_heads * self.head_dim))
            context = context[:, :frames]
        return self.output_projection(context, training=training)

    def _attend(self, query, key, value, mask):
        """Return what each frame takes from the values `[batch, frames, dim]` of all frames of its row."""
        batch, frames = ops.shape(query)[:2]
        cosine, sine = self._rotation(frames)
        query, key = (_rotate(self._heads(x), cosine, sine) for x in (query, key))
        scores = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2)))
        scores = ops.cast(scores, "float32") * self.head_dim**-0.5
        if mask is not None:
            scores = ops.where(ops.expand_dims(mask, (1, 2)), scores, MASKED)
        weights = ops.cast(ops.softmax(scores), self.compute_dtype)
        context = ops.transpose(ops.matmul(weights, self._heads(value)), (0, 2, 1, 3))
        return ops.reshape(context, (batch, frames, self.num_heads * self.head_dim))

    def _heads(self, x):
        batch, frames = ops.shape(x)[:2]
        x = ops.reshape(x, (batch, frames, self.num_heads, self.head_dim))
        return ops.transpose(x, (0, 2, 1, 3))

    def _rotation(self, frames):
        half = self.head_dim // 2
        rates = ROTARY_BASE ** (-ops.arange(half, dtype="float32") / half)
        position = ops.cast(ops.arange(frames), "float32")
        angles = ops.expand_dims(position, -1) * rates
        return ops.cast(ops.cos(angles), self.compute_dtype), ops.cast(ops.sin(angles), self.compute_dtype)

    def free_channels(self):
        """The value channels of each head, for `permute_channels`."""
        return self.output_projection, self.num_heads, [self.value]

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        return input_shape

    def get_config(self):
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "chunk_size": self.chunk_size,
            **compression_config(self),
        }


def _chunks(x, size):
    """Cut `[batch, frames, ...]` into `[batch * chunks, size, ...]`, the last chunk filled with zeros."""
    batch, frames, *rest = ops.shape(x)
    count = (frames + size - 1) // size
    if not isinstance(frames, int) or frames % size:  # of a number that is not known yet
        x = ops.concatenate([x, ops.zeros((batch, size - 1, *rest), x.dtype)], axis=1)[:, : count * size]
    return ops.reshape(x, (-1, size, *rest))


def _rotate(x, cosine, sine):
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
