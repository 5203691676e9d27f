"""LiteRTRecognizer: audio of any length through an exported file."""

import keras
import numpy as np
import pytest

import keras_usm_lite as usm

if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs the TensorFlow backend", allow_module_level=True)

TOKENIZER = usm.WordTokenizer(list("abcdefgh"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    keras.utils.set_random_seed(0)
    model = usm.USMForCTC(9, num_layers=1, dim=32, subsampling_channels=4)
    path = str(tmp_path_factory.mktemp("litert") / "model.tflite")
    usm.export_litert(model, path, sample_rate_input=16000)
    return model, path


def test_text_equals_the_keras_model_for_audio_of_different_lengths(exported):
    model, path = exported
    recognizer = usm.LiteRTRecognizer(path, TOKENIZER)
    rng = np.random.default_rng(0)
    for samples in (8000, 20000, 8000):
        audio = 0.1 * rng.normal(size=samples).astype("float32")
        logits = keras.ops.convert_to_numpy(model(usm.LogMel()(audio[None])))
        np.testing.assert_allclose(recognizer.logits(audio), logits, atol=2e-3)
        text, seconds = recognizer.transcribe(audio)
        assert text == TOKENIZER.decode(usm.greedy_decode(logits)[0])
        assert 0 < seconds < 10


def test_what_is_no_utterance_is_refused_and_the_next_one_is_heard(exported):
    _, path = exported
    recognizer = usm.LiteRTRecognizer(path, TOKENIZER)
    audio = 0.1 * np.random.default_rng(0).normal(size=8000).astype("float32")
    before = recognizer.logits(audio)
    with pytest.raises(ValueError, match=r"takes samples \[n\], one channel; got an array of shape \(8000, 2\)"):
        recognizer.logits(np.zeros((8000, 2)))
    for samples in (0, 100):
        with pytest.raises(ValueError, match=rf"cannot run on an array of shape \({samples},\).*must fill one frame"):
            recognizer.logits(np.zeros(samples))
    np.testing.assert_array_equal(recognizer.logits(audio), before)
