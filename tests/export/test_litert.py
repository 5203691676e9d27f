"""export_litert: trained integers in the file, the logits of Keras from the runtime, no trace of a failure."""

import os
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.export import litert
from keras_usm_lite.export.litert_weights import read_litert_weights

if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs the TensorFlow backend", allow_module_level=True)

BINS, VOCAB = 16, 9
SIZE = {"num_layers": 1, "dim": 32, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": BINS}
INT2 = usm.QuantizationConfig(bits=2, scale="mse")

# name -> quantization, sparsity, arguments of export_litert, shape of an input, bits expected in the file
EXPORTS = {
    "int8": ("int8", None, {}, (1, 93, BINS), 8),
    "int4": ("int4", None, {"batch": None}, (3, 80, BINS), 4),
    "int4 2:4": ("int4", "2:4", {"batch": 2, "length": 64}, (2, 64, BINS), 4),
    "int4 1:4": ("int4", "1:4", {"sample_rate_input": 16000, "length": 16000}, (1, 16000), 4),
    "int2": (INT2, None, {}, (1, 64, BINS), 2),
    "int2 2:4": (INT2, "2:4", {"sample_rate_input": 16000, "batch": None}, (2, 30000), 2),
    "float": (None, None, {"length": 50}, (1, 50, BINS), 32),
}
ODD_KERNELS = {  # kernels without a LiteRT width of their own, one kind for each part of the model
    "ffn_start": (usm.QuantizationConfig(bits=3, scale="mse"), "2:4"),
    "ffn_end": (usm.QuantizationConfig(bits=2, scale="mse", codebook="midrise"), "2:4"),
    "attention": (usm.QuantizationConfig(bits=4, codebook="asymmetric"), "1:4"),
    "head": (usm.QuantizationConfig(bits=4, codebook="full", scale="learned", per_tensor=True), None),
}


def array(tensor):
    return ops.convert_to_numpy(tensor)


def prepared(model):
    """Larger weights than at the start of training, so that logits differ between frames; masks and scales made."""
    draw = np.random.default_rng(0)
    for weight in model.trainable_variables:
        weight.assign(array(weight) + 0.2 * draw.normal(size=weight.shape) * (weight.name in ("kernel", "bias")))
    usm.update_masks(model)
    for layer in usm.compressed_layers(model):
        layer.update_scale()
    return model


def recogniser(quantization=None, sparsity=None):
    keras.utils.set_random_seed(0)
    return prepared(usm.USMForCTC(VOCAB, quantization=quantization, sparsity=sparsity, **SIZE))


class Exported:
    """A model, the file made of it and the warnings on the way."""

    def __init__(self, model, path, **arguments):
        self.model, self.path, self.arguments = model, str(path), arguments
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert usm.export_litert(model, path, **arguments) == self.path
        self.warnings = [str(warning.message) for warning in caught if "stores" in str(warning.message)]
        self.weights = read_litert_weights(self.path)

    def integers(self):
        """`(layer, its integers [outputs, inputs], its scale, weight in the file)` of every compressed layer.

        For a fixed length the converter moves the factor 1/2 of a feed-forward module into its last kernel.
        """
        for layer in usm.compressed_layers(self.model):
            codes, scale, *zero_point = (array(part) for part in layer.quantized_kernel())
            integers = (codes - zero_point[0] if zero_point else codes).T
            scale = scale[0] / 2 if "length" in self.arguments and layer.name == "down" else scale[0]
            (weight,) = (weight for weight in self.weights if np.array_equal(weight.codes, integers))
            yield layer, integers, scale, weight


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder, done = tmp_path_factory.mktemp("exports"), {}

    def export(name):
        if name not in done:
            path = folder / f"{name.replace(':', '_')}.tflite"
            if name == "odd":
                done[name] = Exported(prepared(usm.compress(recogniser(), ODD_KERNELS)), path)
            else:
                quantization, sparsity, arguments, *_ = EXPORTS[name]
                done[name] = Exported(recogniser(quantization, sparsity), path, **arguments)
        return done[name]

    return export


def inputs_of(shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32") * (0.1 if len(shape) == 2 else 1)


def run(path, inputs):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path)
    (detail,) = interpreter.get_input_details()
    if -1 in detail["shape_signature"]:
        interpreter.resize_tensor_input(detail["index"], inputs.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(detail["index"], inputs)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def keras_logits(model, inputs):
    return array(model(usm.LogMel(BINS)(inputs) if inputs.ndim == 2 else inputs))


def relative_error(logits, expected):
    """Root mean square of the difference, against the spread of the logits."""
    return np.sqrt(np.mean((logits - expected) ** 2)) / expected.std()


@pytest.mark.parametrize("name", [name for name in EXPORTS if name != "float"])
def test_the_file_holds_exactly_the_trained_integers(exported, name):
    *_, bits = EXPORTS[name]
    assert not exported(name).warnings
    found = []
    for layer, integers, scale, weight in exported(name).integers():
        np.testing.assert_allclose(weight.scale, scale, rtol=1e-6)
        np.testing.assert_array_equal(weight.values, integers * weight.scale[:, None])
        assert weight.bits == bits == layer.quantization.bits
        found.append(id(weight))
    assert len(set(found)) == 11


@pytest.mark.parametrize("name", EXPORTS)
def test_what_is_not_quantized_stays_float(exported, name):
    export = exported(name)
    weights = [weight for weight in export.weights if weight.operation == "FULLY_CONNECTED"]
    floats = [weight for weight in weights if weight.bits == 32]
    assert {weight.bits for weight in export.weights if weight.operation != "FULLY_CONNECTED"} == {32}
    compressed = len(usm.compressed_layers(export.model))
    assert compressed == (0 if name == "float" else 11)
    front_end = "sample_rate_input" in export.arguments  # one more matrix product: power spectrum to mel bins
    assert len(floats) == len(weights) - compressed == 12 - compressed + front_end
    head = array(export.model.head.kernel).T
    assert any(np.array_equal(weight.values, head) for weight in floats)


@pytest.mark.parametrize("name", [name for name in EXPORTS if ":" in name])
def test_the_integers_in_the_file_obey_the_pattern(exported, name):
    n, m = (int(part) for part in EXPORTS[name][1].split(":"))
    for layer, _, _, weight in exported(name).integers():
        non_zero = np.count_nonzero(weight.codes.reshape(layer.units, -1, m), axis=2)
        assert non_zero.max() <= n


@pytest.mark.parametrize("name", [*EXPORTS, "odd"])
def test_every_operation_is_built_in(exported, name):
    from ai_edge_litert import schema_py_generated as schema

    with open(exported(name).path, "rb") as file:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(file.read(), 0))
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    assert schema.BuiltinOperator.FULLY_CONNECTED in codes and schema.BuiltinOperator.CUSTOM not in codes
    assert all(code.customCode is None for code in model.operatorCodes)  # Flex operations are custom ones


@pytest.mark.parametrize("name", EXPORTS)
def test_the_file_declares_the_shape_that_was_asked_for(exported, name):
    from ai_edge_litert.interpreter import Interpreter

    arguments = exported(name).arguments
    audio = "sample_rate_input" in arguments
    expected = [arguments.get("batch", 1) or -1, arguments.get("length", -1), *([] if audio else [BINS])]
    (detail,) = Interpreter(exported(name).path).get_input_details()
    assert detail["shape_signature"].tolist() == expected and detail["dtype"] is np.float32
    assert ("audio" if audio else "features") in detail["name"]


@pytest.mark.parametrize("name", EXPORTS)
def test_the_runtime_computes_the_logits_of_the_keras_model(exported, name):
    *_, shape, bits = EXPORTS[name]
    inputs = inputs_of(shape)
    expected = keras_logits(exported(name).model, inputs)
    logits = run(exported(name).path, inputs)
    assert logits.shape == expected.shape
    # An integer file rounds every activation to int8, 1/254 of the largest in its frame at most, eleven times over.
    assert relative_error(logits, expected) < (1e-5 if bits == 32 else 0.02)
    assert np.mean(logits.argmax(axis=-1) == expected.argmax(axis=-1)) > 0.9


def test_a_dynamic_file_hears_utterances_of_any_length_and_number(exported):
    for name, shapes in {"int4": [(1, 17, BINS), (4, 120, BINS)], "int2 2:4": [(1, 9000), (3, 40000)]}.items():
        for shape in shapes:
            inputs = inputs_of(shape)
            expected = keras_logits(exported(name).model, inputs)
            assert relative_error(run(exported(name).path, inputs), expected) < 0.02


def test_narrower_kernels_make_a_smaller_file(exported):
    sizes = [os.path.getsize(exported(name).path) for name in ("int8", "int4", "int2")]
    weights = sum(layer.kernel.shape[0] * layer.units for layer in usm.compressed_layers(exported("int8").model))
    assert sizes[0] - sizes[1] == pytest.approx(weights * 4 / 8, rel=0.2)
    assert sizes[1] - sizes[2] == pytest.approx(weights * 2 / 8, rel=0.2)


def test_kernels_without_a_width_of_their_own_take_the_next_one_with_one_warning_each(exported):
    export = exported("odd")
    bits = {"ffn_start": 4, "ffn_end": 4, "attention": 8, "head": 4}
    counts = dict.fromkeys(bits, 0)
    for layer, _, scale, weight in export.integers():
        (part,) = (part for part in bits if part in layer.path)
        np.testing.assert_allclose(weight.scale, np.broadcast_to(scale, weight.scale.shape), rtol=1e-6)
        assert weight.bits == bits[part]
        counts[part] += 1
    assert counts == {"ffn_start": 2, "ffn_end": 2, "attention": 4, "head": 1}
    assert [message.partition(": ")[2] for message in export.warnings] == [
        "stores asymmetric 4-bit codes as 8-bit integers, the next width LiteRT can run.",
        "stores midrise 2-bit codes as 4-bit integers, the next width LiteRT can run.",
        "stores symmetric 3-bit codes as 4-bit integers, the next width LiteRT can run.",
    ]
    inputs = inputs_of((1, 60, BINS))
    assert relative_error(run(export.path, inputs), keras_logits(export.model, inputs)) < 0.02


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_one_wrong_integer_in_the_file_is_noticed(exported, name, tmp_path):
    export = exported(name)
    kernels = litert.litert_kernels(export.model)
    litert.check_integers(export.path, kernels)
    path = tmp_path / "corrupt.tflite"
    path.write_bytes(with_one_bit_flipped(export.path, next(export.integers())[-1]))
    with pytest.raises(RuntimeError, match=r"does not hold the \d-bit integers of layer '.*projection'"):
        litert.check_integers(path, kernels)


def with_one_bit_flipped(path, weight):
    """Content of the file with the last bit of one integer of a weight flipped; low bits of a byte come first."""
    with open(path, "rb") as file:
        content = bytearray(file.read())
    fields = weight.codes.reshape(-1, 8 // weight.bits).astype(np.uint8) & ((1 << weight.bits) - 1)
    packed = (fields << np.arange(0, 8, weight.bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8).tobytes()
    assert content.count(packed) == 1
    content[content.index(packed) + len(packed) // 2] ^= 1
    return bytes(content)


def test_an_export_that_goes_wrong_leaves_the_older_file_alone(exported, tmp_path, monkeypatch):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"older")
    weight = next(exported("int8").integers())[-1]
    wrong = with_one_bit_flipped(exported("int8").path, weight)
    monkeypatch.setattr(litert, "_recover_integers", lambda *_: wrong)  # a converter that makes a mistake
    with pytest.raises(RuntimeError, match="does not hold"):
        usm.export_litert(exported("int8").model, path)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_a_kernel_that_does_not_reach_the_file_is_reported(tmp_path):
    class WithUnusedLayer(usm.USMForCTC):
        def build(self, input_shape=None):
            if not self.built:
                self.unused = usm.QuantDense(4, "int4", name="unused")
                self.unused.build((None, 8))
                super().build(input_shape)

    model = WithUnusedLayer(VOCAB, **SIZE)
    with pytest.raises(RuntimeError, match=r"removed the kernels of \[.*unused.*not in the float \.tflite file"):
        usm.export_litert(model, tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


def test_what_litert_cannot_run_is_refused_with_the_fix(tmp_path):
    path = tmp_path / "model.tflite"
    blocks = usm.QuantizationConfig(bits=4, form="fake", block_size=16)
    with pytest.raises(ValueError, match="projection' has one scale per 16 inputs.*block_size=None.*save_packed"):
        usm.export_litert(recogniser(blocks), path)
    asymmetric = usm.QuantizationConfig(bits=8, codebook="asymmetric")
    with pytest.raises(ValueError, match="integers from -128.*hold -127 to 127.*codebook='symmetric'.*save_packed"):
        usm.export_litert(recogniser(asymmetric), path)
    with pytest.raises(ValueError, match="model.bin' must end in '.tflite'"):
        usm.export_litert(recogniser(), tmp_path / "model.bin")
    with pytest.raises(FileNotFoundError, match="no such folder.*nowhere"):
        usm.export_litert(recogniser(), tmp_path / "nowhere" / "model.tflite")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_what_was_trained_in_sixteen_bits_is_exported_in_float32_with_its_integers(policy, tmp_path):
    keras.utils.set_random_seed(0)
    half = prepared(usm.USMForCTC(VOCAB, quantization="int4", sparsity="2:4", dtype=policy, **SIZE))
    full = usm.USMForCTC(VOCAB, quantization="int4", sparsity="2:4", **SIZE)
    full.set_weights(half.get_weights())
    path = usm.export_litert(half, tmp_path / "half.tflite")
    other = usm.export_litert(full, tmp_path / "full.tflite")
    for ours, theirs in zip(read_litert_weights(path), read_litert_weights(other), strict=True):
        np.testing.assert_array_equal(ours.codes, theirs.codes)
        np.testing.assert_array_equal(ours.values, theirs.values)


def test_masks_that_were_never_made_are_pointed_out(tmp_path):
    model = usm.USMForCTC(VOCAB, quantization="int4", sparsity="2:4", **SIZE)
    with pytest.warns(UserWarning, match=r"sparse layers do not obey .* is not 2:4\. Train with .*update_masks"):
        usm.export_litert(model, tmp_path / "model.tflite")
