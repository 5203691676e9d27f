"""SpeechTask: from three manifests to batches and transcriptions."""

import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.manifest import Utterance, write_manifest

TEXTS = {"train": ["up down", "left", "down left up", "up"], "dev": ["down up"], "test": ["left sideways", "up"]}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for split, texts in TEXTS.items():
        rows = []
        for number, text in enumerate(texts):
            path = str(folder / f"{split}-{number}.wav")
            samples = 16000 + 2000 * number
            write_wav(path, 0.1 * rng.normal(size=samples).astype("float32"))
            rows.append(Utterance(path, samples / 16000, text, f"speaker of {split}"))
        write_manifest(folder / f"{split}.tsv", rows)
    corpus = usm.data.open_corpus(str(folder))
    return usm.data.SpeechTask.prepare(corpus, batch_frames=400, cache_dir=str(folder / "cache"))


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


def test_a_text_that_cannot_be_spelled_has_no_labels(task):
    with pytest.raises(ValueError, match="sideways"):
        task.labelled("test")
