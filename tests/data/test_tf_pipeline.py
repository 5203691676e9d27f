"""The tf.data pipelines give exactly what `SpeechBatches` and `load_audio` give."""

import numpy as np
import pytest
import soundfile

from keras_usm_lite.data.audio import load_audio
from keras_usm_lite.data.manifest import Utterance
from keras_usm_lite.data.speech_batches import SpeechBatches
from keras_usm_lite.data.tf_pipeline import audio_dataset, to_tf_dataset

tf = pytest.importorskip("tensorflow")


class Features(list):
    def __init__(self, num_frames):
        rng = np.random.default_rng(0)
        super().__init__(rng.normal(size=(n, 3)).astype(np.float32) for n in num_frames)
        self.num_frames = np.array(num_frames)


def make(**kwargs):
    num_frames = np.random.default_rng(1).integers(20, 200, 53)
    labels = [[i + 1] * (1 + i % 5) for i in range(53)]
    return SpeechBatches(Features(num_frames), labels, batch_frames=800, **kwargs)


def assert_same(dataset_batches, batches):
    dataset_batches = list(dataset_batches)
    assert len(dataset_batches) == len(batches)
    for got, expected in zip(dataset_batches, batches, strict=True):
        tf.nest.assert_same_structure(got, expected)
        for one, other in zip(tf.nest.flatten(got), tf.nest.flatten(expected), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kwargs", [{}, {"shuffle": False}, {"shard": (1, 3)}, {"num_buckets": 1}])
def test_the_batches_are_those_of_speech_batches_in_every_epoch(kwargs):
    dataset, reference = to_tf_dataset(make(**kwargs)), make(**kwargs)
    for _ in range(3):
        assert_same(dataset.as_numpy_iterator(), reference)
        reference.on_epoch_end()


def test_repeating_goes_through_the_epochs():
    reference = make()
    dataset = to_tf_dataset(make()).repeat(2)
    passed = list(dataset.as_numpy_iterator())
    assert_same(passed[: len(reference)], reference)
    reference.on_epoch_end()
    assert_same(passed[len(reference) :], reference)


def test_an_interrupted_training_resumes_at_the_order_of_its_epoch():
    batches, reference = make(), make()
    batches.set_epoch(7)
    reference.set_epoch(7)
    assert_same(to_tf_dataset(batches).as_numpy_iterator(), reference)


def test_the_element_spec_leaves_batch_size_and_frames_open():
    dataset = to_tf_dataset(make())
    assert dataset.element_spec == (
        {
            "features": tf.TensorSpec((None, None, 3), tf.float32),
            "lengths": tf.TensorSpec((None,), tf.int32),
        },
        tf.TensorSpec((None, 5), tf.int32),
        tf.TensorSpec((None,), tf.float32),
    )
    assert int(dataset.cardinality()) == len(make())


def make_utterances(tmp_path):
    rng = np.random.default_rng(0)
    utterances = []
    for number, name in enumerate(["a.wav", "b.flac", "é.ogg"]):
        soundfile.write(tmp_path / name, rng.uniform(-0.5, 0.5, 800 * (number + 1)), 8000)
        utterances.append(Utterance(str(tmp_path / name), 0.1, f"text ü {number}", "anna"))
    return utterances


def test_raw_audio_comes_in_order_with_its_text(tmp_path):
    utterances = make_utterances(tmp_path)
    dataset = audio_dataset(utterances, sample_rate=16000)
    assert dataset.element_spec == (tf.TensorSpec((None,), tf.float32), tf.TensorSpec((), tf.string))
    elements = list(dataset.as_numpy_iterator())
    assert [text.decode() for _, text in elements] == [u.text for u in utterances]
    for (audio, _), utterance in zip(elements, utterances, strict=True):
        np.testing.assert_array_equal(audio, load_audio(utterance.path))


def test_an_unreadable_recording_is_reported_with_its_path(tmp_path):
    utterances = make_utterances(tmp_path)
    (tmp_path / "b.flac").write_bytes(b"junk")
    with pytest.raises(tf.errors.InvalidArgumentError, match="b.flac: cannot be decoded"):
        list(audio_dataset(utterances))


def test_automatic_sharding_is_off(tmp_path):
    for dataset in (to_tf_dataset(make()), audio_dataset(make_utterances(tmp_path))):
        policy = dataset.options().experimental_distribute.auto_shard_policy
        assert policy == tf.data.experimental.AutoShardPolicy.OFF
