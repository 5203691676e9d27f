"""examples/train_distributed.py: on two devices or in two processes it trains what one device trains."""

import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.manifest import Utterance, write_manifest

if keras.backend.backend() == "torch":
    pytest.skip("Keras distributes on TensorFlow and JAX", allow_module_level=True)

ROOT = pathlib.Path(__file__).parents[2]
EPOCHS = 4  # of 5 batches
OPTIONS = ["--epochs", str(EPOCHS), "--batch-frames", "320", "--no-spec-augment"]

# The script itself, with a model so small that it compiles soon.
RUN = """
import sys
import numpy as np
from keras_usm_lite.models.presets import PRESETS
import train_distributed

PRESETS["tiny"] = {"num_layers": 1, "dim": 16, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4,
                   "dropout": 0.0}
output, *arguments = sys.argv[1:]
losses = train_distributed.main(arguments).history
if "--process" not in arguments or arguments[-1] == "0":
    import keras

    keras.distribution.set_distribution(None)
    weights = keras.models.load_model(output + "/model.keras").weights
    np.savez(output + "/found.npz", **losses, **{weight.path.replace("/", " "): weight for weight in weights})
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Recordings of one length, for one compilation: four batches of 8 and one of 5 with empty rows."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    for split, size in {"train": 37, "dev": 3, "test": 1}.items():
        rows = []
        for number in range(size):
            path = str(folder / f"{split}-{number}.wav")
            write_wav(path, 0.1 * draw.normal(size=6400))
            rows.append(Utterance(path, 0.4, " ".join(draw.choice(["up", "down", "left"], 2)), split))
        write_manifest(folder / f"{split}.tsv", rows)
    return folder


def start(corpus, output, *options):
    output.mkdir(exist_ok=True)
    options = [*options[:2], "--data", corpus, "--output", output, *OPTIONS, *options[2:]]
    environment = {
        **os.environ,
        "KERAS_BACKEND": keras.backend.backend(),
        "KERAS_USM_LITE_HOME": str(output),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles twice as fast
    }
    command = [str(part) for part in [sys.executable, "-c", RUN, output, *options]]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(output, *processes):
    """Wait for the processes of a training; return its losses and weights."""
    for process in processes:
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text[-3000:]
    with np.load(output / "found.npz") as found:
        return dict(found)


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def assert_same_training(together, alone):
    """Losses and weights after 20 steps within 1e-4, masks exactly."""
    assert sorted(together) == sorted(alone) and len(alone["loss"]) == EPOCHS
    masks = [name for name in alone if name.endswith(" mask")]
    assert len(masks) == 11 and {alone[name].mean() for name in masks} == {0.5}
    for name, value in alone.items():
        if name in masks:
            np.testing.assert_array_equal(together[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(together[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute needs the TensorFlow backend")
def test_mirrored_on_two_devices_trains_what_one_device_trains(corpus, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    processes = [
        start(corpus, output, "--engine", "mirrored", "--cpu-devices", number)
        for number, output in ((1, one), (2, two))
    ]
    alone, together = finish(one, processes[0]), finish(two, processes[1])
    assert_same_training(together, alone)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution needs the JAX backend")
def test_two_jax_processes_train_what_one_trains(corpus, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--engine", "jax-multihost", "--coordinator", f"localhost:{free_port()}", "--processes", 2, "--process"]
    processes = [start(corpus, two, *options, number) for number in (0, 1)]
    alone = finish(one, start(corpus, one, "--engine", "jax"))
    assert_same_training(finish(two, *processes), alone)
