"""Each utterance comes exactly once an epoch, in few shapes, in an order that (seed, epoch) fixes."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.data.speech_batches import SpeechBatches


class Features(list):
    """Features whose every number tells the utterance: utterance `i` is filled with `i + 1`."""

    def __init__(self, num_frames, size=3):
        super().__init__(np.full((n, size), i + 1, np.float32) for i, n in enumerate(num_frames))
        self.num_frames = np.array(num_frames)


def make(num_frames=None, **kwargs):
    if num_frames is None:
        num_frames = np.random.default_rng(1).integers(20, 200, 53).tolist()
    labels = [[i + 1] * (1 + i % 5) for i in range(len(num_frames))]
    return SpeechBatches(Features(num_frames), labels, **({"batch_frames": 800} | kwargs))


def order(batches):
    return [batches.batch_indices(i) for i in range(len(batches))]


def flat(batches):
    return [index for batch in order(batches) for index in batch]


def test_a_batch_holds_its_utterances_and_empty_rows(tmp_path):
    batches = make()
    for i, (x, y, sample_weight) in enumerate(batches):
        indices = batches.batch_indices(i)
        n = len(indices)
        assert x["features"].dtype == np.float32 and sample_weight.dtype == np.float32
        assert x["lengths"].dtype == np.int32 and y.dtype == np.int32
        assert x["features"].shape[:2] in batches.bucket_shapes and y.shape == (len(y), 5)
        assert len(x["features"]) == len(x["lengths"]) == len(y) == len(sample_weight)
        np.testing.assert_array_equal(sample_weight, [1.0] * n + [0.0] * (len(y) - n))
        for row in range(len(y)):
            index = indices[row] if row < n else None
            length = 0 if index is None else batches._features.num_frames[index]
            assert x["lengths"][row] == length
            assert (x["features"][row, :length] == (index or 0) + 1).all()
            assert not x["features"][row, length:].any()
            expected = [] if index is None else [index + 1] * (1 + index % 5)
            np.testing.assert_array_equal(y[row], expected + [0] * (5 - len(expected)))


@settings(max_examples=60, deadline=None)
@given(
    num_frames=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    batch_frames=st.integers(1, 2000),
    num_buckets=st.integers(1, 6),
    shuffle=st.booleans(),
    epoch=st.integers(0, 5),
    num_parts=st.integers(1, 4),
)
def test_parts_are_disjoint_complete_and_of_equal_shapes(
    num_frames, batch_frames, num_buckets, shuffle, epoch, num_parts
):
    parts = []
    for part in range(num_parts):
        batches = make(
            num_frames,
            batch_frames=batch_frames,
            num_buckets=num_buckets,
            shuffle=shuffle,
            shard=(part, num_parts),
        )
        batches.set_epoch(epoch)
        parts.append(batches)
    assert sorted(index for part in parts for index in flat(part)) == list(range(len(num_frames)))
    shapes = [[x["features"].shape for x, _, _ in part] for part in parts]
    assert all(shape == shapes[0] for shape in shapes)
    assert {shape[:2] for shape in shapes[0]} == set(parts[0].bucket_shapes)
    assert len(parts[0].bucket_shapes) <= num_buckets + (num_buckets > 1)  # one more for unusually long ones


def test_buckets_are_quantiles_in_steps_of_eight_and_batches_fill_the_frame_budget():
    batches = make(list(range(1, 101)), batch_frames=500, num_buckets=4)
    assert batches.bucket_shapes == [(15, 32), (8, 56), (6, 80), (4, 104)]
    for i, (x, _, _) in enumerate(batches):
        size, length = x["features"].shape[:2]
        assert size * length <= 500
        shorter = [n for _, n in batches.bucket_shapes if n < length]
        assert all(batches._features.num_frames[k] > max(shorter, default=0) for k in batches.batch_indices(i))


def test_devices_that_share_a_batch_get_equally_many_rows():
    batches = make(list(range(1, 101)), batch_frames=500, num_buckets=4, batch_multiple=4)
    assert batches.bucket_shapes == [(12, 32), (8, 56), (4, 80), (4, 104)]
    assert sorted(flat(batches)) == list(range(100))
    assert make([900] * 3, batch_frames=500, batch_multiple=4).bucket_shapes == [(4, 904)]


def test_an_utterance_beyond_the_frame_budget_is_a_batch_of_its_own():
    batches = make([10, 20, 900, 950], batch_frames=100, num_buckets=2)
    assert batches.bucket_shapes == [(4, 24), (1, 952)]
    assert sorted(map(sorted, order(batches))) == [[0, 1], [2], [3]]


def test_lengths_that_coincide_make_fewer_buckets():
    assert make([17] * 9, batch_frames=48, num_buckets=4).bucket_shapes == [(2, 24)]


def test_the_order_depends_on_seed_and_epoch_only():
    one, other = make(seed=3), make(seed=3)
    np.random.seed(7)
    assert order(one) == order(other)
    first = order(one)
    one.on_epoch_end()
    assert one.epoch == 1 and order(one) != first
    other.set_epoch(1)
    assert order(one) == order(other)
    one.set_epoch(0)
    assert order(one) == first
    assert order(make(seed=4)) != first


def test_shuffling_moves_utterances_between_batches_and_batches_in_the_epoch():
    batches = make()
    first = {frozenset(batch) for batch in order(batches)}
    shapes = [x["features"].shape for x, _, _ in batches]
    batches.set_epoch(1)
    assert {frozenset(batch) for batch in order(batches)} != first
    assert [x["features"].shape for x, _, _ in batches] != shapes


def test_without_shuffling_every_epoch_has_the_same_order_inside_the_buckets():
    batches = make(shuffle=False)
    first = order(batches)
    batches.on_epoch_end()
    assert order(batches) == first
    assert all(batch == sorted(batch) for batch in first)


def test_predictions_can_be_mapped_back_to_the_utterances():
    batches = make(shuffle=False)
    predictions = np.zeros(53)
    for i, (x, _, sample_weight) in enumerate(batches):
        predictions[batches.batch_indices(i)] = x["features"][sample_weight > 0, 0, 0]
    np.testing.assert_array_equal(predictions, np.arange(53) + 1)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_first_two_batches_have_different_lengths(shuffle):
    for seed in range(20):
        batches = make(shuffle=shuffle, seed=seed, num_buckets=2)
        assert batches[0][0]["features"].shape[1] != batches[1][0]["features"].shape[1]


def test_the_label_length_can_be_fixed():
    assert make(max_label_length=9)[0][1].shape[1] == 9
    with pytest.raises(ValueError, match="longest label sequence has 5 labels, max_label_length is 4"):
        make(max_label_length=4)


@pytest.mark.parametrize(
    ("num_frames", "labels", "kwargs", "message"),
    [
        ([], [], {}, "no utterances"),
        ([5, 6], [[1]], {}, "2 utterances have 1 label lists"),
        ([5], [[1, 0]], {}, r"labels\[0\] holds 0; allowed are integers of at least 1"),
        ([5], [[1]], {"batch_frames": 0}, "batch_frames is 0"),
        ([5], [[1]], {"num_buckets": 0}, "num_buckets is 0"),
        ([5], [[1]], {"batch_multiple": 0}, "batch_multiple is 0"),
        ([5], [[1]], {"workers": 2}, "workers=2.*Allowed is one worker"),
        ([5], [[1]], {"use_multiprocessing": True}, "Allowed is one worker"),
        ([5], [[1]], {"shard": (2, 2)}, r"shard is \(2, 2\); allowed are pairs"),
    ],
)
def test_bad_arguments_are_named(num_frames, labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        SpeechBatches(Features(num_frames), labels, **kwargs)


class Probe(keras.Model):
    """Follows the features so quickly that its weight tells in which order it saw them."""

    def __init__(self):
        super().__init__()
        self.head = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, x):
        return self.head(keras.ops.mean(x["features"], axis=1) / 50.0)


def fit(model, batches, **kwargs):
    follow = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: batches.set_epoch(epoch))
    model.compile(keras.optimizers.SGD(0.2), loss=lambda y, p: keras.ops.square(p[:, 0] - 1.0))
    model.fit(batches, shuffle=False, verbose=0, callbacks=[follow], **kwargs)
    return keras.ops.convert_to_numpy(model.head.kernel).tolist()


def test_fit_resumes_at_the_order_of_the_epoch():
    model, resumed = Probe(), Probe()
    expected = fit(model, make(), epochs=2)
    half = fit(resumed, make(), epochs=1)
    assert fit(resumed, make(), initial_epoch=1, epochs=2) == expected != half
    assert fit(Probe(), make(seed=1), epochs=2) != expected


def test_predict_takes_batches_of_many_shapes_in_their_order():
    batches = make(shuffle=False)
    assert len(batches.bucket_shapes) == 4
    model = Probe()
    predicted = model.predict(batches, verbose=0)
    expected = np.concatenate([x["features"].mean(axis=1) for x, _, _ in batches]) / 50.0
    kernel = keras.ops.convert_to_numpy(model.head.kernel)
    np.testing.assert_allclose(predicted, expected @ kernel, atol=1e-5)


def test_a_few_very_long_utterances_do_not_pad_a_quarter_of_the_others():
    lengths = list(range(1, 101))
    batches = make([*lengths, 3000, 2800], batch_frames=500, num_buckets=4)
    *usual, (size, longest) = batches.bucket_shapes
    assert (size, longest) == (1, 3000) and usual == [(15, 32), (8, 56), (6, 80), (4, 104)]
    assert sorted(flat(batches)) == list(range(102))
    assert make([*lengths, 3000], batch_frames=500, num_buckets=1).bucket_shapes == [(1, 3000)]  # one shape for all
