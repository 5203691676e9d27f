"""RelativeSelfAttention: numpy with complex rotations is the judge; distances matter, positions and padding do not."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.testing import TestCase

from keras_usm_lite.layers.masking import frame_mask
from keras_usm_lite.layers.relative_attention import RelativeSelfAttention

DIM = 16


def array(tensor):
    return ops.convert_to_numpy(tensor)


def built(num_heads=2, **kwargs):
    layer = RelativeSelfAttention(num_heads, **kwargs)
    layer.build((None, None, DIM))
    draw = np.random.default_rng(0)
    for weight in layer.trainable_variables:
        weight.assign(0.5 * draw.normal(size=weight.shape))
    return layer


def frames(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=(*shape, DIM)).astype("float32")


def expected_attention(layer, x, allowed):
    """Attention of `[frames, dim]` in float64; `allowed[i, j]`: frame i may see frame j."""

    def heads(projection):
        return np.split(x.astype("float64") @ array(projection.effective_kernel()), layer.num_heads, axis=-1)

    def turned(head):  # features i and i + d / 2 are one complex number, turned by t * 10000^(-2 i / d)
        half = head.shape[-1] // 2
        angles = np.arange(len(x))[:, None] * 10000.0 ** (-2 * np.arange(half) / head.shape[-1])
        return (head[:, :half] + 1j * head[:, half:]) * np.exp(1j * angles)

    context = []
    for query, key, value in zip(heads(layer.query), heads(layer.key), heads(layer.value), strict=True):
        scores = (turned(query) @ turned(key).conj().T).real / np.sqrt(query.shape[-1])
        weights = np.where(allowed, np.exp(scores), 0)
        context.append(weights / weights.sum(axis=-1, keepdims=True) @ value)
    return np.concatenate(context, axis=-1) @ array(layer.output_projection.effective_kernel())


class LayerContract(TestCase):
    def test_relative_self_attention_keeps_every_promise_of_a_keras_layer(self):
        self.run_layer_test(
            RelativeSelfAttention,
            init_kwargs={"num_heads": 2, "chunk_size": 3, "quantization": "int4", "sparsity": "2:4"},
            input_shape=(2, 7, 8),
            expected_output_shape=(2, 7, 8),
            expected_num_trainable_weights=4,
            expected_num_non_trainable_weights=20,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=True,
        )


@pytest.mark.parametrize("compression", [{}, {"quantization": "int4", "sparsity": "2:4"}])
@pytest.mark.parametrize("num_heads", [1, 2, 8])
def test_full_attention_is_its_equation(num_heads, compression):
    layer = built(num_heads, **compression)
    if compression:
        for projection in (layer.query, layer.key, layer.value, layer.output_projection):
            projection.update_mask()
    x = frames(2, 10)
    expected = [expected_attention(layer, row, np.ones((10, 10), bool)) for row in x]
    np.testing.assert_allclose(array(layer(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 10, 50])
def test_chunked_attention_is_its_equation(chunk_size):
    layer = built(chunk_size=chunk_size)
    x = frames(1, 10)
    chunk = np.arange(10) // chunk_size
    expected = expected_attention(layer, x[0], chunk[:, None] == chunk)
    np.testing.assert_allclose(array(layer(x))[0], expected, rtol=1e-4, atol=1e-4)


def test_chunks_can_be_computed_one_after_the_other():
    full, chunked = built(), built(chunk_size=4)
    x = frames(2, 12)
    one_by_one = np.concatenate([array(full(x[:, start : start + 4])) for start in (0, 4, 8)], axis=1)
    np.testing.assert_allclose(array(chunked(x)), one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "scores"), [(24, 24 * 4), (10, 12 * 4), (3, 3 * 3)])
def test_there_are_as_many_scores_for_each_frame_as_a_chunk_has_frames(length, scores, monkeypatch):
    sizes, softmax = [], ops.softmax
    monkeypatch.setattr(ops, "softmax", lambda x: sizes.append(x.shape) or softmax(x))
    built(2, chunk_size=4)(frames(1, length))
    assert [np.prod(size) for size in sizes] == [2 * scores]  # of two heads


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="other backends know every length")
def test_chunks_of_recordings_of_any_length_are_those_of_that_length():
    import tensorflow as tf

    layer = built(chunk_size=4)
    function = tf.function(layer, input_signature=[tf.TensorSpec((None, None, DIM))])
    for length in (3, 8, 10):
        np.testing.assert_allclose(function(frames(2, length)), layer(frames(2, length)), rtol=1e-5, atol=1e-6)


def test_only_distances_matter():
    layer = built()
    x = frames(1, 30)
    shifted = np.roll(x, 7, axis=1)  # frames 0..9 are now 7..16, behind frames that the mask hides
    at_start = layer(x, mask=np.arange(30)[None] < 10)
    later = layer(shifted, mask=(np.arange(30)[None] >= 7) & (np.arange(30)[None] < 17))
    np.testing.assert_allclose(array(at_start)[:, :10], array(later)[:, 7:17], rtol=1e-4, atol=1e-5)


def test_order_matters():
    layer = built()
    x = frames(1, 10)
    assert np.abs(array(layer(x))[:, ::-1] - array(layer(x[:, ::-1].copy()))).max() > 0.1


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_padding_is_never_attended_to(chunk_size):
    layer = built(chunk_size=chunk_size)
    lengths = [12, 9, 5, 1]
    x = frames(4, 12)
    mask = frame_mask(lengths, 12)
    y = array(layer(x, mask=mask))
    for row, source, length in zip(y, x, lengths, strict=True):
        chunk = np.arange(length) // (chunk_size or length)
        expected = expected_attention(layer, source[:length], chunk[:, None] == chunk)
        np.testing.assert_allclose(row[:length], expected, rtol=1e-4, atol=1e-4)
    louder = np.where(array(mask)[..., None], x, 100 * x)
    for row, other, length in zip(y, array(layer(louder, mask=mask)), lengths, strict=True):
        np.testing.assert_allclose(other[:length], row[:length], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_row_of_padding_gives_finite_values_and_gradients(chunk_size):
    x, mask = keras.Input((6, DIM)), keras.Input((6,), dtype="bool")
    layer = RelativeSelfAttention(2, chunk_size=chunk_size)
    model = keras.Model([x, mask], layer(x, mask=mask))
    model.compile(keras.optimizers.SGD(1.0), loss="mse")
    before = [array(weight).copy() for weight in layer.trainable_variables]
    inputs = [frames(3, 6), array(frame_mask([0, 0, 3], 6))]
    assert np.isfinite(model.train_on_batch(inputs, frames(3, 6, seed=2)))
    for old, new in zip(before, layer.trainable_variables, strict=True):
        assert np.isfinite(array(new)).all() and np.any(array(new) != old)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_row_of_padding_is_finite_in_float16(chunk_size):
    outputs = built(chunk_size=chunk_size, dtype="mixed_float16")(frames(2, 6), mask=frame_mask([0, 6], 6))
    assert np.isfinite(array(outputs)).all()


def test_scores_are_computed_in_float32_under_mixed_precision():
    x = frames(1, 10)
    mixed = built(dtype="mixed_bfloat16")
    y = mixed(x)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    np.testing.assert_allclose(array(ops.cast(y, "float32")), array(built()(x)), atol=0.2)


def test_bad_arguments_are_refused_with_the_fix():
    for num_heads in (3, 16):  # does not divide; heads of one feature
        with pytest.raises(ValueError, match=f"num_heads={num_heads} must divide the width {DIM}.*even"):
            built(num_heads)
    for chunk_size in (0, 2.5):
        with pytest.raises(ValueError, match=f"chunk_size must be None .* whole number of frames, got {chunk_size}"):
            RelativeSelfAttention(2, chunk_size=chunk_size)
    with pytest.raises(ValueError, match="num_heads must be an integer of at least 1, got 0"):
        RelativeSelfAttention(0)
