"""The tf.data pipelines give exactly what `SpeechBatches` and `load_audio` give, also on workers of a service."""

import numpy as np
import pytest
import soundfile

from keras_usm_lite.data.audio import load_audio
from keras_usm_lite.data.manifest import Utterance
from keras_usm_lite.data.speech_batches import SpeechBatches
from keras_usm_lite.data.tf_pipeline import audio_dataset, record_dataset, to_tf_dataset

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


def by_utterance(dataset_batches, shapes):
    """`{first label: (features, labels)}` of every row that is not empty; no utterance may come twice."""
    found = {}
    for x, y, sample_weight in dataset_batches:
        assert x["features"].shape[:2] in shapes
        np.testing.assert_array_equal(sample_weight, x["lengths"] > 0)
        for features, length, labels in zip(x["features"], x["lengths"], y, strict=True):
            assert not features[length:].any()
            if length:
                assert labels[0] not in found
                found[labels[0]] = features[:length].tolist(), labels.tolist()
            else:
                assert not labels.any()
    return found


def operations(dataset):
    graph = tf.compat.v1.GraphDef.FromString(dataset._as_serialized_graph().numpy())
    return {node.op for nodes in (graph.node, *(f.node_def for f in graph.library.function)) for node in nodes}


def test_records_need_no_python_where_they_are_read(tmp_path):
    assert not [name for name in operations(record_dataset(make(), tmp_path)) if "Py" in name or "Generator" in name]
    assert {"PyFunc", "GeneratorDataset"} <= operations(to_tf_dataset(make()))


@pytest.mark.parametrize("kwargs", [{}, {"shard": (1, 3)}, {"num_buckets": 1}])
def test_records_hold_every_utterance_once_in_every_pass_shuffled_anew_and_reproducibly(tmp_path, kwargs):
    batches = make(**kwargs)
    orders = []
    for folder in "ab":
        tf.random.set_seed(0)
        dataset = record_dataset(batches, tmp_path / folder, num_files=5)
        assert dataset.element_spec == to_tf_dataset(batches).element_spec
        passes = [by_utterance(dataset.as_numpy_iterator(), batches.bucket_shapes) for _ in range(2)]
        assert passes[0] == passes[1] == by_utterance(make(**kwargs), batches.bucket_shapes)
        orders.append([list(found) for found in passes])
    assert orders[0] == orders[1] and orders[0][0] != orders[0][1]


def test_the_workers_of_a_tf_data_service_share_the_records_and_give_every_utterance_once(tmp_path):
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer()
    address = dispatcher.target.removeprefix("grpc://")
    workers = [service.WorkerServer(service.WorkerConfig(dispatcher_address=address)) for _ in range(2)]
    batches = make()
    identity = service.register_dataset(dispatcher.target, record_dataset(batches, tmp_path, num_files=8))
    dataset = service.from_dataset_id(
        "distributed_epoch", dispatcher.target, identity, to_tf_dataset(make()).element_spec
    )
    for _ in range(3):
        assert by_utterance(dataset.as_numpy_iterator(), batches.bucket_shapes) == by_utterance(
            make(), batches.bucket_shapes
        )
    assert len(workers) == 2


def test_records_are_refused_without_a_file(tmp_path):
    with pytest.raises(ValueError, match="num_files is 0; allowed are integers of at least 1"):
        record_dataset(make(), tmp_path, num_files=0)


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
