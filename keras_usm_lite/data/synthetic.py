"""Spoken commands synthesised on the spot, for machines that have neither a corpus nor a network."""

import os
import re

import keras
import numpy as np

from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.espeak import Espeak
from keras_usm_lite.data.manifest import Utterance, write_manifest

DESCRIPTION = "connected English command words, synthesised with espeak-ng (not human speech)"
VOCABULARY = tuple(
    "zero one two three four five six seven eight nine up down left right forward backward yes no ok start "
    "stop open close enable disable enter cancel next previous move rotate record send receive undo zoom_in "
    "zoom_out options digit direction".split()
)
# "en" is British English.
ACCENTS = (
    "en-us",
    "en",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
)
# The first two draw their breath noise from the C library's random numbers, which would make the corpus
# differ from run to run; the other two whisper.
UNSUITABLE_VARIANTS = frozenset({"Reed", "caleb", "whisper", "whisperf"})
SPLITS = ("train", "dev", "test")
SIZES = (1400, 200, 250)
SAMPLE_RATE = 16000


def build_synthetic_commands(folder, sizes=SIZES, snr=(15.0, 35.0), seed=0):
    """Synthesises a corpus of 2 to 6 command words per utterance and writes it into `folder`.

    The words are drawn uniformly from `VOCABULARY` and spoken by espeak-ng as one phrase, with random accent,
    voice, speed and pitch, and then degraded (see `degrade`). No voice is in two splits, so the test measures
    unseen speakers. Word tokens; "zoom_in" is spoken "zoom in".

    Args:
        folder: Folder for the manifests and the WAV files.
        sizes: Number of utterances for training, development and test.
        snr: Lowest and highest ratio of speech to noise, in dB; lower numbers make the task harder.
        seed: Seed of everything random; the same seed gives the same files.

    Returns:
        Path of the manifest of each split.

    Example:

    >>> import contextlib, io, tempfile
    >>> from keras_usm_lite.data.manifest import read_manifest
    >>> with contextlib.redirect_stdout(io.StringIO()):
    ...     manifests = build_synthetic_commands(tempfile.mkdtemp(), sizes=(3, 1, 1))
    >>> len(read_manifest(manifests["train"]))
    3
    """
    espeak = Espeak()  # a new one, for its state decides the samples
    voices = split_voices(espeak.list_variants(), seed)
    print(f"synthetic_commands: synthesising {sum(sizes)} utterances")
    bar = keras.utils.Progbar(sum(sizes), unit_name="utterance", interval=2)
    manifests = {}
    for number, (split, size) in enumerate(zip(SPLITS, sizes, strict=True)):
        os.makedirs(os.path.join(folder, "audio", split))
        utterances = []
        for index in range(size):
            rng = np.random.default_rng([seed, number, index])
            words = rng.choice(VOCABULARY, rng.integers(2, 7)).tolist()
            audio, speaker = _speak(espeak, words, voices[split], rng)
            audio = degrade(audio, rng, snr)
            path = os.path.join(folder, "audio", split, f"{index:05d}.wav")
            write_wav(path, audio, SAMPLE_RATE)
            utterances.append(Utterance(path, len(audio) / SAMPLE_RATE, " ".join(words), speaker))
            bar.add(1)
        manifests[split] = os.path.join(folder, f"{split}.tsv")
        write_manifest(manifests[split], utterances)
    return manifests


def split_voices(variants, seed=0):
    """Assigns voices to splits: 70 % of them for training, 12 % for development, 18 % for test.

    Variants of one family ("steph", "steph2", "steph3") sound alike; together they count as one voice.

    Args:
        variants: Names of espeak variants.
        seed: Seed of the assignment.

    Returns:
        Dict from split to its voices, each a list of variants.

    Example:

    >>> voices = split_voices(["f1", "f2", "f3", "m1", "m2", "m3", "rob", "ed", "zac", "steph", "steph2"])
    >>> {split: len(families) for split, families in voices.items()}
    {'train': 7, 'dev': 1, 'test': 2}
    """
    families = {}
    for variant in sorted(set(variants) - UNSUITABLE_VARIANTS):
        families.setdefault(_family(variant), []).append(variant)
    order = [families[name] for name in np.random.default_rng(seed).permutation(list(families)).tolist()]
    dev, test = round(len(order) * 0.70), round(len(order) * 0.82)
    return {"train": order[:dev], "dev": order[dev:test], "test": order[test:]}


def degrade(audio, rng, snr=(15.0, 35.0)):
    """Makes clean speech sound recorded: a room, a microphone, noise and a level, each drawn at random.

    In this order: 0.05 to 0.25 s of silence at both ends; in half of the cases the room `h(t) = d(t) + r(t)`
    with a tail `r` of decaying noise (RT60 of 0.1 to 0.4 s, 6 to 20 dB below the direct sound); in a third of
    the cases a low-pass filter at 2 to 6 kHz; noise with the spectrum `1 / f^a`, `a` from 0 to 2, at a ratio
    from `snr`; and a peak level of -20 to -1 dBFS.

    Args:
        audio: float32 `[n]` at 16 kHz.
        rng: `numpy.random.Generator`.
        snr: Lowest and highest ratio of speech to noise, in dB.

    Returns:
        float32 `[m]` with `m > n`, values in [-1, 1].

    Example:

    >>> speech = np.sin(np.arange(16000, dtype=np.float32))
    >>> noisy = degrade(speech, np.random.default_rng(0))
    >>> bool(len(noisy) > len(speech)), bool(abs(noisy).max() < 1)
    (True, True)
    """
    before, after = (rng.uniform(0.05, 0.25, 2) * SAMPLE_RATE).astype(int)
    signal = np.pad(audio.astype(np.float64), (before, after))
    if rng.random() < 1 / 2:
        signal = _add_room(signal, rng)
    if rng.random() < 1 / 3:
        signal = _low_pass(signal, rng.uniform(2000.0, 6000.0))
    noise = _colored_noise(len(signal), rng.uniform(0.0, 2.0), rng)
    ratio = 10 ** (rng.uniform(*snr) / 20)
    signal += noise * (_rms(signal) / (ratio * _rms(noise)))
    signal *= 10 ** (rng.uniform(-20.0, -1.0) / 20) / np.abs(signal).max()
    return signal.astype(np.float32)


def _speak(espeak, words, voices, rng):
    variants = voices[rng.integers(len(voices))]
    voice, variant = str(rng.choice(ACCENTS)), str(rng.choice(variants))
    # A comma makes espeak pause, as a person may between two commands.
    text = "".join(word.replace("_", " ") + (", " if rng.random() < 0.3 else " ") for word in words)
    audio = espeak.synthesize(
        text.strip(" ,"),
        voice=voice,
        variant=variant,
        rate=int(rng.integers(130, 231)),
        pitch=int(rng.integers(20, 81)),
        pitch_range=int(rng.integers(20, 81)),
    )
    return audio, f"{voice}+{variant}"


def _family(variant):
    """Returns the family of a variant: "steph" for "steph2"; "f1" to "f5" are voices of their own."""
    return re.sub(r"(?<=\w\w)(robot|\d+)$", "", variant.lower())


def _add_room(signal, rng):
    from scipy.signal import fftconvolve

    decay = rng.uniform(0.1, 0.4)
    time = np.arange(int(decay * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.normal(size=len(time)) * 10 ** (-3.0 * time / decay)  # -60 dB after the decay time
    tail *= 10 ** (-rng.uniform(6.0, 20.0) / 20) / np.linalg.norm(tail)
    return signal + fftconvolve(signal, tail)[: len(signal)]


def _low_pass(signal, cutoff):
    from scipy.signal import butter, sosfilt

    return sosfilt(butter(4, cutoff, fs=SAMPLE_RATE, output="sos"), signal)


def _colored_noise(length, exponent, rng):
    spectrum = np.fft.rfft(rng.normal(size=length))
    frequency = np.maximum(np.fft.rfftfreq(length, 1 / SAMPLE_RATE), 50.0)
    return np.fft.irfft(spectrum * frequency ** (-exponent / 2), length)


def _rms(signal):
    return np.sqrt(np.mean(np.square(signal)))
