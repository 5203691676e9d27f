"""read_litert_weights, judged by the LiteRT runtime: fed the identity matrix, a dense layer says its own weights."""

import keras
import numpy as np
import pytest

from keras_usm_lite.export.litert_weights import read_litert_weights

if keras.backend.backend() != "tensorflow":
    pytest.skip("LiteRT files are written with the TensorFlow backend", allow_module_level=True)

INPUTS = 12
LAYERS = {"first": 5, "second": 3}


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((INPUTS,))
    outputs = [keras.layers.Dense(units, name=name)(inputs) for name, units in LAYERS.items()]
    model = keras.Model(inputs, outputs)
    path = tmp_path_factory.mktemp("litert") / "float.tflite"
    model.export(path, format="litert", verbose=False)
    return str(path), {name: keras.ops.convert_to_numpy(model.get_layer(name).kernel) for name in LAYERS}


@pytest.fixture(scope="module", params=[8, 4, 2])
def integer_file(request, float_file, tmp_path_factory):
    from ai_edge_quantizer import qtyping, quantizer

    converter = quantizer.Quantizer(float_file[0])
    converter.add_dynamic_config(".*", qtyping.TFLOperationName.FULLY_CONNECTED, num_bits=request.param)
    path = tmp_path_factory.mktemp("litert") / f"int{request.param}.tflite"
    path.write_bytes(converter.quantize(enable_progress_report=False).quantized_model)
    return str(path), request.param


def by_layer(path):
    weights = read_litert_weights(path)
    assert len(weights) == len(LAYERS)
    return {name: weight for name in LAYERS for weight in weights if name in weight.tensor}


def runtime_outputs(path):
    """What the runtime computes for the identity matrix, by the number of units."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path)
    index = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(index, (INPUTS, INPUTS))
    interpreter.allocate_tensors()
    interpreter.set_tensor(index, np.eye(INPUTS, dtype="float32"))
    interpreter.invoke()
    return {d["shape"][-1]: interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()}


def test_float_matrices_come_back_as_they_are(float_file):
    path, kernels = float_file
    for name, weight in by_layer(path).items():
        np.testing.assert_array_equal(weight.values, kernels[name].T)
        assert weight.codes is None and weight.scale is None and weight.bits == 32


def test_integers_times_scale_is_what_the_runtime_multiplies_by(integer_file):
    path, _ = integer_file
    outputs = runtime_outputs(path)
    for name, weight in by_layer(path).items():
        assert weight.values.shape == (LAYERS[name], INPUTS) and len(np.unique(weight.codes)) > 2
        # rows of the identity are exact in the runtime's int8 activations (127 / 127): only float rounding is left
        np.testing.assert_allclose(outputs[LAYERS[name]], weight.values.T, rtol=1e-5, atol=1e-6)


def test_codes_are_signed_integers_of_the_stated_width(integer_file):
    path, bits = integer_file
    for weight in read_litert_weights(path):
        assert weight.bits == bits and weight.codes.dtype == np.int8
        assert -(2 ** (bits - 1)) <= weight.codes.min() < 0 < weight.codes.max() < 2 ** (bits - 1)
        assert weight.scale.dtype == np.float32 and len(weight.scale) == len(weight.codes)
        np.testing.assert_array_equal(weight.values, weight.codes * weight.scale[:, None])


def test_weights_of_another_type_are_refused_with_the_type(float_file, tmp_path):
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(float_file[0])
    name = read_litert_weights(float_file[0])[0].tensor.encode()
    (tensor,) = (tensor for tensor in model.subgraphs[0].tensors if tensor.name == name)
    tensor.type = schema.TensorType.INT16
    flatbuffer_utils.write_model(model, str(tmp_path / "odd.tflite"))
    with pytest.raises(ValueError, match="have type INT16; expected FLOAT32, INT8, INT4 or INT2"):
        read_litert_weights(tmp_path / "odd.tflite")
