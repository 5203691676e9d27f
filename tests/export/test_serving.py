"""serving_model: one input of a fixed meaning, the shapes asked for, and errors that say what to do instead."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.export.serving import require_tensorflow, serving_model

BINS, VOCAB = 16, 9
SIZE = {"num_layers": 1, "dim": 32, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4}


def array(tensor):
    return ops.convert_to_numpy(tensor)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return usm.USMForCTC(VOCAB, quantization="int4", num_mel_bins=BINS, **SIZE)


@pytest.mark.parametrize("batch", [1, 3, None])
@pytest.mark.parametrize("length", [41, None])
def test_a_model_of_features_has_the_shapes_that_were_asked_for(model, batch, length):
    served = serving_model(model, batch=batch, length=length)
    assert served.input_shape == (batch, length, BINS)
    assert served.output_shape == (batch, None if length is None else 11, VOCAB)


@pytest.mark.parametrize("batch", [1, None])
@pytest.mark.parametrize("length", [16000, None])
def test_a_model_of_audio_has_the_shapes_that_were_asked_for(model, batch, length):
    served = serving_model(model, sample_rate_input=16000, batch=batch, length=length)
    assert served.input_shape == (batch, length)
    assert served.output_shape == (batch, None if length is None else 25, VOCAB)


def test_one_row_of_any_length_is_the_default(model):
    assert serving_model(model).input_shape == (1, None, BINS)


def test_inputs_and_outputs_are_named_by_what_they_are(model):
    for served, name in ((serving_model(model), "features"), (serving_model(model, 16000), "audio")):
        assert [tensor.name for tensor in served.inputs] == [name]
        assert served.get_layer("logits").output is served.outputs[0]


def test_logits_are_those_of_the_model(model):
    x = np.random.default_rng(0).normal(size=(2, 40, BINS)).astype("float32")
    np.testing.assert_array_equal(array(serving_model(model, batch=None)(x)), array(model(x)))


def test_audio_goes_through_the_front_end_that_was_given(model):
    audio = 0.1 * np.random.default_rng(0).normal(size=(1, 8000)).astype("float32")
    running = usm.LogMel(BINS, normalization="running")
    with_default = array(serving_model(model, 16000)(audio))
    with_running = array(serving_model(model, 16000, frontend=running)(audio))
    np.testing.assert_allclose(with_default, array(model(usm.LogMel(BINS)(audio))), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(with_running, array(model(running(audio))), rtol=1e-5, atol=1e-5)
    assert np.abs(with_default - with_running).max() > 1e-3


def test_a_model_in_half_precision_serves_float32_logits():
    half = usm.USMForCTC(VOCAB, num_mel_bins=BINS, dtype="mixed_bfloat16", **SIZE)
    assert serving_model(half).outputs[0].dtype == "float32"


def test_the_compressed_copy_of_a_recogniser_can_be_served():
    small = usm.compress(usm.USMForCTC(VOCAB, num_mel_bins=BINS, **SIZE), {"ffn": ("int4", None)})
    assert isinstance(small, usm.CompressedModel)
    assert serving_model(small, length=40).output_shape == (1, 10, VOCAB)


def test_a_front_end_that_does_not_fit_is_refused_with_both_sides_named(model):
    with pytest.raises(ValueError, match="16 mel bins at the front end's 16000 Hz; got sample_rate_input=8000"):
        serving_model(model, sample_rate_input=8000)
    with pytest.raises(ValueError, match="takes 16 mel bins.*front end with 80 bins.*LogMel layer the model was"):
        serving_model(model, sample_rate_input=16000, frontend=usm.LogMel(80))


def test_a_model_that_is_no_recogniser_is_refused_with_the_way_out():
    other = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)], name="other")
    with pytest.raises(ValueError, match=r"Sequential 'other' does not say.*usm\.bake\(model\)\.export"):
        serving_model(other)


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="TensorFlow can export")
def test_other_backends_are_told_to_save_and_to_export_with_tensorflow(model, tmp_path):
    exports = {
        "export_litert": lambda: usm.export_litert(model, tmp_path / "model.tflite"),
        "export_saved_model": lambda: usm.export_saved_model(model, tmp_path / "model"),
    }
    for name, export in exports.items():
        with pytest.raises(RuntimeError, match=f"{name} needs.*'{keras.backend.backend()}'.*KERAS_BACKEND=tensorflow"):
            export()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="other backends are refused")
def test_tensorflow_is_accepted():
    assert require_tensorflow("export_litert") is None
