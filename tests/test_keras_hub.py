"""A speech model of keras-hub becomes low-bit and sparse, trains a step, is saved, reloaded and exported."""

import importlib.util
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.core.nm_mask import nm_violations

if importlib.util.find_spec("keras_hub") is None:
    pytest.skip("keras-hub is not installed", allow_module_level=True)

RULES = {"token_embedding": ("int8", None), ".": ("int4", "2:4")}
RNG = np.random.default_rng(0)
INPUTS = {
    "encoder_features": RNG.normal(size=(2, 16, 80)).astype("float32"),
    "decoder_token_ids": np.array([[1, 2, 3, 4], [5, 6, 7, 0]]),
    "decoder_padding_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
}


def array(tensor):
    return ops.convert_to_numpy(tensor)


def outputs(model):
    return {name: array(value) for name, value in model(INPUTS).items()}


@pytest.fixture(scope="module")
def trained():
    """The compressed copy of a small Whisper with random weights, after one training step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that keras-hub imports
        import keras_hub
    keras.utils.set_random_seed(0)
    whisper = keras_hub.models.WhisperBackbone(
        vocabulary_size=64,
        num_layers=1,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        max_encoder_sequence_length=16,
        max_decoder_sequence_length=4,
    )
    small = usm.compress(whisper, RULES)
    small.compile(keras.optimizers.SGD(1e-3), dict.fromkeys(outputs(small), "mse"))
    targets = {name: np.zeros_like(value) for name, value in outputs(small).items()}
    small.fit(INPUTS, targets, verbose=0, callbacks=[usm.callbacks.NMPruning()])
    return whisper, small


def test_every_kernel_is_compressed_and_obeys_its_pattern(trained):
    whisper, small = trained
    layers = usm.compressed_layers(small)
    assert len(layers) == 2 + 4 + 2 + 8 + 2 + 1  # convolutions, attentions and feed-forward layers, token embedding
    for layer in layers:
        assert layer.quantization.bits == (8 if "token_embedding" in layer.path else 4)
        if layer.sparsity is not None:
            assert int(nm_violations(layer.effective_kernel(), 2, 4)) == 0
    before, after = outputs(whisper), outputs(small)
    assert all(0 < np.abs(after[name] - before[name]).max() < 5 for name in before)


def test_it_survives_save_and_reload_bit_for_bit(trained, tmp_path):
    _, small = trained
    small.save(tmp_path / "small.keras")
    packed = usm.load_packed(usm.save_packed(small, tmp_path / "small.usm"))
    for loaded in (keras.models.load_model(tmp_path / "small.keras"), packed):
        for name, value in outputs(loaded).items():
            np.testing.assert_array_equal(value, outputs(small)[name])


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="export needs the TensorFlow backend")
@pytest.mark.filterwarnings("ignore:.*the next width LiteRT can run")
def test_litert_computes_what_keras_does(trained, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    _, small = trained
    interpreter = Interpreter(usm.export_litert(small, tmp_path / "small.tflite"))
    details = {name: detail for detail in interpreter.get_input_details() for name in INPUTS if name in detail["name"]}
    for name, value in INPUTS.items():
        interpreter.resize_tensor_input(details[name]["index"], value.shape)
    interpreter.allocate_tensors()
    for name, value in INPUTS.items():
        interpreter.set_tensor(details[name]["index"], value.astype(details[name]["dtype"]))
    interpreter.invoke()
    served = {detail["shape"][1]: detail["index"] for detail in interpreter.get_output_details()}
    for value in outputs(small).values():
        error = interpreter.get_tensor(served[value.shape[1]]) - value
        assert np.sqrt(np.mean(error**2)) / value.std() < 0.05  # int8 activations
