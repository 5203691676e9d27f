"""export_onnx: onnxruntime computes the logits of the compressed model from files that Keras wrote."""

import importlib.util

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.export.onnx import CONVERTERS, export_onnx

BACKEND = keras.backend.backend()
CONVERTER = CONVERTERS.get(BACKEND)
BINS = 16
SIZE = {"num_layers": 1, "dim": 32, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": BINS}

converts = pytest.mark.skipif(
    CONVERTER is None or not all(importlib.util.find_spec(name) for name in (CONVERTER, "onnxruntime")),
    reason=f"needs onnxruntime and a converter, {CONVERTER} on {BACKEND}: pip install onnxruntime",
)


def recogniser():
    keras.utils.set_random_seed(0)
    model = usm.USMForCTC(9, quantization="int4", sparsity="2:4", **SIZE)
    usm.update_masks(model)
    return model


def served(path, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    (logits,) = session.run(None, {entry.name: inputs})
    return entry.name, logits


def sizes(free):
    """One utterance of any length where the converter can do that, otherwise of one length."""
    return (free, 2 * free) if BACKEND == "tensorflow" else (free,)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and the ONNX file made of it, for features."""
    model, path = recogniser(), tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert export_onnx(model, path, length=None if BACKEND == "tensorflow" else 50) == str(path)
    return model, path


@converts
def test_onnxruntime_computes_the_logits_from_features(exported):
    model, path = exported
    for length in sizes(50):
        features = np.random.default_rng(0).normal(size=(1, length, BINS)).astype("float32")
        name, logits = served(path, features)
        assert name == "features"
        np.testing.assert_allclose(logits, ops.convert_to_numpy(model(features)), rtol=1e-4, atol=1e-4)
    assert list(path.parent.iterdir()) == [path]


@converts
def test_onnxruntime_computes_the_logits_from_audio_with_the_given_front_end(tmp_path):
    model, frontend = recogniser(), usm.LogMel(BINS, normalization="running")
    path = export_onnx(
        model, tmp_path / "model.onnx", 16000, length=None if BACKEND == "tensorflow" else 9000, frontend=frontend
    )
    for length in sizes(9000):
        audio = 0.1 * np.random.default_rng(0).normal(size=(1, length)).astype("float32")
        name, logits = served(path, audio)
        assert name == "audio"
        np.testing.assert_allclose(logits, ops.convert_to_numpy(model(frontend(audio))), rtol=1e-3, atol=1e-3)


@converts
def test_the_file_holds_the_kernels_on_their_grid(exported):
    import onnx

    model, path = exported
    kernels = [ops.convert_to_numpy(layer.effective_kernel()) for layer in usm.compressed_layers(model)]
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    stored = {np.sort(tensor.ravel()).tobytes() for tensor in stored if tensor.dtype == np.float32}
    assert kernels and all(np.sort(kernel.ravel()).tobytes() in stored for kernel in kernels)


@converts
def test_sizes_that_the_converter_cannot_leave_free_are_refused(tmp_path):
    fix = "batch=1 serves one utterance" if BACKEND == "tensorflow" else "needs both fixed"
    with pytest.raises(ValueError, match=f"batch=None, length=None.*{fix}"):
        export_onnx(recogniser(), tmp_path / "model.onnx", batch=None)
    assert not list(tmp_path.iterdir())


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must end in '.onnx'"):
        export_onnx(recogniser(), tmp_path / "model")


@pytest.mark.skipif(CONVERTER is not None, reason="this backend has a converter")
def test_a_backend_without_converter_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=f"active one is '{BACKEND}'"):
        export_onnx(recogniser(), tmp_path / "model.onnx")
