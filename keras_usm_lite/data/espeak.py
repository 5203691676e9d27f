"""A small binding to the espeak-ng speech synthesiser, for corpora that are made on the spot."""

import ctypes
import os
import shutil
import tempfile
import threading
from math import gcd

import numpy as np

# From espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4
_POSITION_IN_CHARACTERS = 1
_CHARS_UTF8 = 1
_SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

# espeak-ng keeps the path of its data in 160 bytes and appends file names to it.
_LONGEST_DATA_PATH = 100


class Espeak:
    """Speaks text with espeak-ng and returns the samples.

    espeak-ng is a formant synthesiser: about two milliseconds of computing per sentence, no model weights.
    It comes from the optional package `espeakng-loader` (espeak-ng is licensed under GPL-3.0-or-later).

    The C library keeps its state (voice, pitch flutter, noise) in global variables. Each instance therefore
    loads a private copy of the library, so that a new instance always answers the same sequence of calls with
    the same samples, whatever other instances did before. (Not so the variants "Reed" and "caleb", whose
    breath noise comes from the random numbers of the C library.)

    Raises:
        ImportError: If `espeakng-loader` is not installed.
        OSError: If the library cannot be loaded.

    Example:

    >>> espeak = Espeak()
    >>> audio = espeak.synthesize("zoom in", voice="en-us", variant="f3", rate=160, pitch=50)
    >>> audio.dtype.name, 0.3 < len(audio) / 16000 < 1.5
    ('float32', True)
    """

    sample_rate = 16000

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError as error:
            raise ImportError(
                "Speech synthesis needs the package espeakng-loader: pip install espeakng-loader"
            ) from error
        # Lives as long as the instance: espeak-ng opens its data files when a voice is first used.
        self._folder = tempfile.TemporaryDirectory(prefix="espeak-", ignore_cleanup_errors=True)
        self._library = _load_private_copy(espeakng_loader.get_library_path(), self._folder.name)
        self._data = _short_path(espeakng_loader.get_data_path(), self._folder.name)
        self._lock = threading.Lock()
        self._chunks = []
        self._callback = _SYNTH_CALLBACK(self._collect)
        self._native_rate = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(self._data), _INITIALIZE_DONT_EXIT
        )
        if self._native_rate <= 0:
            raise OSError(f"espeak-ng could not be initialised with the data in {self._data!r}.")
        self._library.espeak_ng_SetRandSeed(1)  # initialising has seeded it with the time of day
        self._library.espeak_SetSynthCallback(self._callback)

    def list_variants(self):
        """Returns the names of the voice variants (timbres) that go with every voice, sorted.

        Example:

        >>> variants = Espeak().list_variants()
        >>> len(variants) > 90, "f3" in variants
        (True, True)
        """
        return sorted(os.listdir(os.path.join(self._data, "voices", "!v")))

    def synthesize(self, text, voice="en-us", variant="f3", rate=160, pitch=50, pitch_range=50):
        """Returns `text` spoken by one voice.

        Args:
            text: What to say, as plain text.
            voice: Language or accent, such as `"en-us"`, `"en"` (British) or `"en-gb-scotland"`.
            variant: Timbre, one of `list_variants()`.
            rate: Speed in words per minute, 80 to 450.
            pitch: Pitch of the voice, 0 (low) to 99 (high).
            pitch_range: Liveliness of the melody, 0 (monotone) to 99.

        Returns:
            float32 array of shape `(samples,)` at 16 kHz, values in [-1, 1].

        Raises:
            ValueError: If the voice or the variant does not exist, or a number is out of range.
        """
        if variant not in self.list_variants():
            raise ValueError(f"Unknown espeak variant {variant!r}; choose one of {self.list_variants()}.")
        for name, value, low, high in (
            ("rate", rate, 80, 450),
            ("pitch", pitch, 0, 99),
            ("pitch_range", pitch_range, 0, 99),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} must lie between {low} and {high}, not {value!r}.")
        with self._lock:
            samples = self._speak(text, f"{voice}+{variant}", int(rate), int(pitch), int(pitch_range))
        return _resample(samples.astype(np.float32) / 32768.0, self._native_rate, self.sample_rate)

    def _speak(self, text, voice, rate, pitch, pitch_range):
        library = self._library
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}; try 'en-us', 'en' or 'en-gb-scotland'.")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_PITCH_RANGE, pitch_range)):
            library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        data = text.encode()
        status = library.espeak_Synth(
            data,
            ctypes.c_size_t(len(data) + 1),
            ctypes.c_uint(0),
            _POSITION_IN_CHARACTERS,
            ctypes.c_uint(0),
            ctypes.c_uint(_CHARS_UTF8),
            None,
            None,
        )
        if status != 0:
            raise RuntimeError(f"espeak-ng failed with status {status} on the text {text!r}.")
        return np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.int16)

    def _collect(self, samples, count, _events):
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


def _load_private_copy(library_path, folder):
    """Loads a copy of a shared library from `folder`, which gives it global variables of its own."""
    copy = shutil.copy(library_path, folder)
    try:
        return ctypes.CDLL(copy)
    except OSError as error:
        raise OSError(
            f"Cannot load the copy of espeak-ng in {folder}: {error}. If programs may not run from there, "
            "set TMPDIR to a folder from which they may."
        ) from error


def _short_path(data_path, folder):
    """Returns `data_path`, or a short link to it in `folder` where it is too long for espeak-ng's buffers."""
    if len(os.fsencode(data_path)) <= _LONGEST_DATA_PATH:
        return data_path
    link = os.path.join(folder, "espeak-ng-data")
    os.symlink(data_path, link, target_is_directory=True)
    return link


def _resample(audio, rate, new_rate):
    from scipy.signal import resample_poly

    divisor = gcd(rate, new_rate)
    resampled = resample_poly(audio, new_rate // divisor, rate // divisor)
    return np.clip(resampled, -1.0, 1.0).astype(np.float32)
