"""Claims about the connected Arabic commands, on a tiny data set in which every clip is a tone of its own."""

import csv
import itertools
import os
import shutil
from collections import Counter

import hypothesis
import numpy as np
import pytest
import soundfile
from hypothesis import strategies as st

from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.corpora.arabic_commands import (
    build_arabic_commands,
    draw_group_sizes,
    join,
    read_table,
    trim,
)
from keras_usm_lite.data.manifest import read_manifest

SPEAKERS = {"train": ["00000001", "00000004"], "val": ["00000002"], "test": ["00000003"]}
WORDS = ("zoom in", "stop", "nine")


def _tone(frequency, seconds=0.2):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(16000 * seconds)) / 16000)


def _make_dataset(root):
    """Writes the data set and returns the frequency of each clip, by speaker, word and take."""
    frequencies = {}
    steps = itertools.count(300, 100)
    for table, speakers in SPEAKERS.items():
        rows = []
        for speaker, word, take in itertools.product(speakers, WORDS, range(1, 5)):
            name = f"{word}/{speaker}_NO_{take:02d}.wav"
            frequencies[speaker, word, take] = next(steps)
            clip = np.zeros(16000)
            clip[6000:9200] = _tone(frequencies[speaker, word, take])
            (root / "dataset" / word).mkdir(parents=True, exist_ok=True)
            write_wav(root / "dataset" / name, clip)
            rows.append((f"dataset/{name}", word))
        with open(root / f"{table}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file", "class"), *rows])
    return frequencies


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("arabic-speech-commands-dataset")
    return root, _make_dataset(root)


@pytest.fixture(scope="module")
def built(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    manifests = build_arabic_commands(str(dataset[0]), str(folder))
    return folder, {split: read_manifest(path) for split, path in manifests.items()}


def _tones(path, frequencies):
    """Returns the frequencies that sound in a recording."""
    audio, rate = soundfile.read(path)
    spectrum = np.abs(np.fft.rfft(audio, 160000)) / (0.5 * 0.1 * rate)
    return [f for f in frequencies if spectrum[f * 10] > 0.5]


def test_every_clip_is_used_exactly_once_and_with_its_speaker(dataset, built):
    frequencies = dataset[1]
    for table, split in (("train", "train"), ("val", "dev"), ("test", "test")):
        heard = [
            (row.speaker, frequency) for row in built[1][split] for frequency in _tones(row.path, frequencies.values())
        ]
        expected = [(key[0], f) for key, f in frequencies.items() if key[0] in SPEAKERS[table]]
        assert sorted(heard) == sorted(expected)


def test_texts_name_the_words_that_sound(dataset, built):
    word_of = {frequency: word.replace(" ", "_") for (_, word, _), frequency in dataset[1].items()}
    for rows in built[1].values():
        for row in rows:
            assert Counter(row.text.split()) == Counter(word_of[f] for f in _tones(row.path, word_of))
            assert 2 <= len(row.text.split()) <= 6


def test_words_sound_in_the_order_of_the_text(dataset, built):
    word_of = {frequency: word.replace(" ", "_") for (_, word, _), frequency in dataset[1].items()}
    row = max(built[1]["train"], key=lambda row: len(row.text.split()))
    audio, _ = soundfile.read(row.path)

    def onset(frequency):
        template = _tone(frequency)
        return np.argmax(np.abs(np.correlate(audio, template)))

    tones = sorted(_tones(row.path, word_of), key=onset)
    assert [word_of[f] for f in tones] == row.text.split()


def test_recordings_are_16_khz_mono_with_the_stated_duration(built):
    for rows in built[1].values():
        for row in rows:
            audio, rate = soundfile.read(row.path)
            assert rate == 16000 and audio.ndim == 1 and np.abs(audio).max() <= 1
            assert len(audio) / rate == pytest.approx(row.duration)
            # After trimming, 0.2 s of tone and 50 ms at both ends are left, in frames of 10 ms.
            count = len(row.text.split())
            assert 0.29 * count + 0.16 <= row.duration <= 0.32 * count + 0.12 * (count - 1) + 0.4


def test_gaps_are_noise_at_minus_80_dbfs():
    joined = join([np.full(1600, 0.5, np.float32)] * 6, np.random.default_rng(0))
    gaps = joined[joined != 0.5]
    level = 20 * np.log10(np.sqrt(np.mean(gaps.astype(np.float64) ** 2)))
    assert level == pytest.approx(-80, abs=1)


def test_trimming_keeps_50_ms_around_the_word_and_fades_5_ms():
    audio = np.zeros(16000, np.float32)
    audio[4800:8000] = 0.5
    audio[2000] = 1e-3  # faint sounds are no word
    trimmed = trim(audio)
    assert len(trimmed) == 3200 + 2 * 800
    np.testing.assert_array_equal(trimmed[800:4000], 0.5)


def test_a_word_that_fills_the_clip_is_only_faded():
    trimmed = trim(np.full(16000, 0.5, np.float32))
    assert len(trimmed) == 16000
    np.testing.assert_allclose(trimmed[:80], 0.5 * np.arange(80) / 79, atol=1e-7)
    np.testing.assert_allclose(trimmed[-80:], 0.5 * np.arange(80)[::-1] / 79, atol=1e-7)
    np.testing.assert_array_equal(trimmed[80:-80], 0.5)


@pytest.mark.parametrize("length", [1, 50, 159, 161, 1000])
def test_short_and_silent_clips_survive_trimming(length):
    assert 1 <= len(trim(np.zeros(length, np.float32))) <= length


@hypothesis.given(st.integers(2, 500), st.integers(0, 1000))
def test_groups_have_2_to_6_clips_and_use_all(total, seed):
    sizes = draw_group_sizes(total, np.random.default_rng(seed))
    assert sum(sizes) == total and min(sizes) >= 2 and max(sizes) <= 6


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another(dataset, built, tmp_path):
    def texts(folder, seed):
        folder.mkdir()
        manifests = build_arabic_commands(str(dataset[0]), str(folder), seed=seed)
        return [row.text for row in read_manifest(manifests["train"])]

    again = texts(tmp_path / "again", 0)
    assert again == [row.text for row in built[1]["train"]] != texts(tmp_path / "other", 1)
    for row in built[1]["test"]:
        with (
            open(row.path, "rb") as a,
            open(row.path.replace(str(built[0]), str(tmp_path / "again")), "rb") as b,
        ):
            assert a.read() == b.read()


def test_an_archive_gives_the_same_as_the_folder_and_is_not_left_unpacked(dataset, built, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "dataset"), "zip", dataset[0].parent, dataset[0].name)
    folder = tmp_path / "out"
    folder.mkdir()
    manifests = build_arabic_commands(archive, str(folder))
    assert [r.text for r in read_manifest(manifests["dev"])] == [r.text for r in built[1]["dev"]]
    assert sorted(os.listdir(folder)) == ["audio", "dev.tsv", "test.tsv", "train.tsv"]


@pytest.mark.parametrize(
    "rows",
    [
        ["file,class", "dataset/stop/00000002_NO_01.wav,stop"],
        ["dataset/stop/00000002_NO_01.wav,stop"],
        ["class,path", "stop,dataset/stop/00000002_NO_01.wav"],
        [",file,class", "0,./dataset/stop/00000002_NO_01.wav,stop", ""],
        ["file", "dataset\\stop\\00000002_NO_01.wav"],
        ["file,class", "/somewhere/else/stop/00000002_NO_01.wav,stop"],
        ["file,class", "00000002_NO_01.wav,stop"],
    ],
    ids=["usual", "no header", "swapped", "row numbers", "backslashes", "absolute", "bare name"],
)
def test_tables_are_read_in_many_forms(dataset, rows):
    root = dataset[0]
    table = root / "odd.csv"
    table.write_text("\n".join(rows))
    wavs = {}
    for path in root.rglob("*.wav"):
        wavs.setdefault(path.name, []).append(path)
    assert read_table(table, wavs) == [(root / "dataset/stop/00000002_NO_01.wav", "stop")]


def test_a_table_with_a_missing_clip_is_refused(tmp_path):
    _make_dataset(tmp_path)
    (tmp_path / "dataset/stop/00000002_NO_01.wav").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"val\.csv: 0 files match.*stop/00000002_NO_01\.wav"):
        build_arabic_commands(str(tmp_path), str(tmp_path / "out"))


def test_an_empty_table_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("file,class\n")
    with pytest.raises(ValueError, match="names no WAV files"):
        read_table(tmp_path / "train.csv", {})


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no train\.csv anywhere"):
        build_arabic_commands(str(tmp_path), str(tmp_path))
