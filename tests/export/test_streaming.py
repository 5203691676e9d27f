"""export_litert_streaming: the file continues where it was, step by step, with built-in operations only."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.export import litert
from keras_usm_lite.export.litert_weights import read_litert_weights
from keras_usm_lite.export.streaming import export_litert_streaming, streaming_model

if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs the TensorFlow backend", allow_module_level=True)

BINS, VOCAB, CHUNK = 16, 9, 5
SIZE = {"num_layers": 1, "dim": 32, "num_heads": 2, "kernel_size": 5, "subsampling_channels": 4, "num_mel_bins": BINS}
AUDIO = usm.LogMel(BINS, normalization="running")
# name -> quantization, sparsity, front end, chunks, shape of a recording
FILES = {
    "float, audio": (None, None, AUDIO, 2, (14700,)),
    "int4 2:4, features": ("int4", "2:4", None, 1, (91, BINS)),
    "int4 2:4, audio": ("int4", "2:4", AUDIO, 1, (9000,)),
}


def array(tensor):
    return ops.convert_to_numpy(tensor)


class Streamed:
    """A model, the streaming file made of it, and what both say to a recording."""

    def __init__(self, quantization, sparsity, frontend, chunks, shape, path):
        keras.utils.set_random_seed(0)
        self.model = usm.USMForCTC(
            VOCAB, quantization=quantization, sparsity=sparsity, chunk_size=CHUNK, causal_conv=True, **SIZE
        )
        draw = np.random.default_rng(0)
        for weight in self.model.trainable_variables:
            weight.assign(array(weight) + 0.2 * draw.normal(size=weight.shape) * (weight.name in ("kernel", "bias")))
        usm.update_masks(self.model)
        self.path = str(path)
        assert export_litert_streaming(self.model, path, frontend, chunks) == self.path
        self.inputs = draw.normal(size=(1, *shape)).astype("float32") * (0.1 if frontend else 1)
        self.whole = array(self.model(frontend(self.inputs) if frontend else self.inputs))
        self.keras = streaming_model(self.model, frontend, chunks)

    def run(self, step):
        """Logits of the recording from a function that takes one step."""
        shapes = {tensor.name: tensor.shape for tensor in self.keras.inputs}
        name = "audio" if "audio" in shapes else "features"
        frames, state, found = shapes[name][1], np.zeros(shapes["state"], "float32"), []
        for begin in range(0, self.inputs.shape[1], frames):
            chunk = np.zeros(shapes[name], "float32")
            real = self.inputs[:, begin : begin + frames]
            chunk[:, : real.shape[1]] = real
            outputs = step({name: chunk, "length": np.array([real.shape[1]], "int32"), "state": state})
            state = array(outputs["state"])
            found.append(array(outputs["logits"]))
        return np.concatenate(found, axis=1)

    def runner(self):
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter(self.path).get_signature_runner("serving_default")


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    folder, done = tmp_path_factory.mktemp("streaming"), {}

    def export(name):
        if name not in done:
            done[name] = Streamed(*FILES[name], folder / f"{len(done)}.tflite")
        return done[name]

    return export


@pytest.mark.parametrize("name", FILES)
def test_the_runtime_gives_step_by_step_what_keras_gives(streamed, name):
    stream, run = streamed(name), streamed(name).runner()
    expected = stream.run(stream.keras)
    frames = stream.whole.shape[1]
    np.testing.assert_allclose(expected[:, :frames], stream.whole, atol=5e-5)
    logits = stream.run(lambda inputs: run(**inputs))
    if name.startswith("float"):
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_allclose(logits[:, :frames], stream.whole, atol=1e-4)
    else:  # LiteRT rounds activations to int8
        error = np.sqrt(np.mean((logits - expected)[:, :frames] ** 2))
        assert error < 0.03 * stream.whole.std()


@pytest.mark.parametrize("name", FILES)
def test_every_operation_is_built_in(streamed, name):
    from ai_edge_litert import schema_py_generated as schema

    with open(streamed(name).path, "rb") as file:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(file.read(), 0))
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    assert schema.BuiltinOperator.FULLY_CONNECTED in codes and schema.BuiltinOperator.CUSTOM not in codes
    assert all(code.customCode is None for code in model.operatorCodes)  # Flex operations are custom ones


@pytest.mark.parametrize("name", FILES)
def test_the_signature_has_the_documented_names_shapes_and_types(streamed, name):
    _, _, frontend, chunks, _ = FILES[name]
    run, frames = streamed(name).runner(), CHUNK * chunks
    inputs = {key: (tuple(d["shape"]), d["dtype"]) for key, d in run.get_input_details().items()}
    outputs = {key: (tuple(d["shape"]), d["dtype"]) for key, d in run.get_output_details().items()}
    state = inputs["state"]
    expected = {"length": ((1,), np.int32), "state": state}
    if frontend is None:
        expected["features"] = ((1, 4 * frames, BINS), np.float32)
    else:
        expected["audio"] = ((1, 640 * frames), np.float32)
    assert inputs == expected
    assert outputs == {"logits": ((1, frames, VOCAB), np.float32), "state": state}
    assert state[1] is np.float32


def test_the_trained_integers_are_in_the_file(streamed):
    stream = streamed("int4 2:4, features")
    stored = [weight.codes for weight in read_litert_weights(stream.path) if weight.bits == 4]
    kernels = [layer for layer in usm.compressed_layers(stream.model) if layer.quantization is not None]
    assert len(stored) == len(kernels) == 11
    for layer in kernels:
        codes = array(layer.quantized_kernel()[0]).T
        assert any(np.array_equal(codes, candidate) for candidate in stored)


@pytest.mark.parametrize("name", FILES)
def test_the_gate_holds_a_streaming_file_against_the_whole_recording(streamed, name):
    stream, frontend = streamed(name), FILES[name][2]
    labels = np.array(usm.greedy_decode(stream.whole))
    dataset = [(stream.inputs, labels, np.ones(1))]
    parity = usm.verify_litert(stream.model, stream.path, dataset, tolerance=np.inf, frontend=frontend)
    assert parity.frames == stream.whole.shape[1] and parity.keras.wer == 0 and labels.size > 5
    if name.startswith("float"):
        assert parity.logits_error < 1e-4 and parity.kernels == 0 and not parity.differing
    else:
        assert 1e-5 < parity.logits_error < 0.03 and parity.kernels == 11


def test_an_export_that_fails_the_gate_is_not_written(streamed, tmp_path, monkeypatch):
    stream = streamed("float, audio")
    content = open(stream.path, "rb").read()
    monkeypatch.setattr(litert, "_convert", lambda *_: content)  # a converter that always writes the same model
    path = tmp_path / "model.tflite"
    dataset = [(stream.inputs, np.array(usm.greedy_decode(stream.whole)), np.ones(1))]
    assert export_litert_streaming(stream.model, path, AUDIO, 2, verify=dataset) == str(path)
    path.write_bytes(b"older")
    other = keras.models.clone_model(stream.model)
    with pytest.raises(usm.ParityError, match="WER of the file differs"):
        export_litert_streaming(other, path, AUDIO, 2, verify=dataset)
    with pytest.raises(ValueError, match=r"takes features .*inputs of shape \(1, 14700\)"):
        export_litert_streaming(other, path, verify=dataset)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_masks_that_were_never_made_are_pointed_out(tmp_path, monkeypatch):
    model = usm.USMForCTC(VOCAB, sparsity="2:4", chunk_size=CHUNK, causal_conv=True, **SIZE)
    monkeypatch.setattr(litert, "_convert", lambda *_: 1 / 0)  # the warning comes before the work
    warning = pytest.warns(UserWarning, match=r"sparse layers do not obey .* is not 2:4\. Train with .*update_masks")
    with warning, pytest.raises(ZeroDivisionError):
        export_litert_streaming(model, tmp_path / "model.tflite")


def test_what_cannot_stream_is_refused_and_nothing_is_written(tmp_path):
    offline = usm.USMForCTC(VOCAB, **SIZE)
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match="never looks beyond its chunk"):
        export_litert_streaming(offline, path)
    online = usm.USMForCTC(VOCAB, chunk_size=CHUNK, causal_conv=True, **SIZE)
    with pytest.raises(ValueError, match="Train with LogMel.normalization='running'"):
        export_litert_streaming(online, path, usm.LogMel(BINS))
    with pytest.raises(ValueError, match="model.bin' must end in '.tflite'"):
        export_litert_streaming(online, tmp_path / "model.bin")
    assert not list(tmp_path.iterdir())
