"""What verify_litert lets a model and its file hear: refused before any work, without padding afterwards."""

import numpy as np
import pytest

from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.manifest import Utterance
from keras_usm_lite.export.verify_data import check_dataset, utterances
from keras_usm_lite.layers.log_mel import LogMel
from keras_usm_lite.tokenizers.word_tokenizer import WordTokenizer

AUDIO, FEATURES = (1, -1), (1, -1, 80)
WORDS = WordTokenizer(["no", "yes"])
BATCH = {"features": np.ones((2, 9, 80), "float32"), "lengths": np.array([9, 5])}, np.array([[1, 2], [2, 0]]), [1, 0]


@pytest.mark.parametrize(
    ("dataset", "tokenizer", "shape", "message"),
    [
        ([Utterance("a.wav", 1.0, "yes", "anna")], None, AUDIO, "give the tokenizer"),
        ([Utterance("a.wav", 1.0, "yes", "anna")], WORDS, FEATURES, "Give batches of features"),
        ([BATCH], WORDS, AUDIO, r"takes audio \[batch, samples\]; the dataset has inputs of shape \(2, 9, 80\)"),
        ([BATCH], WordTokenizer(["no"]), FEATURES, "logits of 3 tokens; the tokenizer has 2"),
        ([(*BATCH[:2], [0, 0])], WORDS, FEATURES, "no utterances"),
        ([], WORDS, FEATURES, "no utterances"),
    ],
)
def test_a_dataset_that_is_not_for_the_file_is_refused(dataset, tokenizer, shape, message):
    with pytest.raises(ValueError, match=message):
        check_dataset(dataset, tokenizer, shape, vocab_size=3)


def test_rows_come_without_padding_and_rows_that_fill_up_do_not_come():
    check_dataset([BATCH], WORDS, FEATURES, vocab_size=3)
    ((heard, said),) = utterances([BATCH], WORDS, frontend=None)
    assert heard.shape == (9, 80) and said == "no yes"


def test_recordings_of_a_manifest_are_read_with_their_texts(tmp_path):
    write_wav(tmp_path / "a.wav", np.zeros(1600))
    dataset = [Utterance(str(tmp_path / "a.wav"), 0.1, "yes", "anna")]
    check_dataset(dataset, WORDS, AUDIO, vocab_size=3)
    ((heard, said),) = utterances(dataset, WORDS, LogMel())
    assert heard.shape == (1600,) and said == "yes"
