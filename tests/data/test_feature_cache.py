"""The cache gives what the extractor gave, is built only when it must be, and never lies."""

import dataclasses
import json
import os
import pickle
import resource
import time
import warnings

import numpy as np
import pytest

from keras_usm_lite.data.audio import AudioError, load_audio, write_wav
from keras_usm_lite.data.feature_cache import FeatureCache
from keras_usm_lite.data.manifest import Utterance


def make_utterances(tmp_path, lengths=(1600, 800, 3200)):
    rng = np.random.default_rng(0)
    utterances = []
    for number, length in enumerate(lengths):
        path = tmp_path / f"{number}.wav"
        write_wav(path, rng.uniform(-1, 1, length))
        utterances.append(Utterance(str(path), length / 16000, "hi", "anna"))
    return utterances


class Extractor:
    """Cuts the audio into frames of 160 samples and counts how often it is called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, audio):
        self.calls += 1
        return audio.reshape(-1, 160) * 2


def build(tmp_path, utterances, key="frames-160", **kwargs):
    """Returns the cache and how many utterances were computed for it."""
    extract = Extractor()
    cache = FeatureCache(utterances, extract, tmp_path / "cache" / "train.bin", key, verbose=0, **kwargs)
    return cache, extract.calls


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_features_are_those_of_the_extractor_rounded_to_the_stored_type(tmp_path, dtype):
    utterances = make_utterances(tmp_path)
    cache, _ = build(tmp_path, utterances, dtype=dtype)
    assert len(cache) == 3
    np.testing.assert_array_equal(cache.num_frames, [10, 5, 20])
    for features, utterance in zip(cache, utterances, strict=True):
        assert features.dtype == np.float32 and type(features) is np.ndarray
        expected = (load_audio(utterance.path).reshape(-1, 160) * 2).astype(dtype)
        np.testing.assert_array_equal(features, expected)
    np.testing.assert_array_equal(cache[-1], cache[2])
    with pytest.raises(IndexError):
        cache[3]


def test_the_data_file_is_the_frames_in_a_row(tmp_path):
    cache, _ = build(tmp_path, make_utterances(tmp_path))
    stored = np.fromfile(tmp_path / "cache" / "train.bin", "<f2").reshape(-1, 160)
    np.testing.assert_array_equal(stored, np.concatenate(list(cache)))
    assert sorted(os.listdir(tmp_path / "cache")) == ["train.bin", "train.bin.json"]


def test_a_second_opening_computes_nothing_and_agrees(tmp_path):
    utterances = make_utterances(tmp_path)
    first, calls = build(tmp_path, utterances)
    second, calls_again = build(tmp_path, utterances)
    assert (calls, calls_again) == (3, 0)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_extractor_is_not_needed_once_the_cache_is_there(tmp_path):
    utterances = make_utterances(tmp_path)
    first, _ = build(tmp_path, utterances)
    for utterance in utterances:
        os.remove(utterance.path)
    second, _ = build(tmp_path, utterances)
    np.testing.assert_array_equal(first[1], second[1])


def test_another_key_type_or_list_builds_anew_without_a_warning(tmp_path):
    utterances = make_utterances(tmp_path)
    build(tmp_path, utterances)
    longer = Utterance(utterances[0].path, 0.2, "hi", "anna")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert build(tmp_path, utterances, key="other")[1] == 3
        assert build(tmp_path, utterances, key="other", dtype="float32")[1] == 3
        assert build(tmp_path, utterances[::-1], key="other", dtype="float32")[1] == 3
        assert build(tmp_path, utterances[:2], key="other", dtype="float32")[1] == 2
        assert build(tmp_path, [longer], key="other", dtype="float32")[1] == 1
        assert build(tmp_path, [longer], key="other", dtype="float32")[1] == 0


def flip_a_bit(folder):
    content = bytearray((folder / "train.bin").read_bytes())
    content[1234] ^= 1
    (folder / "train.bin").write_bytes(content)


def edit_index(folder, **changes):
    index = json.loads((folder / "train.bin.json").read_text())
    (folder / "train.bin.json").write_text(json.dumps(index | changes))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit, "checksum"),
        (lambda folder: os.truncate(folder / "train.bin", 100), "100 bytes"),
        (lambda folder: os.remove(folder / "train.bin"), "No such file"),
        (lambda folder: os.truncate(folder / "train.bin.json", 20), "Unterminated|Expecting"),
        (lambda folder: (folder / "train.bin.json").write_text("[]"), "indices"),
        (lambda folder: edit_index(folder, num_frames=[10, 5, 21]), "asks for"),
        (lambda folder: edit_index(folder, bins=80), "asks for"),
    ],
    ids=["flipped bit", "truncated", "no data", "half index", "odd index", "odd frames", "odd bins"],
)
def test_a_damaged_cache_is_reported_once_and_built_anew(tmp_path, damage, reason):
    utterances = make_utterances(tmp_path)
    sound, _ = build(tmp_path, utterances)
    expected = list(sound)
    damage(tmp_path / "cache")
    with pytest.warns(UserWarning, match=f"train.bin is damaged and will be built anew: .*{reason}") as caught:
        repaired, calls = build(tmp_path, utterances)
    messages = [
        str(warning.message) for warning in caught if "train.bin" in str(warning.message)
    ]  # others may warn too
    assert calls == 3 and len(messages) == 1 and "\n" not in messages[0]
    for one, other in zip(expected, repaired, strict=True):
        np.testing.assert_array_equal(one, other)
    assert build(tmp_path, utterances)[1] == 0


def test_an_interrupted_build_leaves_no_file(tmp_path):
    def interrupted(audio):
        if len(audio) == 800:
            raise KeyboardInterrupt
        return audio.reshape(-1, 160)

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(make_utterances(tmp_path), interrupted, tmp_path / "cache.bin", "k", verbose=0)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("cache")]


def test_what_a_killed_build_left_is_removed_by_the_next_but_not_what_a_running_one_writes(tmp_path):
    (tmp_path / "cache").mkdir()
    for name, age in (
        ("train.bin.0123abcd.tmp", 7200),
        ("train.bin.89ef0123.tmp", 60),
        ("other.bin.0123abcd.tmp", 7200),
    ):
        (tmp_path / "cache" / name).write_bytes(b"part")
        os.utime(tmp_path / "cache" / name, (time.time() - age, time.time() - age))
    build(tmp_path, make_utterances(tmp_path))
    left = sorted(name for name in os.listdir(tmp_path / "cache") if name.endswith(".tmp"))
    assert left == ["other.bin.0123abcd.tmp", "train.bin.89ef0123.tmp"]


def test_a_recording_much_shorter_than_its_manifest_says_is_listed(tmp_path):
    utterances = make_utterances(tmp_path, lengths=(16000, 160000))
    for said, broken in ((1.3, None), (1.6, 0), (1600.0, 0)):
        cache, _ = build(tmp_path, [dataclasses.replace(utterances[0], duration=said), utterances[1]])
        assert list(cache.problems) == ([] if broken is None else [broken])
    assert cache.problems[0] == "it has 1.00 s, its duration_s is 1600; copy it anew, or correct the manifest."


def test_a_full_disk_is_reported_and_leaves_no_file(tmp_path):
    utterances = make_utterances(tmp_path, lengths=[160 * 200] * 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the system refuses to let a file grow on
    try:
        with pytest.raises(OSError, match="Could not build the feature cache .*free space.*train.bin"):
            build(tmp_path, utterances)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(OSError, match="Could not build the feature cache .*choose a writable folder"):
        build(tmp_path, make_utterances(tmp_path))


@pytest.mark.parametrize("shape", [(10,), (2, 5, 16), (0, 160), (10, 0)])
def test_features_of_a_wrong_shape_are_refused_with_the_path(tmp_path, shape):
    utterances = make_utterances(tmp_path)
    with pytest.raises(ValueError, match=r"0\.wav: extract gave features of shape .*frames >= 1, bins >= 1"):
        FeatureCache(utterances, lambda audio: np.zeros(shape), tmp_path / "cache.bin", "k", verbose=0)


def test_the_number_of_bins_must_not_change(tmp_path):
    utterances = make_utterances(tmp_path)
    with pytest.raises(ValueError, match=r"1\.wav: .*\(10, 80\); allowed is \[frames >= 1, 160\]"):
        FeatureCache(utterances, lambda a: a.reshape(10, -1), tmp_path / "cache.bin", "k", verbose=0)


def test_features_too_large_for_float16_are_refused_and_fit_float32(tmp_path):
    utterances = make_utterances(tmp_path)
    arguments = (utterances, lambda audio: np.full((3, 4), 1e5), tmp_path / "cache.bin", "k")
    with pytest.raises(ValueError, match='not finite as float16.*100000.*dtype="float32"'):
        FeatureCache(*arguments, verbose=0)
    assert FeatureCache(*arguments, dtype="float32", verbose=0)[0].max() == 1e5


def test_a_broken_recording_has_no_frames_and_is_listed_with_the_reason_also_when_read_back(tmp_path):
    utterances = make_utterances(tmp_path)
    (tmp_path / "1.wav").write_bytes(b"junk")
    for expected_calls in (2, 0):
        cache, calls = build(tmp_path, utterances)
        assert calls == expected_calls and cache.num_frames.tolist() == [10, 0, 20]
        assert list(cache.problems) == [1] and cache.problems[1].startswith("cannot be decoded")


def test_a_recording_that_the_extractor_refuses_is_listed_with_its_reason(tmp_path):
    def extract(audio):
        if len(audio) == 800:
            raise AudioError("too short")
        return audio.reshape(-1, 160)

    cache = FeatureCache(make_utterances(tmp_path), extract, tmp_path / "cache.bin", "k", verbose=0)
    assert cache.problems == {1: "too short"}


def test_a_repaired_recording_is_taken_up_at_the_next_opening(tmp_path):
    utterances = make_utterances(tmp_path)
    sound = (tmp_path / "1.wav").read_bytes()
    (tmp_path / "1.wav").write_bytes(b"junk")
    build(tmp_path, utterances)
    (tmp_path / "1.wav").write_bytes(sound)
    cache, _ = build(tmp_path, utterances)
    assert cache.num_frames.tolist() == [10, 5, 20] and cache.problems == {}
    assert build(tmp_path, utterances)[1] == 0


def test_nothing_but_broken_recordings_make_an_empty_cache(tmp_path):
    utterances = make_utterances(tmp_path, lengths=(1600,))
    (tmp_path / "0.wav").write_bytes(b"junk")
    cache, _ = build(tmp_path, utterances)
    assert len(cache) == 1 and len(cache[0]) == 0 and list(cache.problems) == [0]


def test_a_selection_has_the_features_and_problems_of_its_utterances(tmp_path):
    utterances = make_utterances(tmp_path)
    (tmp_path / "1.wav").write_bytes(b"junk")
    cache, _ = build(tmp_path, utterances)
    chosen = cache.select([2, 1])
    assert chosen.num_frames.tolist() == [20, 0] and list(chosen.problems) == [1]
    np.testing.assert_array_equal(chosen[0], cache[2])


def test_the_extractor_gets_audio_at_the_sample_rate_asked_for_and_another_rate_builds_anew(tmp_path):
    utterances = make_utterances(tmp_path)
    assert build(tmp_path, utterances)[0].num_frames.tolist() == [10, 5, 20]
    cache, calls = build(tmp_path, utterances, sample_rate=32000)
    assert calls == 3 and cache.num_frames.tolist() == [20, 10, 40]


@pytest.mark.parametrize(("utterances", "dtype"), [([], "float16"), (["x"], "int8")])
def test_no_utterances_and_unknown_types_are_refused(tmp_path, utterances, dtype):
    with pytest.raises(ValueError, match="no utterances|allowed are"):
        FeatureCache(utterances, Extractor(), tmp_path / "cache.bin", "k", dtype=dtype)


def test_building_shows_a_progress_bar_only_if_asked_to(tmp_path, capsys):
    utterances = make_utterances(tmp_path)
    build(tmp_path, utterances)
    assert capsys.readouterr().out == ""
    FeatureCache(utterances, Extractor(), tmp_path / "shown.bin", "k", verbose=1)
    assert "3/3" in capsys.readouterr().out


def test_a_cache_can_be_sent_to_another_process(tmp_path):
    cache, _ = build(tmp_path, make_utterances(tmp_path))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cache))[1], cache[1])


def test_a_recording_that_was_written_anew_is_heard_anew(tmp_path):
    utterances = make_utterances(tmp_path)
    old, _ = build(tmp_path, utterances)
    write_wav(utterances[1].path, np.full(800, 0.25))  # as long as before
    os.utime(utterances[1].path, ns=(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new, calls = build(tmp_path, utterances)
    assert calls == 3 and not np.array_equal(new[1], old[1])
    np.testing.assert_allclose(new[1], 0.5, atol=1e-3)
