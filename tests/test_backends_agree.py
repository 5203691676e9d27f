"""TensorFlow, JAX and PyTorch compute the same: masks bit for bit, logits, text and one training step."""

import importlib.util
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_usm_lite as usm

BINS, VOCAB = 16, 9
LENGTHS = np.array([64, 50, 33], "int32")
LABELS = np.array([[1, 2, 3, 3, 4], [5, 6, 0, 0, 0], [7, 8, 8, 0, 0]], "int32")

SIZE = {"num_layers": 1, "dim": 32, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": BINS}
COMPRESSION = {"quantization": "int4", "sparsity": "2:4"}

RUN = """
import json
import sys
import keras
import numpy as np
import keras_usm_lite as usm
from keras_usm_lite.decoding import greedy_decode

array = keras.ops.convert_to_numpy
data, results = np.load(sys.argv[1]), {}
model = keras.saving.deserialize_keras_object(json.loads(str(data["model"])))
for weight in model.weights:
    weight.assign(data[weight.path])
usm.update_masks(model)
for layer in usm.compressed_layers(model):
    results[f"mask {layer.path}"] = array(layer.mask)
    results[f"codes {layer.path}"] = array(layer.quantized_kernel()[0])
batch, labels = {"features": data["features"], "lengths": data["lengths"]}, data["labels"]

def listen(moment):
    logits = model(batch)
    results[f"logits {moment}"] = array(logits)
    results[f"text {moment}"] = np.array(str(greedy_decode(logits)))
    results[f"loss {moment}"] = array(keras.losses.CTC()(labels, logits))

listen("before")
model.compile(keras.optimizers.SGD(0.01), loss=keras.losses.CTC())
results["loss reported"] = np.array(model.train_on_batch(batch, labels))
listen("after")
results["backend"] = np.array(keras.backend.backend())
np.savez(sys.argv[2], **results)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each installed backend computes from the same weights, in a process of its own."""
    folder = tmp_path_factory.mktemp("backends")
    model = usm.USMForCTC(VOCAB, dropout=0.0, spec_augment=False, name="listener", **SIZE, **COMPRESSION)
    draw = np.random.default_rng(0)
    weights = {}
    for weight in model.weights:
        value = keras.ops.convert_to_numpy(weight)
        noise = 0.2 * draw.normal(size=value.shape) if weight.trainable else 0
        weights[weight.path] = (value + noise).astype("float32")
    features = draw.normal(size=(3, 64, BINS)).astype("float32")
    config = json.dumps(keras.saving.serialize_keras_object(model))
    np.savez(folder / "data.npz", model=config, features=features, lengths=LENGTHS, labels=LABELS, **weights)
    found = {}
    for backend in ("tensorflow", "jax", "torch"):
        if importlib.util.find_spec(backend) is None:
            continue
        command = [sys.executable, "-c", RUN, folder / "data.npz", folder / f"{backend}.npz"]
        root = os.path.dirname(os.path.dirname(usm.__file__))
        environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": root}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{backend}: {done.stderr}"
        with np.load(folder / f"{backend}.npz") as file:
            found[backend] = dict(file)
        assert str(found[backend]["backend"]) == backend
    if len(found) < 2:
        pytest.skip("only one backend is installed")
    return found


def compared(results, kind):
    """`(name, values of all backends)` of every result of a kind."""
    names = [name for name in next(iter(results.values())) if name.startswith(kind)]
    assert names
    for name in names:
        yield name, [result[name] for result in results.values()]


@pytest.mark.parametrize("kind", ["mask", "codes"])
def test_masks_and_integers_are_identical(results, kind):
    pairs = list(compared(results, kind))
    assert len(pairs) == 11
    for name, (first, *others) in pairs:
        assert 0 < np.count_nonzero(first) <= first.size / 2
        for other in others:
            np.testing.assert_array_equal(other, first, err_msg=name)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_logits_agree_before_and_after_a_training_step(results, moment):
    ((_, (first, *others)),) = compared(results, f"logits {moment}")
    assert first.shape == (3, 16, VOCAB) and first[0].std() > 0.1
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-4, atol=1e-4)


def test_losses_agree_and_the_training_step_lowers_them(results):
    for name, (first, *others) in compared(results, "loss"):
        np.testing.assert_allclose(others, first, rtol=1e-4, err_msg=name)
    for result in results.values():
        np.testing.assert_allclose(result["loss reported"], result["loss before"], rtol=1e-4)
        assert result["loss after"] < 0.99 * result["loss before"]


def test_the_greedy_text_is_the_same(results):
    ((_, texts),) = compared(results, "text before")  # after a step, ties of an untrained model may break differently
    assert len({str(text) for text in texts}) == 1
    assert any(character.isdigit() for character in str(texts[0]))
