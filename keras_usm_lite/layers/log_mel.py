"""`LogMel`: raw 16 kHz audio to normalised log-mel features, inside the model if wished."""

import math

import keras
from keras import ops

from keras_usm_lite.layers.masking import frame_mask, zero_padding

NORMALIZATIONS = ("utterance", "running", None)
FLOOR = 1e-6  # added to mel power before the logarithm: about the quantization noise of 16-bit audio
MIN_DEVIATION = 1e-2


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class LogMel(keras.layers.Layer):
    """Log-mel filter bank features of 25 ms windows every 10 ms.

    `features = normalise(log(mel @ |STFT(audio)|^2 + 1e-6))`

    At 16 kHz frame `t` analyses samples `160 t .. 160 t + 511`, a 400-sample Hann window in the middle of a 512-point
    Fourier transform. Nothing is padded, so frames do not depend on what follows: `T = 1 + (samples - 512) // 160`.

    Shapes: audio `[batch, samples]` in [-1, 1] -> features `[batch, T, num_mel_bins]`, padded frames zero.

    Args:
        num_mel_bins: 80, or 128 as in USM.
        normalization: "utterance" (mean and deviation of each bin over the whole utterance), "running" (over the
            frames so far, for streaming), or None.
        sample_rate: samples per second.
        min_frequency, max_frequency: range of the filter bank in Hz.

    Call arguments:
        inputs: audio, float.
        lengths: None, or the number of real samples of each row, int `[batch]`.

    Raises:
        ValueError: an unknown normalization, filters that hear nothing, or audio that is not `[batch, samples]` or is
            shorter than a frame.

    Source: USM (arXiv 2303.01037), section 3.1 (128-dimensional log-mel, 25 ms / 10 ms).

    Example:

    >>> tuple(LogMel()(ops.zeros((1, 16000))).shape)
    (1, 97, 80)
    """

    def __init__(
        self,
        num_mel_bins=80,
        normalization="utterance",
        sample_rate=16000,
        min_frequency=40.0,
        max_frequency=7600.0,
        **kwargs,
    ):
        kwargs.setdefault("dtype", "float32")  # 16-bit floats cannot hold the range of power spectra
        super().__init__(**kwargs)
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization={normalization!r} is not supported; choose one of {NORMALIZATIONS}.")
        self.num_mel_bins = num_mel_bins
        self.normalization = normalization
        self.sample_rate = sample_rate
        self.min_frequency = min_frequency
        self.max_frequency = max_frequency
        self.window = sample_rate * 25 // 1000
        self.stride = sample_rate // 100
        self.fft_length = 1 << (self.window - 1).bit_length()
        self.mel_matrix = keras.layers.MelSpectrogram(sampling_rate=sample_rate).linear_to_mel_weight_matrix(
            num_mel_bins, self.fft_length // 2 + 1, sample_rate, min_frequency, max_frequency
        )
        self.mel_matrix = ops.convert_to_numpy(self.mel_matrix)
        if max_frequency > sample_rate / 2:
            raise ValueError(
                f"max_frequency={max_frequency!r} Hz lies above {sample_rate / 2:g} Hz, half the sample rate. "
                "Choose a lower one."
            )
        empty = int((self.mel_matrix.sum(axis=0) == 0).sum())
        if empty:
            raise ValueError(
                f"{empty} of {num_mel_bins} mel filters between {min_frequency!r} and {max_frequency!r} Hz are "
                "narrower than the Fourier transform resolves. Use fewer bins or a higher min_frequency."
            )

    def num_frames(self, num_samples):
        """Frames of an utterance of so many samples; works on ints and on integer tensors.

        Example:

        >>> LogMel().num_frames(16000)
        97
        """
        return (num_samples - self.fft_length) // self.stride + 1

    def call(self, inputs, lengths=None):
        """Compute features of padded audio."""
        if len(inputs.shape) != 2:
            raise ValueError(f"LogMel takes audio [batch, samples], got shape {tuple(inputs.shape)}.")
        if isinstance(inputs.shape[1], int) and inputs.shape[1] < self.fft_length:
            raise ValueError(
                f"LogMel got {inputs.shape[1]} samples; one frame takes {self.fft_length} samples. Pad the audio."
            )
        features = self._log_mel(inputs)
        mask = None
        if lengths is not None:
            mask = frame_mask(self.num_frames(ops.cast(lengths, "int32")), ops.shape(features)[1])
        features = zero_padding(self._normalize(features, mask), mask)
        return ops.cast(features, self.compute_dtype)

    @property
    def lag(self):
        """Frames that have begun but not ended when a stream has brought a whole number of strides.

        Example:

        >>> LogMel().lag
        3
        """
        return math.ceil(self.fft_length / self.stride) - 1

    def past_shapes(self):
        """Return the shapes, without the batch, of what `step` remembers: samples, first frame, sums so far."""
        bins = (1, self.num_mel_bins)
        sums = [] if self.normalization is None else [bins, (1, 1), bins, bins]
        return [(self.lag * self.stride,), *sums]

    def step(self, inputs, pasts, started, length):
        """Compute the features of the next samples of a stream.

        `n` strides of audio, from the start of frame `t` on, end the frames `t - lag .. t - lag + n - 1`. Together the
        steps give the frames of the whole recording. Frames before the first and after the last real one are zero.

        Args:
            inputs: the samples, `[batch, n * stride]`, `n` above `lag`; zeros behind the end of the recording.
            pasts: `[batch, *past_shape]` each; zeros at the start.
            started: `[batch, 1]`, 0 in the first step, 1 later.
            length: number of real samples, int32 `[batch]`; fewer than there are only in the last step.

        Returns:
            The triple `(features, mask, pasts)`: `[batch, n, num_mel_bins]`, `[batch, n]` True up to the last real
            frame, and what the next step continues with.

        Raises:
            ValueError: the front end normalises whole utterances.
        """
        if self.normalization == "utterance":
            raise ValueError(
                "LogMel(normalization='utterance') needs the end of a recording to normalise its start, so it cannot "
                "run on a stream. Train with LogMel(normalization='running'), or with None, and give that layer."
            )
        audio = ops.concatenate([pasts[0], inputs], axis=1)
        features = self._log_mel(audio)
        mask = frame_mask(self.num_frames(length + self.lag * self.stride), features.shape[1])
        heard = ops.maximum(started, ops.cast(ops.arange(features.shape[1]) >= self.lag, "float32"))
        weights = ops.expand_dims(ops.cast(mask, "float32") * heard, -1)
        sums = []
        if self.normalization == "running":
            first = ops.where(ops.expand_dims(started, -1) > 0, pasts[1], features[:, self.lag : self.lag + 1])
            features = features - first
            so_far = [
                ops.add(past, ops.cumsum(part, axis=1))
                for past, part in zip(pasts[2:], _moments(features, weights), strict=True)
            ]
            features = _standardize(features, *so_far)
            sums = [first, *(part[:, -1:] for part in so_far)]
        return features * weights, mask, [audio[:, inputs.shape[1] :], *sums]

    def _log_mel(self, audio):
        audio = ops.cast(audio, "float32")
        real, imaginary = ops.stft(audio, self.window, self.stride, self.fft_length, window="hann", center=False)
        power = ops.square(real) + ops.square(imaginary)
        return ops.log(ops.matmul(power, self.mel_matrix) + FLOOR)

    def _normalize(self, features, mask):
        if self.normalization is None:
            return features
        features = features - features[:, :1]  # near zero, so that the variance below keeps its digits
        weights = ops.ones_like(features[..., :1])
        weights = weights if mask is None else zero_padding(weights, mask)
        total = ops.cumsum if self.normalization == "running" else _sum_over_frames
        return _standardize(features, *(total(part, axis=1) for part in _moments(features, weights)))

    def compute_output_shape(self, input_shape):
        """`[batch, samples] -> [batch, frames, num_mel_bins]`."""
        samples = input_shape[1]
        return (input_shape[0], None if samples is None else self.num_frames(samples), self.num_mel_bins)

    def get_config(self):
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "num_mel_bins": self.num_mel_bins,
            "normalization": self.normalization,
            "sample_rate": self.sample_rate,
            "min_frequency": self.min_frequency,
            "max_frequency": self.max_frequency,
        }


def _moments(features, weights):
    """Return what is summed over frames: counts, values, squares."""
    return weights, features * weights, ops.square(features) * weights


def _standardize(features, count, total, square):
    count = ops.maximum(count, 1.0)
    mean = total / count
    deviation = ops.sqrt(ops.maximum(square / count - ops.square(mean), 0.0))
    return (features - mean) / ops.maximum(deviation, MIN_DEVIATION)


def _sum_over_frames(x, axis):
    return ops.sum(x, axis=axis, keepdims=True)
