"""The whole training step is XLA's: one compilation for each bucket of utterances, none in later epochs."""

import json
import os
import subprocess
import sys

import keras
import pytest

import keras_usm_lite as usm

if keras.backend.backend() == "torch":
    pytest.skip("PyTorch does not compile with XLA", allow_module_level=True)

TRAINING = """
import json, os, sys
import keras, numpy as np
import keras_usm_lite as usm
from keras_usm_lite.optimizers.build_optimizer import build_optimizer

dump = sys.argv[1]

class Features(list):
    num_frames = property(lambda self: np.array([len(feature) for feature in self]))

def compilations():
    return [name for name in os.listdir(dump) if name.endswith("before_optimizations.txt")]

def steps():
    return sum("step" in name for name in compilations())

draw = np.random.default_rng(0)
features = Features(draw.normal(size=(frames, 16)).astype("float32") for frames in (20, 24, 30, 37, 40, 60))
labels = [[1, 2, 2], [3], [4, 5], [1], [6, 7, 8], []]
batches = usm.data.SpeechBatches(features, labels, batch_frames=64, num_buckets=2)
keras.utils.set_random_seed(0)
model = usm.USMForCTC(
    9, quantization="int4", sparsity=usm.SparsityConfig(2, 4, every_step=True), num_layers=1, dim=16, num_heads=2,
    kernel_size=3, subsampling_channels=4, num_mel_bins=16,
)
usm.compile_ctc(model, 1e-3, steps=8)
model.compile(model.optimizer, loss=model.loss, jit_compile=True)
build_optimizer(model)
found = {"buckets": len(batches.bucket_shapes), "batches": len(batches), "steps": [], "all": []}

def count(epoch, logs):
    found["steps"].append(steps())
    found["all"].append(len(compilations()))

loss = model.fit(
    batches, epochs=3, shuffle=False, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=count)]
).history["loss"]
found["finite"] = bool(np.isfinite(loss).all())
masks = [keras.ops.convert_to_numpy(layer.mask) for layer in usm.compressed_layers(model)]
found["kept"] = sorted({float(mask.mean()) for mask in masks})
model.train_on_batch({"features": np.ones((1, 48, 16), "float32"), "lengths": np.array([48], "int32")}, np.ones((1, 3)))
found["after a new shape"] = steps()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What XLA wrote down in three epochs of joint int4 + 2:4 training with SpecAugment, CTC and every-step masks."""
    dump = tmp_path_factory.mktemp("xla")
    environment = {
        **os.environ,
        "KERAS_BACKEND": keras.backend.backend(),
        "PYTHONPATH": os.path.dirname(os.path.dirname(usm.__file__)),
        # What is counted is compilations, not how well they optimise.
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")
        + f" --xla_dump_to={dump} --xla_dump_hlo_as_text",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a step found in the cache would not be counted
    done = subprocess.run([sys.executable, "-c", TRAINING, dump], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_bucket_is_compiled_once(found):
    assert found["batches"] > found["buckets"] == 2
    assert found["steps"][0] == found["buckets"]


def test_later_epochs_compile_nothing(found):
    assert found["all"][1:] == [found["all"][0]] * 2


def test_a_shape_of_no_bucket_would_be_noticed(found):
    assert found["after a new shape"] == found["steps"][-1] + 1


def test_masks_are_made_inside_the_compiled_step(found):
    assert found["kept"] == [0.5] and found["finite"]
