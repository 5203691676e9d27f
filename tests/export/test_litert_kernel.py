"""What LiteRT can run is known before training, and every kind of layer reaches the file as the integers it had."""

import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.export.litert import float_copy, litert_kernels
from keras_usm_lite.export.litert_kernel import LITERT_BITS, litert_problem
from keras_usm_lite.export.litert_weights import read_litert_weights

if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs the TensorFlow backend", allow_module_level=True)

RNG = np.random.default_rng(0)
FRAMES = RNG.normal(size=(1, 20, 32)).astype("float32")


def config(bits, codebook="symmetric", **changes):
    return usm.QuantizationConfig(bits=bits, codebook=codebook, scale="mse", **changes)


LAYERS = {
    "dense": keras.layers.Dense(24, activation="relu"),
    "queries": keras.layers.EinsumDense("abc,cde->abde", (None, 2, 12), bias_axes="de"),
    "convolution": keras.layers.Conv1D(24, 3, padding="causal"),
    "depthwise": keras.layers.DepthwiseConv1D(5, padding="same"),
}
# kind of layer, quantization, sparsity, bits in the file
CASES = [
    ("dense", config(8), None, 8),
    ("dense", config(4), "2:4", 4),
    ("dense", config(3), None, 4),
    ("dense", config(2), "1:4", 2),
    ("dense", config(2, "full"), None, 2),
    ("dense", config(2, "midrise"), None, 2),
    ("dense", config(1), None, 2),
    ("dense", config(4, "midrise"), None, 4),
    ("dense", config(2, "midrise"), "2:4", 4),
    ("dense", config(4, "asymmetric"), None, 4),
    ("dense", config(2, "asymmetric"), None, 2),
    ("dense", config(4, "asymmetric"), "2:4", 8),
    ("queries", config(4), "2:4", 4),
    ("queries", config(2), None, 2),
    ("queries", config(2, "midrise"), None, 4),
    ("queries", config(4, "asymmetric"), None, 8),
    ("convolution", config(4), "2:4", 4),
    ("convolution", config(2), None, 4),
    ("depthwise", config(8), None, 8),
    ("depthwise", config(4), None, 8),
]


def compressed(*cases):
    """The kinds of layers named, side by side over one input; the last axis joins their outputs."""
    layers = [
        type(LAYERS[kind]).from_config({**LAYERS[kind].get_config(), "name": f"layer_{number:02}"})
        for number, (kind, *_) in enumerate(cases)
    ]
    inputs = keras.Input((None, 32))
    outputs = [layer(inputs) for layer in layers]
    flat = [keras.layers.Reshape((-1, int(np.prod(output.shape[2:]))))(output) for output in outputs]
    model = keras.Model(inputs, keras.layers.Concatenate()(flat) if len(flat) > 1 else outputs[0])
    for weight in model.weights:
        weight.assign(RNG.normal(size=weight.shape))
    model = usm.compress(model, {layer.name: case[1:3] for layer, case in zip(layers, cases, strict=True)})
    for layer in usm.compressed_layers(model):
        if layer.sparsity is not None:
            layer.update_mask()
        layer.update_scale()
    return model


def array(tensor):
    return ops.convert_to_numpy(tensor)


def run(path, *inputs):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    details = sorted(interpreter.get_input_details(), key=lambda detail: detail["name"])
    for detail, value in zip(details, inputs, strict=True):
        interpreter.resize_tensor_input(detail["index"], value.shape)
    interpreter.allocate_tensors()
    for detail, value in zip(details, inputs, strict=True):
        interpreter.set_tensor(detail["index"], value)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Of every case, in one file: the bits in the file, what the runtime computes, and what Keras does."""
    model = compressed(*CASES)
    path = usm.export_litert(model, tmp_path_factory.mktemp("exported") / "model.tflite")  # compares the integers
    weights = read_litert_weights(path)
    assert len(weights) == len(CASES)
    widths = [32 if kind == "depthwise" else 24 for kind, *_ in CASES]
    found = [np.split(output, np.cumsum(widths)[:-1], -1) for output in (run(path, FRAMES), array(model(FRAMES)))]
    cases = []
    for number, outputs in enumerate(zip(*found, strict=True)):
        (weight,) = (weight for weight in weights if f"layer_{number:02}" in weight.name)
        cases.append((weight.bits, *outputs))
    return cases


@pytest.mark.filterwarnings("ignore:.*the next width LiteRT can run")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_kernel_runs_as_integers_of_the_promised_width(number, exported):
    bits, found, expected = exported[number]
    assert bits == CASES[number][-1]
    error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    assert error < 0.02  # int8 activations


@pytest.mark.parametrize(("kind", "quantization", "sparsity", "bits"), CASES)
def test_a_problem_is_named_exactly_where_the_file_needs_more_bits(kind, quantization, sparsity, bits):
    kind = "einsum" if kind == "queries" else kind
    problem = litert_problem(kind, quantization, sparsity, rows=32)
    assert (problem is not None) == (bits > max(quantization.bits, 2))
    if problem is not None:
        assert "use " in problem


@pytest.mark.parametrize(("bits", "codebook"), [(2, "midrise"), (1, "midrise"), (4, "asymmetric"), (2, "asymmetric")])
def test_an_offset_layer_computes_what_the_effective_kernel_does(bits, codebook):
    model = compressed(("dense", config(bits, codebook), None))
    copy = float_copy(model)
    assert type(copy.layers[-1]).__name__ == "OffsetDense"
    np.testing.assert_allclose(copy(FRAMES), model(FRAMES), rtol=1e-4, atol=1e-4)
    (kernel,) = litert_kernels(model)
    low, high = kernel.operand.min(), kernel.operand.max()
    assert -(2 ** (max(bits, 2) - 1)) <= low and high < 2 ** (max(bits, 2) - 1)


@pytest.mark.parametrize(
    ("kind", "quantization", "rows", "reason"),
    [
        ("dense", config(2), 30, "multiples of 4, not 30; use bits=4"),
        ("dense", config(2, form="fake", block_size=16), 32, "not one per 16; use block_size=None"),
        ("dense", config(4, activations="static"), 32, "activations='dynamic'"),
        ("dense", config(8, "asymmetric"), 32, "do not fit into 8 bits .*codebook='symmetric'"),
        ("convolution", config(2), 32, "no 2-bit convolution kernel; use bits=4"),
        ("depthwise", config(4), 5, "no 4-bit depthwise kernel; use bits=8"),
        ("embedding", config(8), 5, "no integer kernel for this kind of layer .embedding.; use quantization=None"),
        ("batched einsum", config(4), 32, "no integer kernel"),
        ("convolution 3d", config(8), 32, "no integer kernel"),
        ("einsum", config(2, "midrise"), 32, "midrise 2-bit codes need 4 bits here"),
    ],
)
def test_what_litert_cannot_run_is_named_with_the_nearest_thing_that_works(kind, quantization, rows, reason):
    assert re.search(reason, litert_problem(kind, quantization, None, rows))


def test_two_bit_convolutions_are_still_not_run_by_litert(tmp_path):
    """The reason for LITERT_BITS["convolution"]: the file is accepted and its output is not a number."""
    from ai_edge_quantizer import qtyping, quantizer

    model = keras.Sequential([keras.Input((20, 32)), keras.layers.Conv1D(8, 3)])
    model.export(tmp_path / "float.tflite", format="litert", verbose=False)
    converter = quantizer.Quantizer(str(tmp_path / "float.tflite"))
    converter.add_dynamic_config(regex=".*", operation_name=qtyping.TFLOperationName.CONV_2D, num_bits=2)
    result = converter.quantize(enable_progress_report=False, enable_progress_bar=False)
    (tmp_path / "int2.tflite").write_bytes(bytes(result.quantized_model))
    expected = ops.convert_to_numpy(model(FRAMES))
    right = np.allclose(run(tmp_path / "int2.tflite", FRAMES), expected, atol=3 * expected.std())
    assert not right and 2 not in LITERT_BITS["convolution"]
