"""SpeechTask: from three manifests to batches and transcriptions."""

import dataclasses
import os
import warnings

import keras
import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.manifest import ManifestError, Utterance, write_manifest

TEXTS = {"train": ["up down", "left", "down left up", "up"], "dev": ["down up"], "test": ["left sideways", "up"]}


def make_corpus(folder):
    rng = np.random.default_rng(0)
    for split, texts in TEXTS.items():
        rows = []
        for number, text in enumerate(texts):
            path = str(folder / f"{split}-{number}.wav")
            samples = 16000 + 2000 * number
            write_wav(path, 0.1 * rng.normal(size=samples).astype("float32"))
            rows.append(Utterance(path, samples / 16000, text, f"speaker of {split}"))
        write_manifest(folder / f"{split}.tsv", rows)
    return usm.data.open_corpus(str(folder))


def prepare(corpus, folder, **options):
    return usm.data.SpeechTask.prepare(corpus, batch_frames=400, cache_dir=str(folder / "cache"), **options)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return prepare(make_corpus(folder), folder)


@pytest.fixture
def broken(tmp_path):
    """A corpus with six broken rows, and `{split: {file: part of the reason}}`."""
    corpus = make_corpus(tmp_path)
    write_wav(tmp_path / "train-0.wav", np.zeros(511))  # a frame takes 512
    write_wav(tmp_path / "train-2.wav", np.zeros(512 + 160))  # two frames, one output frame, three words
    header = (tmp_path / "train-2.wav").read_bytes()[:40]
    (tmp_path / "train-1.wav").write_bytes(header + bytes(4))  # of no samples
    rows = usm.data.read_manifest(corpus.splits["train"])
    for number, samples in ((0, 511), (2, 672)):
        rows[number] = dataclasses.replace(rows[number], duration=samples / 16000)
    rows += [Utterance(str(tmp_path / "gone.wav"), 1.0, "up", "x"), Utterance(rows[3].path, 1.0, " ", "x")]
    write_manifest(corpus.splits["train"], rows)
    (tmp_path / "test-1.wav").write_bytes(b"not audio")
    return corpus, {
        "train": {
            "gone.wav": "the file is missing",
            "train-3.wav": "the text is empty",
            "train-0.wav": "511 samples are too short",
            "train-1.wav": "holds no samples",
            "train-2.wav": "CTC needs 3 output frames for the text, the recording gives 1",
        },
        "dev": {},
        "test": {"test-1.wav": "cannot be decoded"},
    }


def test_broken_rows_are_left_out_and_each_is_kept_with_path_and_reason(broken, tmp_path):
    corpus, expected = broken
    for _ in range(2):  # with a new cache and with the one that the first time made
        with pytest.warns(UserWarning, match="Left out: 6 of 9 utterances cannot be used(?s:.*)and 1 more"):
            task = prepare(corpus, tmp_path)
        assert {split: len(rows) for split, rows in task.utterances.items()} == {"train": 1, "dev": 1, "test": 1}
        for split, reasons in expected.items():
            found = {row.path: row.reason for row in task.problems[split]}
            assert list(found) == [str(tmp_path / name) for name in reasons]
            assert all(part in found[str(tmp_path / name)] for name, part in reasons.items())
    x, labels, weight = task.batches["train"][0]
    assert [task.tokenizer.decode(row) for row in labels[weight > 0]] == ["up"]
    assert x["lengths"].max() == usm.LogMel().num_frames(16000 + 2000 * 3)


def test_broken_rows_are_fatal_if_so_chosen_the_cheap_checks_first(broken, tmp_path):
    corpus, _ = broken
    with pytest.raises(ManifestError, match=r"2 of 9 utterances cannot be used:\n  .*gone\.wav: the file is missing"):
        prepare(corpus, tmp_path, on_bad="raise")
    assert not (tmp_path / "cache").exists()
    write_manifest(corpus.splits["train"], usm.data.read_manifest(corpus.splits["train"])[:4])
    with pytest.raises(ManifestError, match=r"4 of 7 utterances cannot be used:\n  .*train-0\.wav: 511 samples"):
        prepare(corpus, tmp_path, on_bad="raise")


def test_a_repaired_recording_takes_part_again(broken, tmp_path):
    corpus, _ = broken
    with pytest.warns(UserWarning, match="Left out"):
        prepare(corpus, tmp_path)
    write_wav(tmp_path / "train-1.wav", np.ones(16000) / 2)
    with pytest.warns(UserWarning, match="Left out: 5 of 9"):
        assert [row.text for row in prepare(corpus, tmp_path).utterances["train"]] == ["left", "up"]


def test_a_model_that_subsamples_less_gives_short_recordings_more_output_frames(tmp_path):
    corpus = make_corpus(tmp_path)
    write_wav(tmp_path / "train-2.wav", np.zeros(512 + 2 * 160))  # three frames, three words
    rows = usm.data.read_manifest(corpus.splits["train"])
    rows[2] = dataclasses.replace(rows[2], duration=832 / 16000)
    write_manifest(corpus.splits["train"], rows)
    assert not prepare(corpus, tmp_path, subsampling=1).problems["train"]
    with pytest.warns(UserWarning, match="the recording gives 2"):
        assert len(prepare(corpus, tmp_path, subsampling=2).problems["train"]) == 1
    fast = Utterance(rows[0].path, 1.0, "up down left " * 20, "x")  # 60 words in 97 frames
    write_manifest(corpus.splits["train"], [*rows, fast])
    assert not prepare(corpus, tmp_path, subsampling=1).problems["train"]
    with pytest.raises(ValueError, match="subsampling=0: allowed"):
        prepare(corpus, tmp_path, subsampling=0)


def test_a_split_of_which_nothing_is_left_is_refused(tmp_path):
    corpus = make_corpus(tmp_path)
    (tmp_path / "dev-0.wav").write_bytes(b"not audio")
    with pytest.raises(ManifestError, match=r"dev\.tsv: none of its utterances(?s:.*)dev-0\.wav: cannot be decoded"):
        prepare(corpus, tmp_path)


def test_an_unknown_choice_for_broken_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="on_bad is 'drop'"):
        prepare(make_corpus(tmp_path), tmp_path, on_bad="drop")


def test_a_sound_corpus_is_prepared_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not any(prepare(make_corpus(tmp_path), tmp_path).problems.values())


def test_audio_is_resampled_for_a_front_end_of_another_rate_and_no_cache_of_another_front_end_is_read(tmp_path):
    corpus = make_corpus(tmp_path)
    for frontend in (
        usm.LogMel(40),
        usm.LogMel(40, sample_rate=8000, max_frequency=3800.0),
        usm.LogMel(40, max_frequency=3800.0),
    ):
        task = prepare(corpus, tmp_path, frontend=frontend)
        x, _, _ = task.batches["dev"][0]
        expected = np.asarray(frontend(task.audio(task.utterances["dev"][0])[None]))[0]
        assert x["lengths"][0] == len(expected) == 97  # of one second
        np.testing.assert_allclose(x["features"][0, :97], expected, atol=5e-3)


def test_runs_with_other_front_ends_leave_each_others_cache_alone(tmp_path):
    corpus = make_corpus(tmp_path)
    first = prepare(corpus, tmp_path, frontend=usm.LogMel(40))
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(tmp_path / "cache")}
    prepare(corpus, tmp_path, frontend=usm.LogMel(24))
    prepare(corpus, tmp_path, frontend=usm.LogMel(40))
    after = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(tmp_path / "cache")}
    assert len(after) == 2 * len(before) and before.items() <= after.items()
    assert first.batches["train"][0][0]["features"].shape[-1] == 40


def test_a_recording_that_was_cut_off_is_left_out(tmp_path):
    corpus = make_corpus(tmp_path)
    content = (tmp_path / "train-2.wav").read_bytes()
    (tmp_path / "train-2.wav").write_bytes(content[: len(content) // 3])
    with pytest.warns(UserWarning, match=r"train-2.wav: it has 0.4\d s, its duration_s is 1.25; copy it anew"):
        task = prepare(corpus, tmp_path)
    assert len(task.utterances["train"]) == 3


def test_recordings_of_the_training_split_in_another_split_are_warned_of(tmp_path):
    corpus = make_corpus(tmp_path)
    rows = {split: usm.data.read_manifest(path) for split, path in corpus.splits.items()}
    write_manifest(corpus.splits["test"], rows["test"] + rows["train"][:1])
    with pytest.warns(UserWarning, match="1 recordings of test are in train too, the first is .*train-0.wav"):
        prepare(corpus, tmp_path)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only JAX compiles for every length")
def test_on_jax_features_are_computed_at_whole_seconds(tmp_path):
    seen = set()

    class Watched(usm.LogMel):
        def call(self, inputs, lengths=None):
            seen.add(inputs.shape[1])
            return super().call(inputs, lengths=lengths)

    task = prepare(make_corpus(tmp_path), tmp_path, frontend=Watched())
    assert seen == {16000, 32000}
    x, _, weight = task.batches["train"][0]
    for row, index in enumerate(task.batches["train"].batch_indices(0)):
        expected = np.asarray(usm.LogMel()(task.audio(task.utterances["train"][index])[None]))[0]
        assert x["lengths"][row] == len(expected)
        np.testing.assert_allclose(x["features"][row, : len(expected)], expected, atol=5e-3)


def test_tokens_come_from_the_training_texts_only(task):
    assert isinstance(task.tokenizer, usm.WordTokenizer)
    assert task.tokenizer.vocab_size == 4  # blank, down, left, up


def test_features_are_those_of_the_front_end(task):
    x, _, weight = task.batches["dev"][0]
    audio = task.audio(task.utterances["dev"][0])
    expected = np.asarray(usm.LogMel()(audio[None]))[0]
    length = int(x["lengths"][0])
    assert weight[0] == 1 and length == len(expected)
    np.testing.assert_allclose(x["features"][0, :length], expected, atol=5e-3)  # cached in float16


def test_a_test_text_that_cannot_be_spelled_stays_in_the_reference(task):
    vocabulary = task.tokenizer.vocab_size
    up = task.tokenizer.encode("up")[0]

    def always_up(x):
        logits = np.zeros((*x["features"].shape[:2], vocabulary), "float32")
        logits[:, 0, up] = 1.0
        logits[:, 1:, 0] = 1.0
        return logits

    references, hypotheses = task.transcribe(always_up, "test")
    assert references == TEXTS["test"]
    assert hypotheses == ["up", "up"]
    assert usm.error_rates(references, hypotheses).words == 3


def test_only_training_batches_are_shuffled(task):
    def orders(split):
        plans = [task.batches[split].plan(epoch) for epoch in range(6)]
        return {tuple(int(i) for _, indices in plan for i in indices) for plan in plans}

    assert len(orders("train")) > 1
    assert len(orders("test")) == 1


def test_labelled_batches_hold_the_texts_of_their_rows_and_nothing_for_rows_that_fill_up(task):
    ((x, labels, weight),) = task.labelled("dev")
    assert len(labels) == len(weight) == len(x["lengths"])
    assert [task.tokenizer.decode(row) for row in labels[weight > 0]] == TEXTS["dev"]
    assert not labels[weight == 0].any()


def test_every_text_is_that_of_the_recording_it_stands_for(tmp_path):
    corpus = make_corpus(tmp_path)
    rows = usm.data.read_manifest(corpus.splits["train"])
    rows = [rows[number] for number in (2, 0, 3, 1, 3, 0, 2, 1)]
    write_manifest(corpus.splits["dev"], rows)
    task = prepare(corpus, tmp_path)
    texts = {task.frontend.num_frames(round(16000 * row.duration)): row.text for row in rows}
    assert len(texts) == len(task.batches["dev"].bucket_shapes) == 4

    def listener(x):
        """Knows every recording by its length."""
        logits = np.zeros((*x["features"].shape[:2], task.tokenizer.vocab_size), "float32")
        for row, length in zip(logits, x["lengths"].tolist(), strict=True):
            labels = task.tokenizer.encode(texts[length]) if length else []
            row[np.arange(len(labels)), labels] = 1.0
            row[len(labels) :, 0] = 1.0
        return logits

    references, hypotheses = task.transcribe(listener, "dev")
    assert references == hypotheses == [row.text for row in rows]
    heard = 0
    for x, labels, weight in task.labelled("dev"):
        for length, row in zip(x["lengths"][weight > 0].tolist(), labels[weight > 0], strict=True):
            assert task.tokenizer.decode(row) == texts[length]
            heard += 1
    assert heard == len(rows)


def test_a_text_that_cannot_be_spelled_has_no_labels(task):
    with pytest.raises(ValueError, match="sideways"):
        task.labelled("test")


def test_a_calibration_batch_takes_the_recordings_nearest_to_its_length_cut_or_padded(task):
    batch = task.calibration_batch(recordings=2, frames=115)  # of 1, 1.125, 1.25 and 1.375 seconds
    short, long = (np.asarray(task.frontend(task.audio(row)[None]))[0] for row in task.utterances["train"][1:3])
    assert len(short) < 115 < len(long) and batch["lengths"].tolist() == [len(short), 115]
    np.testing.assert_array_equal(batch["features"][0, : len(short)], short)
    np.testing.assert_array_equal(batch["features"][0, len(short) :], 0)
    np.testing.assert_array_equal(batch["features"][1], long[:115])
    with pytest.raises(ValueError, match="at least 1"):
        task.calibration_batch(recordings=0)


def test_texts_that_are_not_normal_are_taken_as_they_stand_and_counted_in_a_warning(tmp_path):
    corpus = make_corpus(tmp_path)
    rows = usm.data.read_manifest(corpus.splits["test"])
    write_manifest(corpus.splits["test"], [Utterance(rows[0].path, rows[0].duration, "Up, down", "x"), rows[1]])
    with pytest.warns(UserWarning, match=r"1 of 7 texts are not in the form .*'Up, down' \('up down' in that form\)"):
        assert prepare(corpus, tmp_path).utterances["test"][0].text == "Up, down"


def test_a_part_of_a_split_is_transcribed_with_its_own_references(tmp_path):
    corpus = make_corpus(tmp_path)
    rows = usm.data.read_manifest(corpus.splits["train"])
    write_manifest(corpus.splits["dev"], rows * 2)
    halves = [prepare(corpus, tmp_path, shard=(index, 2)) for index in range(2)]
    heard = [half.transcribe(lambda x: np.eye(4)[np.ones(x["features"].shape[:2], int)], "dev") for half in halves]
    assert sorted(heard[0][0] + heard[1][0]) == sorted(TEXTS["train"] * 2)
    assert all(usm.error_rates(*part).utterances == len(part[1]) for part in heard)


def test_corpora_of_one_name_have_caches_of_their_own(tmp_path):
    for number in range(2):
        (tmp_path / str(number) / "speech").mkdir(parents=True)
        prepare(make_corpus(tmp_path / str(number) / "speech"), tmp_path)
    assert len(list((tmp_path / "cache").glob("speech-*-train-*.json"))) == 2


def test_every_split_for_testing_is_whole_and_its_texts_are_not_checked(tmp_path):
    corpus = make_corpus(tmp_path)
    corpus = dataclasses.replace(corpus, splits=corpus.splits | {"test-other": corpus.splits["test"]})
    task = prepare(corpus, tmp_path, shard=(1, 2), batch_multiple=2)
    assert [row.text for row in task.utterances["test-other"]] == TEXTS["test"]
    heard = {split: task.transcribe(lambda x: np.zeros((len(x["features"]), 9, 5)), split)[0] for split in task.batches}
    assert heard["test-other"] == heard["test"] == TEXTS["test"] and len(heard["train"]) < len(TEXTS["train"])
