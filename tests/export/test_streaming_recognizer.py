"""StreamingRecognizer: the text does not depend on how the recording was cut into pieces."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.export.streaming import export_litert_streaming
from keras_usm_lite.export.streaming_recognizer import StreamingRecognizer

if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs the TensorFlow backend", allow_module_level=True)

TOKENIZER = usm.CharTokenizer("abcdefgh")
STEP = 3200


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model that babbles, and its streaming file."""
    keras.utils.set_random_seed(0)
    size = {"num_layers": 1, "dim": 32, "num_heads": 2, "kernel_size": 5, "subsampling_channels": 4, "num_mel_bins": 16}
    model = usm.USMForCTC(9, chunk_size=5, causal_conv=True, **size)
    draw = np.random.default_rng(0)
    for weight in model.trainable_variables:
        weight.assign(ops.convert_to_numpy(weight) + 0.3 * draw.normal(size=weight.shape))
    frontend = usm.LogMel(16, normalization="running")
    path = export_litert_streaming(model, tmp_path_factory.mktemp("streaming") / "model.tflite", frontend)
    return path, lambda audio: TOKENIZER.decode(usm.greedy_decode(model(frontend(audio[None])))[0])


@pytest.fixture
def recognizer(exported):
    return StreamingRecognizer(exported[0], TOKENIZER)


def noise(samples, seed=1):
    return 0.1 * np.random.default_rng(seed).normal(size=samples).astype("float32")


@pytest.mark.parametrize("pieces", [[16000], [1] * 100 + [15900], [STEP] * 5, [5000, 0, 11000]])
def test_the_text_is_that_of_the_whole_recording_however_it_was_cut(exported, recognizer, pieces):
    audio = noise(16000)
    expected = exported[1](audio)
    assert len(expected) > 5
    for piece in np.split(audio, np.cumsum(pieces)[:-1]):
        recognizer.feed(piece)
    assert recognizer.finish() == expected


def test_a_last_part_of_a_step_is_heard_in_the_end(exported, recognizer):
    audio = noise(2 * STEP + 3000)
    audio[2 * STEP :] *= 5  # sounds unlike the rest, so that it has text of its own
    text = recognizer.feed(audio)
    assert text == exported[1](audio[: 2 * STEP]) == recognizer.text
    assert recognizer.finish() == exported[1](audio) != text


def test_partial_texts_only_grow(recognizer):
    texts = [recognizer.feed(piece) for piece in np.split(noise(10 * STEP), 20)]
    assert texts[0] == "" and len(set(texts)) > 5
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))


def test_a_repeat_across_the_border_of_two_steps_is_one_label(exported, recognizer):
    audio = noise(10 * STEP, seed=2)
    assert recognizer.feed(audio) == exported[1](audio)
    assert len("".join(_texts_of_steps(exported[0], audio))) > len(recognizer.text)  # there were such repeats


def _texts_of_steps(path, audio):
    """Texts of the steps, each collapsed on its own."""
    recognizer = StreamingRecognizer(path, TOKENIZER)
    for piece in np.split(audio, len(audio) // STEP):
        recognizer._last, recognizer._labels = 0, []
        yield recognizer.feed(piece)


def test_finish_and_reset_forget_the_recording(exported, recognizer):
    first, second = noise(9000), noise(8000, seed=5)
    recognizer.feed(first)
    assert recognizer.finish() == exported[1](first)
    recognizer.feed(first)
    recognizer.reset()
    assert recognizer.text == "" and recognizer.finish() == ""
    recognizer.feed(second)
    assert recognizer.finish() == exported[1](second)


def test_logits_are_those_of_the_recording_alone(recognizer):
    recognizer.feed(noise(5000, seed=3))
    logits = recognizer.logits(noise(9000))
    assert logits.shape == (1, -(-usm.LogMel(16).num_frames(9000) // 4), 9)
    assert recognizer.feed(noise(9000)) and recognizer.finish() == TOKENIZER.decode(usm.greedy_decode(logits)[0])
    assert recognizer.logits(noise(300)).shape == (1, 0, 9)  # less than a window


def test_the_file_says_how_long_a_step_is_and_at_which_rate(recognizer):
    assert (recognizer.step, recognizer.sample_rate) == (STEP, 16000)


def test_wrong_files_and_pieces_are_refused(exported, recognizer, tmp_path):
    with pytest.raises(ValueError, match=r"takes audio \[n\], got shape \(1, 100\)"):
        recognizer.feed(np.zeros((1, 100)))
    inputs = keras.Input((4,), batch_size=1)
    path = str(tmp_path / "other.tflite")
    keras.Model(inputs, keras.layers.Dense(2)(inputs)).export(path, format="litert", verbose=False)
    with pytest.raises(ValueError, match="no streaming signature.*export_litert_streaming.*LiteRTRecognizer"):
        StreamingRecognizer(path, TOKENIZER)


def test_no_samples_have_no_frames(recognizer):
    assert recognizer.logits(noise(0)).shape == (1, 0, 9)
