"""Two replicas train to what one device trains to: masks, bits, scales and weights."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("tf.distribute needs the TensorFlow backend", allow_module_level=True)

# A process for one replica and one for two, as collectives do not outlive a change of their number.
TRAINING = """
import sys
import keras, numpy as np, tensorflow as tf
import keras_usm_lite as usm
from keras_usm_lite.callbacks import CompressionMonitor, NMPruning, QuantizationSchedule

folder, replicas = sys.argv[1], int(sys.argv[2])
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
strategy = tf.distribute.MirroredStrategy([f"/cpu:{number}" for number in range(replicas)])
draw = np.random.default_rng(0)
x, y = draw.normal(size=(64, 16)).astype("float32"), draw.normal(size=(64, 4)).astype("float32")
frames, classes = draw.normal(size=(64, 6, 16)).astype("float32"), draw.integers(0, 5, (64, 6))

def batches(*arrays):
    return tf.data.Dataset.from_tensor_slices(arrays).batch(8)

def callbacks():
    with strategy.scope():
        sparsity = usm.SparsityConfig(1, 4, gradient="sr_ste")
        layers = [
            usm.QuantDense(16, usm.QuantizationConfig(2, scale="mse"), sparsity, activation="tanh", name="few_shot"),
            usm.QuantDense(16, usm.QuantizationConfig(4, scale="learned"), "2:4", activation="tanh", name="learned"),
            usm.NMSparseDense(4, usm.SparsityConfig(2, 4, every_step=True), name="every_step"),
        ]
        model = keras.Sequential([keras.Input((16,)), *layers])
        model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=False)
    schedules = [
        NMPruning(start_step=2, num_shots=3, interval=4, gradual=True, decay="linear", decay_steps=8),
        QuantizationSchedule([(0, None), (4, 8), (8, 4)], freeze_step=16),
        CompressionMonitor(),
    ]
    return model, model.fit(batches(x, y), epochs=3, verbose=0, callbacks=schedules).history

def recogniser(*compression):
    layers = [usm.QuantDense(16, *compression, activation="tanh"), keras.layers.Dense(5)]
    return keras.Sequential([keras.Input((6, 16)), *layers])

def own_loss(learner_of):
    with strategy.scope():
        student = recogniser(usm.QuantizationConfig(4), usm.SparsityConfig(2, 4, gradient="sr_ste", sr_ste_decay=0.5))
        usm.update_masks(student)
        learner = learner_of(student)
        learner.compile(
            keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False
        )
    return student, learner.fit(batches(frames, classes), epochs=2, verbose=0).history

def distiller():
    return own_loss(lambda student: usm.Distiller(student, recogniser(), kl_weight=2.0))

def co_trainer():
    return own_loss(usm.CoTrainer)

for train in (callbacks, distiller, co_trainer):
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model, logs = train()
    found = {weight.path.replace("/", " "): np.array(weight) for weight in model.weights}
    found.update({f"log {name}": values for name, values in logs.items()})
    np.savez(f"{folder}/{train.__name__} {replicas}.npz", **found)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each training ends with: `{(kind, replicas): arrays}`."""
    folder = tmp_path_factory.mktemp("replicas")
    for replicas in ("1", "2"):
        command = [sys.executable, "-c", TRAINING, str(folder), replicas]
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    arrays = {}
    for path in folder.glob("*.npz"):
        kind, replicas = path.stem.split()
        with np.load(path) as weights:
            arrays[kind, int(replicas)] = dict(weights)
    return arrays


def test_two_replicas_make_the_masks_and_weights_of_one_device(found):
    alone, together = found["callbacks", 1], found["callbacks", 2]
    assert sorted(alone) == sorted(together)
    assert len([name for name in alone if name.endswith(" mask")]) == 3
    for name, value in alone.items():
        if name.split()[-1] in ("mask", "bits", "mask_fade", "scale_frozen"):
            np.testing.assert_array_equal(together[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(together[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert alone["sequential few_shot mask"].mean() == 0.25 and alone["sequential few_shot mask_fade"] == 0.0
    assert alone["sequential few_shot bits"] == 4.0 and alone["sequential few_shot scale_frozen"] == 1.0


@pytest.mark.parametrize("kind", ["distiller", "co_trainer"])
def test_two_replicas_weigh_every_term_of_a_loss_as_one_device_does(found, kind):
    alone, together = found[kind, 1], found[kind, 2]
    assert sorted(alone) == sorted(together)
    assert {"log loss", "log kl_loss"} <= set(alone)
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
