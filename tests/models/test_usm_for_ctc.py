"""USMForCTC: logits, padding, loss, saving, streaming and training of the complete recogniser."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.optimizers.build_optimizer import build_optimizer

BINS, VOCAB = 8, 7
SIZE = {"num_layers": 1, "dim": 16, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": BINS}
COMPRESSED = {"quantization": "int4", "sparsity": "2:4"}
LENGTHS = np.array([40, 29, 22, 7], "int32")
LABELS = np.array([[1, 2, 3, 3], [4, 4, 0, 0], [6, 5, 0, 0], [1, 0, 0, 0]], "int32")


def array(tensor):
    return ops.convert_to_numpy(tensor)


def prepared(**kwargs):
    """A model with random weights, biases too, so that padding would be heard if it could."""
    keras.utils.set_random_seed(0)
    model = usm.USMForCTC(VOCAB, **{**SIZE, **kwargs})
    draw = np.random.default_rng(0)
    for weight in model.trainable_variables:
        weight.assign(array(weight) + 0.2 * draw.normal(size=weight.shape))
    for layer in model._flatten_layers():
        if isinstance(layer, usm.QuantDense) and layer.sparsity:
            layer.update_mask()
    return model


def features(batch=4, frames=40):
    return np.random.default_rng(1).normal(size=(batch, frames, BINS)).astype("float32")


def padded_batch():
    return {"features": features(), "lengths": LENGTHS}


def frames_after(length):
    return -(-length // 4)


@pytest.mark.parametrize("compression", [{}, COMPRESSED])
def test_an_utterance_is_the_same_alone_and_in_a_padded_batch(compression):
    model = prepared(**compression)
    logits = array(model(padded_batch()))
    assert logits.shape == (4, 10, VOCAB) and logits.dtype == np.float32
    for row, source, length in zip(logits, features(), LENGTHS, strict=True):
        alone = array(model(source[None, :length]))[0]
        assert len(alone) == frames_after(length)
        np.testing.assert_allclose(row[: len(alone)], alone, rtol=1e-5, atol=5e-5)
    assert np.abs(array(model(features()))[1, :8] - logits[1, :8]).max() > 1e-3  # unmasked, padding would be heard


def test_padded_frames_are_certain_blanks():
    probabilities = array(ops.softmax(prepared()(padded_batch())))
    for row, length in zip(probabilities, LENGTHS, strict=True):
        np.testing.assert_array_equal(row[frames_after(length) :, 0], 1.0)
        assert row[: frames_after(length), 0].max() < 1.0


def test_the_loss_of_the_padded_batch_is_the_loss_of_each_utterance_over_its_own_frames():
    functional = pytest.importorskip("torch").nn.functional
    import torch

    logits = array(prepared()(padded_batch()))
    expected = functional.ctc_loss(
        torch.tensor(logits).log_softmax(-1).transpose(0, 1),
        torch.tensor(LABELS).long(),
        input_lengths=torch.tensor([frames_after(length) for length in LENGTHS]),
        target_lengths=torch.tensor((LABELS != 0).sum(axis=1)),
        reduction="none",
    )
    assert np.isfinite(expected.numpy()).all()
    loss = keras.losses.CTC(reduction=None)(LABELS, logits)
    np.testing.assert_allclose(array(loss), expected.numpy(), rtol=1e-4)
    average = keras.losses.CTC()(LABELS, logits)
    np.testing.assert_allclose(array(average), expected.numpy().mean(), rtol=1e-4)


def test_features_without_lengths_are_real_to_the_end():
    model = prepared()
    with_lengths = model({"features": features(), "lengths": np.full(4, 40)})
    np.testing.assert_array_equal(array(model(features())), array(with_lengths))


def test_an_empty_row_is_all_blank():
    logits = array(prepared()({"features": features(2), "lengths": np.array([40, 0])}))
    np.testing.assert_array_equal(logits[1].argmax(axis=-1), 0)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("compression", [{}, COMPRESSED])
def test_a_saved_model_gives_identical_logits(tmp_path, compression):
    model = prepared(**compression, chunk_size=4, spec_augment=False, name="listener")
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    assert reloaded.name == "listener" and reloaded.get_config() == model.get_config()
    np.testing.assert_array_equal(array(reloaded(padded_batch())), array(model(padded_batch())))


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_the_configuration_rebuilds_the_model(dtype):
    model = prepared(**COMPRESSED, dropout=0.3, causal_conv=True, dtype=dtype)
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    assert twin.get_config() == model.get_config()
    assert twin.dtype_policy.name == twin.encoder.dtype_policy.name == dtype
    assert [w.shape for w in twin.weights] == [w.shape for w in model.weights]
    twin.set_weights(model.get_weights())
    np.testing.assert_array_equal(array(twin(padded_batch())), array(model(padded_batch())))


def test_the_image_format_that_keras_is_set_to_does_not_matter():
    expected, before = prepared()(padded_batch()), keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        np.testing.assert_array_equal(array(prepared()(padded_batch())), array(expected))
    finally:
        keras.config.set_image_data_format(before)


def test_a_streaming_model_has_said_its_first_chunk_before_it_hears_the_second():
    model = prepared(chunk_size=4, causal_conv=True)
    x = features(1)
    whole, start = array(model(x)), array(model(x[:, :16]))
    np.testing.assert_allclose(whole[:, :4], start, rtol=1e-5, atol=2e-5)
    centred = prepared(chunk_size=4, causal_conv=False)
    assert np.abs(array(centred(x))[:, :4] - array(centred(x[:, :16]))).max() > 1e-3


def test_training_lowers_the_loss_of_a_compressed_model():
    model = prepared(**COMPRESSED, dropout=0.0, spec_augment=False)
    model.compile(keras.optimizers.Adam(0.01), loss=keras.losses.CTC())
    build_optimizer(model)
    losses = model.fit(padded_batch(), LABELS, epochs=12, batch_size=4, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]


def test_a_training_step_with_everything_on_reaches_every_weight():
    model = prepared(**COMPRESSED, num_mel_bins=80, chunk_size=4)
    model.compile(keras.optimizers.Adam(0.01), loss=keras.losses.CTC())
    build_optimizer(model)
    before = [array(weight).copy() for weight in model.trainable_variables]
    features = np.random.default_rng(1).normal(size=(4, 40, 80)).astype("float32")
    history = model.fit({"features": features, "lengths": LENGTHS}, LABELS, batch_size=4, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    for old, new in zip(before, model.trainable_variables, strict=True):
        assert np.isfinite(array(new)).all() and np.any(array(new) != old), new.path


def test_predict_agrees_with_the_call_for_both_kinds_of_input():
    model = prepared()
    for inputs in (features(), padded_batch()):
        expected = array(model(inputs))
        np.testing.assert_allclose(model.predict(inputs, batch_size=2, verbose=0), expected, rtol=1e-4, atol=1e-4)


def test_spec_augment_acts_in_training_only_and_can_be_left_out():
    x = features()
    quiet = {"dropout": 0.0}
    augmented, plain = prepared(**quiet), prepared(spec_augment=False, **quiet)
    plain.set_weights(augmented.get_weights())
    np.testing.assert_array_equal(array(augmented(x)), array(plain(x)))
    np.testing.assert_array_equal(array(plain(x, training=True)), array(plain(x)))
    assert np.abs(array(augmented(x, training=True)) - array(augmented(x))).max() > 0.01


def test_spec_augment_takes_arguments_and_the_configuration_keeps_them():
    model = prepared(spec_augment={"time_masks": 3, "time_share": 0.2})
    for one in (model, usm.USMForCTC.from_config(model.get_config())):
        assert (one.spec_augment.time_masks, one.spec_augment.time_share) == (3, 0.2)
    assert usm.USMForCTC.from_config(prepared(spec_augment=False).get_config()).spec_augment is None


def test_logits_are_float32_under_mixed_precision():
    mixed, full = prepared(dtype="mixed_bfloat16"), prepared()
    mixed.set_weights(full.get_weights())
    logits = mixed(padded_batch())
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    assert mixed.encoder.compute_dtype == "bfloat16"
    assert np.abs(array(logits) - array(full(padded_batch()))).mean() < 0.05


def test_every_matrix_of_the_encoder_is_compressed_and_the_head_is_not():
    model = prepared(**COMPRESSED)
    dense = [layer for layer in model.encoder._flatten_layers() if isinstance(layer, usm.QuantDense)]
    assert len(dense) == 1 + 10 * SIZE["num_layers"]
    assert all(layer.quantization.bits == 4 and str(layer.sparsity) == "2:4" for layer in dense)
    assert model.head.quantization is None and model.head.sparsity is None


def test_shapes_are_known_without_a_call():
    model = prepared()
    assert model.compute_output_shape((None, 41, BINS)) == (None, 11, VOCAB)
    assert model.compute_output_shape({"features": (2, None, BINS), "lengths": (2,)}) == (2, None, VOCAB)


def test_arguments_override_the_preset():
    model = usm.USMForCTC(VOCAB, preset="tiny", num_layers=1, dropout=0.0)
    assert len(model.encoder.blocks) == 1
    assert model.encoder.settings["dim"] == 96


def test_bad_arguments_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="preset='huge' is not known; choose one of tiny, small"):
        usm.USMForCTC(VOCAB, preset="huge")
    with pytest.raises(ValueError, match="vocab_size counts the blank and must be at least 2, got 1"):
        usm.USMForCTC(1)
    with pytest.raises(ValueError, match="QuantizationConfig|bits|quantization"):
        usm.USMForCTC(VOCAB, quantization="int99")
