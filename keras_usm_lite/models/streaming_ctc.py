"""`StreamingCTC`: one step of a chunk-wise recogniser, with everything it remembers in one tensor."""

import math

import keras
from keras import ops

from keras_usm_lite.layers.masking import frame_mask
from keras_usm_lite.models.usm_for_ctc import IMPOSSIBLE
from keras_usm_lite.rewrite import in_float32

LAG = 3  # frames that the subsampling leaves for the next step: output t ends with frame 4 t


class StreamingCTC(keras.layers.Layer):
    """A recogniser that hears a recording step by step and gives the logits of the whole.

    `logits_k, state_{k+1} = step(input_k, length_k, state_k)` with `state_0 = 0`

    Step `k` takes the next `chunks` attention chunks of `c = chunk_size` output frames (40 ms): `160 * 4 c chunks`
    samples, or `4 c chunks` log-mel frames; steps do not overlap. The last step is filled up with zeros, and `length`
    says how much of it is real: attention leaves the rest out, and frames made of it are certain blanks. So the logits
    of all steps, joined, begin with those of the whole recording; frames behind them are blank.

    The state holds: a flag (0 before the first step); with a front end, 480 samples and, for running normalisation, the
    first frame and the sums so far; without one, 3 frames; the last frame before each strided convolution; and the last
    `kernel_size - 1` frames of each block's convolution. Attention stays within its chunk and remembers nothing.

    Args:
        model: a `USMForCTC` with `chunk_size` and `causal_conv=True`, or its baked or compressed copy; one that
            computes in 16 bits is copied to float32.
        frontend: the `LogMel` the model was trained with, for audio in; None for features in.
        chunks: attention chunks per step.

    Call arguments:
        inputs: audio `[batch, samples]` in [-1, 1], or features `[batch, frames, bins]`.
        length: real samples (or frames), int32 `[batch]`.
        state: float32 `[batch, state_size]`.

    Returns:
        `{"logits": float32 [batch, c * chunks, vocabulary], "state": float32 [batch, state_size]}`.

    Raises:
        ValueError: a model that is not chunk-wise, or a front end that cannot run on a stream or does not fit.

    Source: USM (arXiv 2303.01037), section 3.3 (chunk-wise attention).

    Example:

    >>> import keras_usm_lite as usm
    >>> model = usm.USMForCTC(9, num_layers=1, chunk_size=8, causal_conv=True)
    >>> step = StreamingCTC(model, usm.LogMel(normalization="running"))
    >>> step.chunk_shape, step.state_size  # samples per step, and floats to keep until the next one
    ((5120,), 2850)
    """

    def __init__(self, model, frontend=None, chunks=1, **kwargs):
        super().__init__(dtype="float32", **kwargs)
        self.model = _recogniser(in_float32(model))
        self.frontend = frontend
        settings = self.model.encoder.settings
        if settings["chunk_size"] is None or not settings["causal_conv"]:
            raise ValueError(
                "A stream needs a model that never looks beyond its chunk: USMForCTC(..., chunk_size=..., "
                f"causal_conv=True). This one has chunk_size={settings['chunk_size']!r} and "
                f"causal_conv={settings['causal_conv']!r}; it must be trained that way."
            )
        if chunks < 1:
            raise ValueError(f"chunks={chunks!r} must be at least 1 attention chunk per step.")
        if frontend is not None:
            _check_frontend(frontend, self.model.num_mel_bins)
        self.frames = settings["chunk_size"] * chunks
        self._shapes = self._past_shapes()
        self.built = True  # the parts are

    @property
    def chunk_shape(self):
        """Shape of the inputs of one step, without the batch."""
        if self.frontend is None:
            return (4 * self.frames, self.model.num_mel_bins)
        return (4 * self.frames * self.frontend.stride,)

    @property
    def state_size(self):
        """Numbers in the state of one recording."""
        return sum(math.prod(shape) for shape in self._shapes)

    def _past_shapes(self):
        encoder, bins = self.model.encoder, self.model.num_mel_bins
        source = [(LAG, bins)] if self.frontend is None else self.frontend.past_shapes()
        convolutions = [block.conv.past_shapes(encoder.settings["dim"])[0] for block in encoder.blocks]
        return [(1,), *source, *encoder.subsampling.past_shapes(bins), *convolutions]

    def call(self, inputs, length, state):
        """Compute one step."""
        encoder = self.model.encoder
        started, source, subsampling, convolutions = self._split(state)
        features, mask, source = self._features(inputs, source, started, length)
        x, subsampling = encoder.subsampling.step(features, subsampling, started)
        mask = mask[:, LAG::4]  # output t is real if frame 4 t is
        for number, block in enumerate(encoder.blocks):
            x, convolutions[number] = _block_step(block, x, convolutions[number], mask)
        blank = ops.cast(ops.arange(self.model.vocab_size) != 0, "float32") * IMPOSSIBLE
        logits = ops.where(ops.expand_dims(mask, -1), self.model.head(x), blank)
        return {"logits": logits, "state": _join([ops.ones_like(started), *source, *subsampling, *convolutions])}

    def _features(self, inputs, pasts, started, length):
        """Return the features that lag three frames, which of them are real, and what to remember."""
        if self.frontend is not None:
            return self.frontend.step(inputs, pasts, started, length)
        frames = ops.concatenate([pasts[0], inputs], axis=1)
        return frames[:, :-LAG], frame_mask(length + LAG, 4 * self.frames), [frames[:, -LAG:]]

    def _split(self, state):
        """Return the parts of a state: the flag, what the features need, the strided convolutions, the blocks."""
        batch, parts, begin = ops.shape(state)[0], [], 0
        for shape in self._shapes:
            end = begin + math.prod(shape)
            parts.append(ops.reshape(state[:, begin:end], (batch, *shape)))
            begin = end
        blocks = len(parts) - len(self.model.encoder.blocks)
        return parts[0], parts[1 : blocks - 2], parts[blocks - 2 : blocks], parts[blocks:]


def _join(parts):
    batch = ops.shape(parts[0])[0]
    parts = [ops.reshape(ops.cast(part, "float32"), (batch, math.prod(part.shape[1:]))) for part in parts]
    return ops.concatenate(parts, axis=-1)


def _block_step(block, x, past, mask):
    """One `ConformerBlock` on the next chunks of a stream, outside of training."""
    x = x + 0.5 * block.ffn_start(x)
    x = x + block.attention(block.attention_norm(x), mask=mask)
    convolved, past = block.conv.step(x, past, mask)
    x = x + convolved
    x = x + 0.5 * block.ffn_end(x)
    return block.norm(x), past


def _recogniser(model):
    while not hasattr(model, "encoder"):
        if not hasattr(model, "model"):
            raise ValueError(
                f"{type(model).__name__} {model.name!r} is no USMForCTC, nor a compressed copy of one; only these can "
                "run on a stream."
            )
        model = model.model
    return model


def _check_frontend(frontend, bins):
    if frontend.num_mel_bins != bins:
        raise ValueError(
            f"The model takes {bins} mel bins, the front end gives {frontend.num_mel_bins}. Give the LogMel layer the "
            "model was trained with."
        )
    if frontend.lag != LAG:
        raise ValueError(
            f"At sample_rate={frontend.sample_rate} Hz a frame of {frontend.fft_length} samples takes "
            f"{frontend.lag + 1} strides of {frontend.stride}; a stream needs {LAG + 1}. Use 8000, 16000 or 32000 Hz."
        )
