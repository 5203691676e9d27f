"""Four JAX devices, as copies or as shares of the model, train to what one device trains to."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.data.audio import write_wav
from keras_usm_lite.data.manifest import Utterance, write_manifest
from keras_usm_lite.distribution import check_same_data

if keras.backend.backend() != "jax":
    pytest.skip("keras.distribution needs the JAX backend", allow_module_level=True)

TRAINING = """
import sys
import keras, numpy as np
import keras_usm_lite as usm
from keras_usm_lite.distribution import conformer_layout

devices = keras.distribution.list_devices("cpu")
mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"], devices)
distributions = {
    "one": keras.distribution.DataParallel(devices=devices[:1]),
    "data": keras.distribution.DataParallel(devices=devices),
    "model": keras.distribution.ModelParallel(layout_map=conformer_layout(mesh), batch_dim_name="batch"),
}
draw = np.random.default_rng(0)
x = {"features": draw.normal(size=(16, 32, 16)).astype("float32"), "lengths": np.full(16, 32, "int32")}
y = draw.integers(1, 9, (16, 3)).astype("int32")

for engine, distribution in distributions.items():
    keras.utils.clear_session()  # forgets names, and the distribution
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = usm.USMForCTC(
        9, quantization="int4", sparsity="2:4", num_layers=1, dim=16, num_heads=2, kernel_size=3,
        subsampling_channels=4, num_mel_bins=16, dropout=0.0, spec_augment=False,
    )
    model.compile(keras.optimizers.SGD(0.01), loss=keras.losses.CTC())
    pruning = usm.callbacks.NMPruning(start_step=4)
    history = model.fit(x, y, batch_size=4, epochs=5, shuffle=False, verbose=0, callbacks=[pruning])
    up = model.encoder.blocks[0].ffn_start.up
    weights = {weight.path.replace("/", " "): np.array(weight.value) for weight in model.weights}
    shards = [shard.data.shape for shard in up.mask.value.addressable_shards]
    np.savez(f"{sys.argv[1]}/{engine}.npz", loss=history.history["loss"], shards=shards, **weights)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a training of each kind leaves."""
    folder = tmp_path_factory.mktemp("trained")
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "PYTHONPATH": os.path.dirname(os.path.dirname(usm.__file__)),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")
        + " --xla_force_host_platform_device_count=4",
    }
    done = subprocess.run([sys.executable, "-c", TRAINING, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {engine: dict(np.load(folder / f"{engine}.npz")) for engine in ("one", "data", "model")}


@pytest.mark.parametrize(("engine", "shards"), [("data", [[16, 64]] * 4), ("model", [[16, 32]] * 4)])
def test_twenty_steps_on_four_devices_give_the_weights_masks_and_scales_of_one(trained, engine, shards):
    alone, together = trained["one"], trained[engine]
    np.testing.assert_array_equal(together["shards"], shards)
    names = [name for name in alone if name != "shards"]
    assert len([name for name in names if name.endswith(" mask")]) == 11
    for name in names:
        if name.endswith(" mask"):
            np.testing.assert_array_equal(together[name], alone[name], err_msg=name)
        else:
            np.testing.assert_allclose(together[name], alone[name], rtol=1e-3, atol=1e-4, err_msg=name)


def prepared(tmp_path, texts=("up", "down"), seconds=0.4, **batching):
    """The `SpeechTask` of a small corpus in a folder of its own, as one host would prepare it."""
    folder, draw = tmp_path / f"host-{len(os.listdir(tmp_path))}", np.random.default_rng(0)
    folder.mkdir()
    for split in ("train", "dev", "test"):
        rows = []
        for number, text in enumerate(texts):
            rows.append(Utterance(str(folder / f"{split}-{number}.wav"), seconds, text, split))
            write_wav(rows[-1].path, 0.1 * draw.normal(size=int(16000 * seconds)))
        write_manifest(folder / f"{split}.tsv", rows)
    return usm.data.SpeechTask.prepare(usm.data.open_corpus(folder), cache_dir=folder / "features", **batching)


def test_processes_whose_data_differ_are_told_so_before_training_and_equal_ones_are_not(tmp_path, monkeypatch):
    from jax.experimental import multihost_utils

    sent = []
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda value: sent.append(value) or np.array([value]))
    both = [prepared(tmp_path, shard=(process, 2)) for process in (0, 1)]  # the same recordings elsewhere
    others = [
        prepared(tmp_path, texts=("up", "up")),
        prepared(tmp_path, texts=("up", "down", "up")),
        prepared(tmp_path, seconds=0.8),
        prepared(tmp_path, batch_frames=80),
    ]
    for task in (*both, *others):
        check_same_data(task)
    assert sent[0] == sent[1] and len({int(value[0]) for value in sent[1:]}) == 1 + len(others)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda value: np.array([sent[0], value, sent[2]]))
    with pytest.raises(
        ValueError, match=r"The corpus of the processes \[2\] is not that of process 0 .this process has 2"
    ):
        check_same_data(both[1])


def test_processes_that_begin_with_other_files_are_told_so(tmp_path, monkeypatch):
    from jax.experimental import multihost_utils

    sent, task, paths = [], prepared(tmp_path), [str(tmp_path / f"{number}.keras") for number in range(3)]
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda value: sent.append(value) or np.array([value]))
    for path, content in zip(paths, (b"weights", b"weights", b"others"), strict=True):
        pathlib.Path(path).write_bytes(content)
        check_same_data(task, [path])
    check_same_data(task, [str(tmp_path / "nothing.keras")])
    assert (sent[0] == sent[1]).all()
    for other in sent[2:]:
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda value, other=other: np.array([value, other]))
        with pytest.raises(ValueError, match=r"0.keras of the processes \[1\] is not that of process 0"):
            check_same_data(task, [paths[0]])
