"""Transcribing a dataset: order, fill rows, decoders."""

import numpy as np

from keras_usm_lite.data.speech_batches import SpeechBatches
from keras_usm_lite.decoding import beam_decode
from keras_usm_lite.tokenizers.char_tokenizer import CharTokenizer
from keras_usm_lite.transcribe import transcribe_dataset


class Utterances(list):
    """Feature arrays in memory; the features are the logits."""

    @property
    def num_frames(self):
        return np.array([len(utterance) for utterance in self])


def spoken(text):
    """Logits that say the text, one frame a character, with a blank after each."""
    ids = [i for character in text for i in (1 + "abc".index(character), 0)]
    return 9 * np.eye(4, dtype="float32")[ids]


def test_every_utterance_of_speech_batches_comes_back_once_without_the_fill_rows():
    texts = ["ab", "cabcab", "b", "aab", "ccc", "abcabcabc", "a"]
    tokenizer = CharTokenizer("abc")
    batches = SpeechBatches(
        Utterances(map(spoken, texts)), list(map(tokenizer.encode, texts)), batch_frames=32, num_buckets=2
    )
    assert sum(size for size, _ in batches.bucket_shapes) < len(batches) * 4  # some batches have fill rows
    references, hypotheses = transcribe_dataset(lambda x: x["features"], batches, tokenizer)
    assert sorted(references) == sorted(texts)
    assert hypotheses == references


def test_rows_without_weight_are_skipped_wherever_they_are():
    logits = np.stack([spoken("ab"), spoken("bc"), spoken("ca")])
    batch = logits, np.array([[1, 2], [2, 3], [1, 1]]), np.array([0.0, 1.0, 0.5])
    assert transcribe_dataset(lambda x: x, [batch], CharTokenizer("abc")) == (["bc", "aa"], ["bc", "ca"])


def test_a_beam_search_can_take_the_place_of_the_greedy_decoder():
    batch = np.log(np.array([[[0.6, 0.4], [0.6, 0.4]]])), np.array([[1]]), np.ones(1)
    assert transcribe_dataset(lambda x: x, [batch], CharTokenizer("a"))[1] == [""]

    def decode(logits):
        return [paths[0][0] for paths in beam_decode(logits)]

    assert transcribe_dataset(lambda x: x, [batch], CharTokenizer("a"), decode)[1] == ["a"]
