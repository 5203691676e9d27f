"""examples/train_distributed.py: two devices or processes, killed or not, train what one device trains."""

import contextlib
import importlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import types
import zipfile

import keras
import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.manifest import Utterance, write_manifest

if keras.backend.backend() == "torch":
    pytest.skip("Keras distributes on TensorFlow and JAX", allow_module_level=True)

ROOT = pathlib.Path(__file__).parents[2]
EPOCHS = 4  # of 5 batches
OPTIONS = ["--epochs", str(EPOCHS), "--batch-frames", "320"]

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

# Before it: copy the backup of epoch 2 to another output, where it is what a process that died then would have left.
COPY = """
import shutil, sys
from keras_usm_lite.callbacks import Backup

write = Backup.save

def save(backup, epoch):
    write(backup, epoch)
    if epoch == 2:
        shutil.copytree(sys.argv[1] + "/backup-0", sys.argv[1] + "/killed/backup-0")

Backup.save = save
"""

# Before it: die where the backup of epoch 2 is written, process 0 after writing it, the others before.
DIE = """
import os, signal
from keras_usm_lite.callbacks import Backup

write = Backup.save

def save(backup, epoch):
    if epoch < 2 or backup.path.endswith("backup-0/training.zip"):
        write(backup, epoch)
    if epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Backup.save = save
"""

# Before it: send a backup in many pieces.
SMALL_CHUNKS = """
from keras_usm_lite import distribution

distribution.CHUNK = 1 << 16
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


@pytest.fixture(scope="module")
def float_model(corpus, tmp_path_factory):
    """A float model for the labels of the corpus."""
    folder = tmp_path_factory.mktemp("float")
    task = usm.data.SpeechTask.prepare(usm.data.open_corpus(corpus), cache_dir=folder / "features")
    size = {"num_layers": 1, "dim": 16, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "dropout": 0.0}
    keras.utils.set_random_seed(0)
    usm.USMForCTC(task.tokenizer.vocab_size, spec_augment=False, **size).save(folder / "float.keras")
    return folder / "float.keras"


@pytest.fixture(scope="module")
def jax_alone(corpus, float_model, tmp_path_factory):
    """What one JAX device trains of the float model."""
    output = tmp_path_factory.mktemp("alone")
    return finish(output, start(corpus, output, "--engine", "jax", "--float-model", float_model))


def start(corpus, output, *options, before=""):
    output.mkdir(exist_ok=True)
    options = ["--data", corpus, "--output", output, *OPTIONS, *options]
    environment = {
        **os.environ,
        "KERAS_BACKEND": keras.backend.backend(),
        "KERAS_USM_LITE_HOME": str(output),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0"),  # compiles twice as fast
    }
    command = [str(part) for part in [sys.executable, "-c", before + RUN, output, *options]]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_two(corpus, output, float_model, *options, before=""):
    """The two JAX processes of one training."""
    options = [
        *options,
        "--float-model",
        float_model,
        "--engine",
        "jax-multihost",
        "--coordinator",
        f"localhost:{free_port()}",
    ]
    options += ["--processes", 2, "--process"]
    return [start(corpus, output, *options, number, before=before) for number in (0, 1)]


def finish(output, *processes):
    """Wait for the processes of a training; return its losses and weights."""
    for process in processes:
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text[-3000:]
    assert not list(output.glob("backup-*")), "the model is written, the backup can go"
    with np.load(output / "found.npz") as found:
        return dict(found)


def die(output, *processes):
    """Wait for the processes of a training that is killed; return the epochs of their backups."""
    for process in processes:
        text, _ = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, text[-3000:]
    assert not (output / "model.keras").exists()
    return [epoch_of(output / f"backup-{number}" / "training.zip") for number in range(len(processes))]


def epoch_of(backup):
    with zipfile.ZipFile(backup) as archive:
        return json.loads(archive.read("training.json"))["epoch"]


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


on_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's")
on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution needs the JAX backend")


@on_tensorflow
def test_mirrored_on_two_devices_and_killed_in_between_trains_what_one_device_trains(corpus, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--no-spec-augment", "--engine", "mirrored", "--cpu-devices"]
    processes = start(corpus, one, *options, 1), start(corpus, two, *options, 2, before=COPY)
    alone, together = finish(one, processes[0]), finish(two, processes[1])
    assert_same_training(together, alone)
    assert epoch_of(two / "killed" / "backup-0" / "training.zip") == 2
    continued = finish(two / "killed", start(corpus, two / "killed", *options, 2))
    assert_same_training(continued, together)


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script as a module; what it sets in the environment is taken back."""
    monkeypatch.setenv("KERAS_USM_LITE_HOME", str(tmp_path))
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("train_distributed")


@pytest.fixture
def until_model(script, monkeypatch):
    """The exception with which the script ends where it would make the model."""

    class Reached(Exception):
        pass

    def reach(*_):
        raise Reached

    monkeypatch.setattr(script, "make_model", reach)
    return Reached


def test_a_float_model_is_what_the_compressed_copy_begins_with_in_the_scope_of_an_engine(script, corpus, float_model):
    scope = contextlib.nullcontext()
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        scope = tf.distribute.MirroredStrategy(["/cpu:0"]).scope()
    args = script.parse_arguments(["--engine", "mirrored", "--data", str(corpus), "--float-model", str(float_model)])
    task = script.prepare_data(usm, script.Engine(scope, copies=1), args)
    begin = script.read_float_model(usm, keras, task, args)
    with scope:
        model = script.make_model(usm, keras, task.tokenizer.vocab_size, begin, 10, args)
    assert {(layer.active_bits, str(layer.sparsity)) for layer in usm.compressed_layers(model)} == {(4, "2:4")}
    kept = {weight.path.partition("/")[2]: weight for weight in model.weights}
    for weight in keras.models.load_model(float_model).weights:
        now = kept[weight.path.partition("/")[2]]
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (now, weight)))


def test_a_fine_tuning_has_half_the_rate_and_a_short_warm_up(script, corpus, float_model):
    options = ["--engine", "mirrored", "--data", str(corpus)]
    new, old = (script.parse_arguments([*options, *more]) for more in ([], ["--float-model", str(float_model)]))
    task = script.prepare_data(usm, script.Engine(contextlib.nullcontext(), copies=1), old)
    begin = script.read_float_model(usm, keras, task, old)
    peaks = []
    for args, model in ((new, None), (old, begin)):
        optimizer = script.make_model(usm, keras, task.tokenizer.vocab_size, model, 100, args).optimizer
        rates = [float(optimizer._learning_rate(step)) for step in range(100)]
        peaks.append((int(np.argmax(rates)), round(max(rates), 6)))
    assert peaks == [(50, 0.002), (10, 0.001)]


def test_a_float_model_is_known_by_its_content_and_one_that_is_refused_leaves_the_folder_free(
    script, corpus, float_model, tmp_path, until_model
):
    options = ["--engine", "mirrored", "--data", str(corpus), "--output", str(tmp_path / "run"), *OPTIONS]
    path = tmp_path / "float.keras"
    usm.USMForCTC(9, num_layers=1, dim=16, num_heads=2, kernel_size=3).save(path)
    with pytest.raises(SystemExit, match="other labels"):
        script.main([*options, "--float-model", str(path)])
    path.write_bytes(float_model.read_bytes())
    for same in (path, float_model):
        with pytest.raises(until_model):
            script.main([*options, "--float-model", str(same)])
    usm.USMForCTC(4, num_layers=1, dim=16, num_heads=2, kernel_size=3, spec_augment=False).save(path)
    with pytest.raises(SystemExit, match="other arguments .float_model [0-9]+, now [0-9]+"):
        script.main([*options, "--float-model", str(path)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--float-model", "/nowhere/float.keras"], "there is no file '/nowhere/float.keras'"),
        (["--float-model", __file__, "--remat"], "--remat: it is of a new model; leave it or --float-model out"),
        (["--float-model", __file__, "--preset", "tiny"], "--preset: it is of a new model"),
    ],
)
def test_a_float_model_that_is_not_there_or_asked_to_be_another_is_refused(script, options, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(["--engine", "mirrored", *options])
    assert message in capsys.readouterr().err


@on_tensorflow
def test_a_finished_run_is_left_alone_and_one_with_other_arguments_is_not_continued(
    script, corpus, tmp_path, until_model, monkeypatch
):
    options = ["--engine", "mirrored", "--data", str(corpus), "--output", str(tmp_path / "run"), *OPTIONS]
    for _ in range(2):
        with pytest.raises(until_model):
            script.main(options)
    with pytest.raises(SystemExit, match="other arguments .learning_rate 0.002, now 0.001"):
        script.main([*options, "--learning-rate", "0.001"])
    monkeypatch.setitem(script.ENGINES, "mirrored", lambda _: script.Engine(contextlib.nullcontext(), copies=16))
    with pytest.raises(SystemExit, match="other arguments .batches_per_epoch 5, now 3"):
        script.main(options)
    (tmp_path / "run" / "model.keras").write_bytes(b"trained")
    assert script.main(options) is None
    assert (tmp_path / "run" / "model.keras").read_bytes() == b"trained"


@on_tensorflow
def test_a_tpu_gets_every_recording_in_batches_of_one_shape(script, corpus):
    import tensorflow as tf

    engine = script.Engine(contextlib.nullcontext(), copies=8, static=True)
    task = script.prepare_data(usm, engine, types.SimpleNamespace(data=str(corpus), batch_frames=320, seed=0))
    dataset = script.feed(usm, keras, task.batches["train"], engine)
    (length,) = {frames for _, frames in task.batches["train"].bucket_shapes}
    shapes = [spec.shape for spec in tf.nest.flatten(dataset.element_spec)]
    assert all(shape.is_fully_defined() and shape[0] == 8 for shape in shapes) and length in shapes[0]
    assert sum(weight.sum() for _, _, weight in dataset.as_numpy_iterator()) == 37


@on_jax
def test_two_jax_processes_killed_with_backups_of_different_epochs_train_what_one_trains(
    corpus, float_model, tmp_path, jax_alone
):
    assert die(tmp_path, *start_two(corpus, tmp_path, float_model, before=DIE)) == [2, 1]
    resumed = start_two(corpus, tmp_path, float_model, before=SMALL_CHUNKS)
    assert_same_training(finish(tmp_path, *resumed), jax_alone)


@on_jax
def test_weights_split_over_two_processes_train_to_those_of_one(corpus, float_model, tmp_path, jax_alone):
    split = start_two(corpus, tmp_path, float_model, "--model-parallel", 2)
    assert_same_training(finish(tmp_path, *split), jax_alone)
