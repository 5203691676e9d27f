"""Claims about the synthesised corpus and its degradations."""

import hashlib
import time

import numpy as np
import pytest

pytest.importorskip("espeakng_loader")

import soundfile

from keras_usm_lite.data.espeak import Espeak
from keras_usm_lite.data.manifest import read_manifest
from keras_usm_lite.data.synthetic import (
    ACCENTS,
    UNSUITABLE_VARIANTS,
    VOCABULARY,
    _colored_noise,
    build_synthetic_commands,
    degrade,
    split_voices,
)

SIZES = (30, 10, 12)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    manifests = build_synthetic_commands(str(folder), sizes=SIZES)
    return folder, {split: read_manifest(path) for split, path in manifests.items()}


def _digests(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_vocabulary_has_40_distinct_words():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 40


def test_sizes_are_as_asked(corpus):
    assert tuple(len(utterances) for utterances in corpus[1].values()) == SIZES


def test_texts_are_2_to_6_words_of_the_vocabulary(corpus):
    for utterances in corpus[1].values():
        for utterance in utterances:
            words = utterance.text.split()
            assert 2 <= len(words) <= 6 and set(words) <= set(VOCABULARY)


def test_recordings_are_16_khz_mono_in_range_with_the_stated_duration(corpus):
    for utterances in corpus[1].values():
        for utterance in utterances:
            audio, rate = soundfile.read(utterance.path)
            assert rate == 16000 and audio.ndim == 1
            assert 0.05 < np.abs(audio).max() < 1.0
            assert len(audio) / rate == pytest.approx(utterance.duration)


def test_longer_texts_last_longer(corpus):
    rows = corpus[1]["train"]
    lengths = [len(row.text.split()) for row in rows]
    assert np.corrcoef(lengths, [row.duration for row in rows])[0, 1] > 0.5


def test_no_voice_is_in_two_splits(corpus):
    variants = [{row.speaker.split("+")[1] for row in rows} for rows in corpus[1].values()]
    assert not variants[0] & variants[1] and not variants[0] & variants[2] and not variants[1] & variants[2]


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        build_synthetic_commands(str(folder), sizes=(20, 5, 5), seed=seed)
        time.sleep(1.1 * (folder == folders[0]))  # the clock must not matter
    first, again, other = map(_digests, folders)
    assert first == again
    assert not set(first.values()) & set(other.values())


def test_all_variants_but_the_unsuitable_go_to_exactly_one_split():
    variants = Espeak().list_variants()
    voices = split_voices(variants)
    assigned = [variant for families in voices.values() for family in families for variant in family]
    assert sorted(assigned) == sorted(set(variants) - UNSUITABLE_VARIANTS)
    shares = {split: len(families) / sum(map(len, voices.values())) for split, families in voices.items()}
    assert shares == pytest.approx({"train": 0.70, "dev": 0.12, "test": 0.18}, abs=0.02)


def test_families_stay_together():
    voices = split_voices(["steph", "steph2", "steph3", "Mike", "mike2", "anika", "anikaRobot", "f1", "f2", "ed"])
    families = sorted(" ".join(family) for part in voices.values() for family in part)
    assert families == ["Mike mike2", "anika anikaRobot", "ed", "f1", "f2", "steph steph2 steph3"]


def test_every_accent_exists():
    espeak = Espeak()
    for accent in ACCENTS:
        assert len(espeak.synthesize("yes", voice=accent)) > 1000, accent


def test_degraded_speech_has_the_level_asked_for():
    rng = np.random.default_rng(0)
    speech = np.sin(np.arange(16000) * 0.3).astype(np.float32)
    for _ in range(20):
        peak = 20 * np.log10(np.abs(degrade(speech, rng)).max())
        assert -20.01 <= peak <= -0.99


@pytest.mark.parametrize("snr", [0.0, 20.0])
def test_degraded_speech_has_the_ratio_of_speech_to_noise_asked_for(snr):
    """A pure tone can be fitted and taken away; what remains is the noise."""
    speech = np.sin(np.arange(32000) * 2 * np.pi * 500 / 16000).astype(np.float32)
    ratios = []
    for seed in range(20):
        noisy = degrade(speech, np.random.default_rng(seed), (snr, snr)).astype(np.float64)
        middle = noisy[12000:28000]  # clear of the silent ends and of the onset of the room
        time = np.arange(len(middle)) * 2 * np.pi * 500 / 16000
        basis = np.stack([np.sin(time), np.cos(time)], axis=1)
        tone = basis @ np.linalg.lstsq(basis, middle, rcond=None)[0]
        ratios.append(10 * np.log10(np.mean(tone**2) / np.mean((middle - tone) ** 2)))
    # The ratio is set over the whole signal, including its silent ends and the reverberation.
    assert np.median(ratios) == pytest.approx(snr, abs=1.5)


def test_half_of_the_recordings_have_a_room_and_a_third_a_duller_microphone():
    """A click without noise shows the response of everything else."""
    rooms, dull, tails = 0, 0, []
    click = np.zeros(8000, np.float32)
    click[0] = 1
    for seed in range(300):
        response = degrade(click, np.random.default_rng(seed), (200.0, 200.0)).astype(np.float64)
        start = np.argmax(np.abs(response) > 1e-3 * np.abs(response).max())
        response = response[start:]
        high = np.abs(np.fft.rfft(response, 16000))[7000:].mean() / np.abs(response).max()
        late = np.sqrt(np.mean(response[800:1600] ** 2)) > 1e-6 * np.abs(response).max()
        rooms += late
        dull += high < 0.1
        if late and high > 0.1:
            tails.append(10 * np.log10(np.sum(response[1:] ** 2) / response[0] ** 2))
            assert np.abs(response[6400:]).max() < 1e-6 * response[0]  # over after 0.4 s
    assert rooms / 300 == pytest.approx(1 / 2, abs=0.1) and dull / 300 == pytest.approx(1 / 3, abs=0.1)
    assert -21 < min(tails) < -19 and -7 < max(tails) < -5


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_noise_has_the_spectral_slope_asked_for(exponent):
    noise = _colored_noise(1 << 17, exponent, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(noise)) ** 2
    frequency = np.fft.rfftfreq(len(noise), 1 / 16000)
    low = power[(frequency > 100) & (frequency < 200)].mean()
    high = power[(frequency > 3200) & (frequency < 6400)].mean()
    # Five octaves (100-200 Hz to 3200-6400 Hz): the mean of f^-a over a band scales by 2^(-5a).
    assert low / high == pytest.approx(2 ** (5 * exponent), rel=0.15)
