"""Reads recordings into arrays and writes arrays as WAV files."""

import functools
import math
import os
import sys
import warnings
import wave

import keras
import numpy as np

from keras_usm_lite.data.manifest import replacing

LOUDEST = 100  # times full scale; a loud mix overshoots by a few times
SLOWEST, FASTEST = 1000, 1_000_000  # samples per second; beyond lie damaged headers, whose filters fill the memory


class AudioError(ValueError):
    """Audio that cannot be read or written; the message names the file and the reason."""


def load_audio(path, sample_rate=16000):
    """Reads a recording as mono samples at a given rate.

    Under TensorFlow, WAV is decoded by TensorFlow, and FLAC and MP3 by tensorflow-io where its native kernels
    load. Everything else, and whatever these decoders refuse, is decoded by soundfile (WAV, FLAC, Ogg/Opus,
    Ogg/Vorbis, MP3 and more). Channels are averaged; another sampling rate is converted with a polyphase
    filter; overshoot is clipped.

    Args:
        path: Path of the audio file.
        sample_rate: Samples per second of the result.

    Returns:
        Samples, float32 `[n]`, in [-1, 1].

    Raises:
        AudioError: The file is missing, unreadable or empty, has an impossible sampling rate, or holds samples that
            are not finite or far beyond full scale.

    Example:
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "pause.wav")
    >>> write_wav(path, np.zeros(8000), sample_rate=8000)
    >>> load_audio(path).shape
    (16000,)
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise AudioError(f"{path}: there is no such file; check the path.")
    samples, rate = _decode(path)
    if not SLOWEST <= rate <= FASTEST:
        raise AudioError(
            f"{path}: the header says {rate} samples per second, allowed are {SLOWEST} to {FASTEST}; "
            "repair or remove the file."
        )
    audio = samples.mean(axis=1, dtype=np.float32)
    if not len(audio):
        raise AudioError(f"{path}: the file holds no samples, or its header says so; repair or remove it.")
    if not np.isfinite(audio).all():
        raise AudioError(f"{path}: the file holds NaN or infinite samples; repair or remove it.")
    if np.abs(audio).max() > LOUDEST:
        raise AudioError(
            f"{path}: it holds samples up to {np.abs(audio).max():g}, full scale is 1; they seem to be integers that "
            "were written as floats. Divide them by the full scale, such as 32768, or remove the file."
        )
    if rate != sample_rate:
        from scipy.signal import resample_poly

        divisor = math.gcd(rate, sample_rate)
        audio = resample_poly(audio, sample_rate // divisor, rate // divisor)
    return np.clip(audio, -1.0, 1.0).astype(np.float32)


def write_wav(path, audio, sample_rate=16000):
    """Writes mono samples as a 16-bit PCM WAV file, all or nothing.

    Args:
        path: Path of the file to write; an existing file is replaced.
        audio: Finite floats `[n]`, `n >= 1`; what lies outside [-1, 1] is clipped.
        sample_rate: Samples per second.

    Raises:
        AudioError: `audio` has another shape or type, or values that are not finite.

    Example:
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "tone.wav")
    >>> write_wav(path, 0.5 * np.sin(np.arange(160) / 10))
    >>> os.path.getsize(path)  # a header of 44 bytes and two bytes a sample
    364
    """
    audio = np.asarray(audio)
    if audio.ndim != 1 or not audio.size or not np.issubdtype(audio.dtype, np.floating):
        raise AudioError(
            f"{path}: cannot write {audio.dtype} samples of shape {audio.shape}. "
            "Allowed are floats of shape [n], n >= 1; convert to mono floats in [-1, 1]."
        )
    if not np.isfinite(audio).all():
        raise AudioError(f"{path}: cannot write NaN or infinite samples; repair the signal first.")
    scaled = np.rint(audio.astype(np.float64) * 32768.0)
    pcm = np.clip(scaled, -32768, 32767).astype("<i2")
    with replacing(path) as temporary, wave.open(temporary, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(pcm.tobytes())


def _decode(path):
    """Returns float samples `[n, channels]` and the sampling rate."""
    extension = os.path.splitext(path)[1].lower()
    on_tensorflow = keras.backend.backend() == "tensorflow"
    decoded = None
    if extension == ".wav" and (on_tensorflow or "tensorflow" in sys.modules):
        decoded = _decode_wav(path)
    elif extension in (".flac", ".mp3") and on_tensorflow and _tensorflow_io():
        decoded = _decode_tensorflow_io(path)
    return decoded or _decode_soundfile(path)


def _decode_wav(path):
    import tensorflow as tf

    try:
        samples, rate = tf.audio.decode_wav(tf.io.read_file(path))
    except tf.errors.OpError:  # not 16-bit PCM, or damaged: soundfile reads it or says what is wrong
        return None
    return samples.numpy(), int(rate)


def _decode_soundfile(path):
    import soundfile

    try:
        return soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: .raw, which says nothing of itself
        raise AudioError(f"{path}: cannot be decoded ({error}); repair, convert or remove it.") from error


@functools.cache
def _tensorflow_io():
    """Returns `tensorflow_io`, or None where it is missing or built for another TensorFlow."""
    import tensorflow as tf

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import tensorflow_io

            tensorflow_io.audio.decode_flac(b"", dtype=tf.int16)
    except (ImportError, NotImplementedError):
        return None
    except tf.errors.OpError:  # the kernel is there: it refused the empty file
        pass
    return tensorflow_io


def _decode_tensorflow_io(path):
    import tensorflow as tf

    try:
        audio = _tensorflow_io().audio.AudioIOTensor(path)
        samples = audio.to_tensor().numpy()
    except tf.errors.OpError:
        return None
    if samples.dtype == np.uint8:  # 8-bit FLAC arrives with an offset that soundfile knows better
        return None
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / -float(np.iinfo(samples.dtype).min)
    return samples, int(audio.rate)
