"""CTC decoding against the sum over all alignments and against Keras' own decoder."""

import collections
import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_usm_lite.decoding import beam_decode, greedy_decode


def collapse(alignment):
    return [label for label, _ in itertools.groupby(alignment) if label]


def all_label_sequences(logits):
    """Every label sequence of `[T, V]` logits with its probability, by enumerating the V^T alignments."""
    probabilities = np.exp(logits.astype("float64"))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    sums = collections.defaultdict(float)
    for alignment in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        sums[tuple(collapse(alignment))] += np.prod(probabilities[np.arange(len(logits)), alignment])
    return sorted(sums.items(), key=lambda item: -item[1])


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_greedy_decoding_merges_repeats_and_drops_blanks(alignments):
    assert greedy_decode(np.eye(4, dtype="float32")[alignments]) == [collapse(row) for row in alignments]


def test_tensors_of_the_backend_and_low_precision_decode_like_numpy():
    logits = np.random.default_rng(0).integers(-20, 20, size=(3, 9, 5)).astype("float32")  # exact in bfloat16
    for dtype in ("float32", "bfloat16", "float16"):
        tensor = keras.ops.convert_to_tensor(logits, dtype=dtype)
        assert greedy_decode(tensor) == greedy_decode(logits)
        as_numpy = keras.ops.convert_to_numpy(tensor)
        assert greedy_decode(as_numpy) == greedy_decode(logits)
        assert [paths[0][0] for paths in beam_decode(tensor)] == [paths[0][0] for paths in beam_decode(logits)]


@pytest.mark.parametrize("frames, classes", [(1, 3), (2, 2), (3, 3), (4, 4), (6, 3), (8, 2)])
def test_a_wide_beam_finds_the_most_probable_label_sequences_with_their_probabilities(frames, classes):
    logits = 2 * np.random.default_rng(frames).normal(size=(10, frames, classes)).astype("float32")
    for utterance, paths in zip(logits, beam_decode(logits, beam_width=1000, top_paths=1000), strict=True):
        expected = all_label_sequences(utterance)
        assert [tuple(labels) for labels, _ in paths] == [labels for labels, _ in expected]
        np.testing.assert_allclose([np.exp(score) for _, score in paths], [p for _, p in expected], rtol=1e-5)


def test_it_agrees_with_the_beam_search_of_keras():
    logits = 2 * np.random.default_rng(1).normal(size=(2, 6, 4)).astype("float32")
    labels, scores = keras.ops.ctc_decode(logits, np.full(2, 6), "beam_search", beam_width=64, top_paths=2)
    labels, scores = keras.ops.convert_to_numpy(labels), keras.ops.convert_to_numpy(scores)
    for row, paths in enumerate(beam_decode(logits, beam_width=64, top_paths=2)):
        assert [path for path, _ in paths] == [labels[k, row][labels[k, row] >= 0].tolist() for k in range(2)]
        np.testing.assert_allclose([score for _, score in paths], scores[row], rtol=1e-4)


def test_a_beam_does_not_exceed_the_true_probability_and_a_wider_one_loses_less():
    logits = np.random.default_rng(2).normal(size=(5, 7, 3)).astype("float32")
    for row, utterance in enumerate(logits):
        truth = dict(all_label_sequences(utterance))
        narrow, wide = (beam_decode(logits[row : row + 1], beam_width=width)[0][0] for width in (2, 500))
        assert np.exp(narrow[1]) <= truth[tuple(narrow[0])] * (1 + 1e-5)
        assert narrow[1] <= wide[1] + 1e-6


def test_the_beam_can_beat_the_best_alignment():
    logits = np.log(np.array([[[0.4, 0.3, 0.3], [0.4, 0.3, 0.3], [0.1, 0.2, 0.7]]]))
    assert greedy_decode(logits) == [[2]]
    best = max(all_label_sequences(logits[0]), key=lambda item: item[1])[0]
    assert best == (1, 2)
    assert beam_decode(logits)[0][0][0] == [1, 2]


@pytest.mark.parametrize("never", [-1e4, -1e9, -np.inf])
def test_frames_that_are_certainly_blank_change_nothing(never):
    logits = np.random.default_rng(3).normal(size=(2, 5, 4)).astype("float32")
    padding = np.tile(np.array([0, never, never, never], dtype="float32"), (2, 6, 1))
    padded = np.concatenate([logits, padding], axis=1)
    assert greedy_decode(padded) == greedy_decode(logits)
    for with_padding, without in zip(beam_decode(padded, 64, 3), beam_decode(logits, 64, 3), strict=True):
        assert [labels for labels, _ in with_padding] == [labels for labels, _ in without]
        np.testing.assert_allclose([s for _, s in with_padding], [s for _, s in without], rtol=1e-6)


def test_no_more_paths_come_back_than_there_are():
    assert [labels for labels, _ in beam_decode(np.zeros((1, 1, 2)), beam_width=8, top_paths=8)[0]] in (
        [[], [1]],
        [[1], []],
    )


@pytest.mark.parametrize("decode", [greedy_decode, beam_decode])
def test_logits_of_one_utterance_need_their_batch_axis(decode):
    with pytest.raises(ValueError, match=r"\[batch, frames, classes\], got the shape \(5, 3\)"):
        decode(np.zeros((5, 3)))


@pytest.mark.parametrize("beam_width, top_paths", [(4, 5), (0, 0), (4, 0)])
def test_a_beam_narrower_than_the_paths_wanted_is_refused(beam_width, top_paths):
    with pytest.raises(ValueError, match=f"top_paths={top_paths}, beam_width={beam_width}"):
        beam_decode(np.zeros((1, 2, 3)), beam_width, top_paths)


def test_nan_is_not_decoded_by_the_beam():
    with pytest.raises(ValueError, match="NaN"):
        beam_decode(np.full((1, 2, 3), np.nan))
