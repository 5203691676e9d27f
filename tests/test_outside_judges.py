"""Other people's tools agree with ours: TensorFlow Model Optimization on N:M masks, ai-edge-quantizer on integers.

Each judge runs in a process of its own: importing TensorFlow Model Optimization switches TensorFlow to the old Keras.
"""

import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.core.nm_mask import nm_mask

PATTERNS = ("2:4", "1:4", "4:8")
SIZE = {"num_layers": 1, "dim": 32, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": 16}


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


# tfmot counts zeros, (zeros, group), and works along the last axis
NM_MASKS = """
import tensorflow as tf
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_utils import generate_m_by_n_mask
for name, kernel in questions.items():
    n, m = (int(part) for part in name.split(":"))
    answers[name] = generate_m_by_n_mask(tf.constant(kernel.T), (m - n, m)).numpy().T
"""
IS_PRUNED = """
import tensorflow as tf
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_utils import is_pruned_m_by_n
for name, kernel in questions.items():
    layout, pattern, _ = name.split(" ", 2)
    n, m = (int(part) for part in pattern.split(":"))
    answers[name] = is_pruned_m_by_n(tf.constant(kernel), (m - n, m), last_channel=layout)
"""
IS_PRUNED_FILE = """
import tensorflow as tf
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_utils import is_pruned_m_by_n
interpreter = tf.lite.Interpreter(str(questions["path"]))  # it unpacks four-bit tensors to int8
interpreter.allocate_tensors()
for detail in interpreter.get_tensor_details():
    if detail["dtype"] is np.int8 and len(detail["shape"]) == 2:
        answers[detail["name"]] = is_pruned_m_by_n(tf.constant(interpreter.get_tensor(detail["index"])), (2, 4), "C_IN")
"""
QWIX_MASKS = """
from qwix._src.core.sparsity import prune_inputs_n_m
for name, kernel in questions.items():
    n, m = (int(part) for part in name.split(":"))
    answers[name] = np.asarray(prune_inputs_n_m(kernel, n=n, m=m, order="C")) != 0
"""
RECOVERED_SCALES = """
from ai_edge_quantizer.algorithms.uniform_quantize import dequantized_weight_recovery as recovery
for name, kernel in questions.items():
    zero_point, scale = recovery.get_zp_scale_from_dequantized_symmetric_weights(kernel.T, quantized_dimension=0)
    answers[f"{name} zero point"], answers[f"{name} scale"] = zero_point.T, scale.T
"""


def ask(judge, folder, **questions):
    """Run a judge on arrays and return its answers, arrays too."""
    np.savez(folder / "questions.npz", **questions)
    code = f"import sys\nimport numpy as np\nquestions, answers = np.load(sys.argv[1]), {{}}\n{judge}"
    code += "\nnp.savez(sys.argv[2], **answers)"
    command = [sys.executable, "-c", code, folder / "questions.npz", folder / "answers.npz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "answers.npz") as answers:
        return dict(answers)


def array(tensor):
    return ops.convert_to_numpy(tensor)


def layer_with(quantization, sparsity=None, inputs=64, units=10):
    keras.utils.set_random_seed(0)
    layer = usm.QuantDense(units, quantization=quantization, sparsity=sparsity)
    layer.build((None, inputs))
    if sparsity:
        layer.update_mask()
    layer.update_scale()
    return layer


@needs("tensorflow_model_optimization")
def test_tfmot_makes_the_same_masks(tmp_path):
    draw = np.random.default_rng(0)
    kernels = {pattern: draw.normal(size=(64, 24)).astype("float32") for pattern in PATTERNS}
    masks = ask(NM_MASKS, tmp_path, **kernels)
    assert sorted(masks) == sorted(PATTERNS)
    for pattern, kernel in kernels.items():
        n, m = (int(part) for part in pattern.split(":"))
        np.testing.assert_array_equal(array(nm_mask(np.abs(kernel), n, m)), masks[pattern])


@needs("qwix")
def test_qwix_makes_the_same_masks(tmp_path):
    draw = np.random.default_rng(1)
    kernels = {pattern: draw.normal(size=(64, 24)).astype("float32") for pattern in PATTERNS}
    for pattern, mask in ask(QWIX_MASKS, tmp_path, **kernels).items():
        n, m = (int(part) for part in pattern.split(":"))
        np.testing.assert_array_equal(array(nm_mask(np.abs(kernels[pattern]), n, m)), mask)


@needs("tensorflow_model_optimization")
def test_tfmot_accepts_effective_kernels_and_no_others(tmp_path):
    good, bad = {}, {}
    for pattern in PATTERNS:
        for quantization in ("int8", "int4", usm.QuantizationConfig(bits=2, scale="mse"), None):
            kernel = array(layer_with(quantization, pattern).effective_kernel())
            good[f"C_OUT {pattern} {quantization}"] = kernel
        bad[f"C_OUT {pattern} dense"] = array(layer_with("int8").effective_kernel())
        one_too_many = kernel.copy()
        one_too_many[np.flatnonzero(kernel[:, 0] == 0)[0], 0] = 1.0
        bad[f"C_OUT {pattern} one too many"] = one_too_many
        bad[f"C_IN {pattern} wrong axis"] = kernel
    verdicts = ask(IS_PRUNED, tmp_path, **good, **bad)
    assert {name for name, verdict in verdicts.items() if verdict} == set(good)
    assert {name for name, verdict in verdicts.items() if not verdict} == set(bad)


@needs("tensorflow_model_optimization")
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="export needs the TensorFlow backend")
def test_tfmot_finds_the_pattern_in_a_litert_file(tmp_path):
    keras.utils.set_random_seed(0)
    left_out = {"depthwise|subsampling/conv": (None, None)}
    sparse = {"subsampling|attention|conv": ("int8", "2:4"), "ffn": ("int4", "2:4"), "head": ("int8", None)}
    model = usm.compress(usm.USMForCTC(9, **SIZE), {**left_out, **sparse})
    usm.update_masks(model)
    path = usm.export_litert(model, tmp_path / "model.tflite")
    verdicts = ask(IS_PRUNED_FILE, tmp_path, path=np.array(path))
    dense = {name for name, verdict in verdicts.items() if not verdict}
    assert len(verdicts) == 12 and len(dense) == 1 and "head" in dense.pop()


@needs("ai_edge_quantizer")
def test_ai_edge_quantizer_recovers_scales_and_integers_from_effective_kernels(tmp_path):
    layers = {
        "int8": layer_with("int8", inputs=1024),
        "int4": layer_with("int4"),
        "int4 2:4": layer_with("int4", "2:4"),
        "int4 full": layer_with(usm.QuantizationConfig(bits=4, codebook="full", scale="mse")),
        "int3 1:4": layer_with("int3", "1:4"),
        "int2 2:4": layer_with(usm.QuantizationConfig(bits=2, scale="mse"), "2:4"),
    }
    kernels = {name: array(layer.effective_kernel()) for name, layer in layers.items()}
    answers = ask(RECOVERED_SCALES, tmp_path, **kernels)
    for name, layer in layers.items():
        codes, scale = (array(part) for part in layer.quantized_kernel())
        assert not answers[f"{name} zero point"].any()
        np.testing.assert_allclose(answers[f"{name} scale"], scale, rtol=1e-4, err_msg=name)
        np.testing.assert_array_equal(np.round(kernels[name] / answers[f"{name} scale"]), codes, err_msg=name)


@needs("tensorflow_model_optimization")
def test_tfmot_schedules_drive_our_pruning(tmp_path):
    """Final sparsity 0.75 counts zeros: groups of four keep 4, 3, 2, 2, 1, never fewer."""
    code = """
import keras, numpy as np, keras_usm_lite as usm
from tensorflow_model_optimization.sparsity.keras import ConstantSparsity, PolynomialDecay
def kept(schedule):
    model = keras.Sequential([keras.Input((8,)), usm.NMSparseDense(2, "1:4")])
    model.compile("sgd", "mse")
    seen = []
    def look(batch, logs=None):
        seen.append(int(4 * np.mean(model.layers[0].mask)))
    pruning = usm.callbacks.NMPruning(schedule=schedule)
    looking = keras.callbacks.LambdaCallback(on_train_batch_begin=look)
    model.fit(np.ones((12, 8)), np.ones((12, 2)), batch_size=1, verbose=0, callbacks=[pruning, looking])
    return seen
linear = PolynomialDecay(0.0, 0.75, begin_step=2, end_step=10, power=1, frequency=2)
assert kept(linear) == [4] * 4 + [4, 4, 3, 3, 2, 2, 1, 1], kept(linear)
assert kept(ConstantSparsity(0.5, begin_step=3, frequency=4)) == [4] * 3 + [2] * 9
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": "tensorflow"}
    )
    assert done.returncode == 0, done.stderr[-2000:]


@needs("ai_edge_litert")
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="export needs the TensorFlow backend")
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_dynamic_activations_are_those_of_litert_to_rounding(bits, tmp_path):
    """Trained with activations="dynamic", the layer gives what LiteRT's integer kernel gives; without, it does not."""
    from ai_edge_litert.interpreter import Interpreter

    def outputs(activations):
        config = usm.QuantizationConfig(bits, scale="mse", activations=activations)
        model = keras.Sequential([keras.Input((None, 64)), usm.QuantDense(48, config)])
        model.layers[0].kernel.assign(np.random.default_rng(0).normal(size=(64, 48)))
        model.layers[0].update_scale()
        return model, array(model(inputs))

    rng = np.random.default_rng(1)
    inputs = (rng.normal(size=(1, 50, 64)) * rng.uniform(0.01, 30, size=(1, 50, 1)) + 0.3).astype("float32")
    model, simulated = outputs("dynamic")
    interpreter = Interpreter(usm.export_litert(model, tmp_path / "dense.tflite"))
    detail = interpreter.get_input_details()[0]
    interpreter.resize_tensor_input(detail["index"], inputs.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(detail["index"], inputs)
    interpreter.invoke()
    served = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    size = np.abs(served).max(axis=-1, keepdims=True)
    exact, rounded = np.abs(outputs(None)[1] - served) / size, np.abs(simulated - served) / size
    assert np.median(rounded) < 1e-6 and np.median(exact) > 1e-4
    assert np.mean(rounded > 1e-5) < 0.01  # a value half way between two codes may fall to the other side
