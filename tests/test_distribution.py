"""Two replicas train to what one device trains to: masks, bits, scales and weights."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("tf.distribute needs the TensorFlow backend", allow_module_level=True)

TRAINING = """
import sys
import keras, numpy as np, tensorflow as tf
import keras_usm_lite as usm
from keras_usm_lite.callbacks import CompressionMonitor, NMPruning, QuantizationSchedule

replicas, path = int(sys.argv[1]), sys.argv[2]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
strategy = tf.distribute.MirroredStrategy([f"/cpu:{number}" for number in range(replicas)])
keras.utils.set_random_seed(0)
with strategy.scope():
    sparsity = usm.SparsityConfig(1, 4, gradient="sr_ste")
    layers = [
        usm.QuantDense(16, usm.QuantizationConfig(2, scale="mse"), sparsity, activation="tanh", name="few_shot"),
        usm.QuantDense(16, usm.QuantizationConfig(4, scale="learned"), "2:4", activation="tanh", name="learned"),
        usm.NMSparseDense(4, usm.SparsityConfig(2, 4, every_step=True), name="every_step"),
    ]
    model = keras.Sequential([keras.Input((16,)), *layers])
    model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=False)
draw = np.random.default_rng(0)
x, y = draw.normal(size=(64, 16)).astype("float32"), draw.normal(size=(64, 4)).astype("float32")
data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
callbacks = [
    NMPruning(start_step=2, num_shots=3, interval=4, gradual=True, decay="linear", decay_steps=8),
    QuantizationSchedule([(0, None), (4, 8), (8, 4)], freeze_step=16),
    CompressionMonitor(),
]
history = model.fit(data, epochs=3, verbose=0, callbacks=callbacks).history
loss = [value for name, value in history.items() if name == "loss"][0]
np.savez(path, loss=loss, **{weight.path.replace("/", " "): np.array(weight) for weight in model.weights})
"""

OWN_LOSSES = """
import sys
import keras, numpy as np, tensorflow as tf
import keras_usm_lite as usm

replicas, path, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
strategy = tf.distribute.MirroredStrategy([f"/cpu:{number}" for number in range(replicas)])
keras.utils.set_random_seed(0)
draw = np.random.default_rng(0)
x, y = draw.normal(size=(64, 6, 16)).astype("float32"), draw.integers(0, 5, (64, 6))

def recogniser(*compression):
    layers = [usm.QuantDense(16, *compression, activation="tanh"), keras.layers.Dense(5)]
    return keras.Sequential([keras.Input((6, 16)), *layers])

with strategy.scope():
    student = recogniser(usm.QuantizationConfig(4), usm.SparsityConfig(2, 4, gradient="sr_ste", sr_ste_decay=0.5))
    usm.update_masks(student)
    if kind == "Distiller":
        learner = usm.Distiller(student, recogniser(), kl_weight=2.0)
    else:
        learner = usm.CoTrainer(student)
    learner.compile(
        keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False
    )
history = learner.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(8), epochs=2, verbose=0).history
logs = {f"log {name}": values for name, values in history.items()}
np.savez(path, **logs, **{weight.path.replace("/", " "): np.array(weight) for weight in student.weights})
"""


def train(folder, replicas, script=TRAINING, *arguments):
    path = folder / f"{replicas}.npz"
    command = [sys.executable, "-c", script, str(replicas), str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": "tensorflow"})
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(path) as weights:
        return dict(weights)


def test_two_replicas_make_the_masks_and_weights_of_one_device(tmp_path):
    alone, together = train(tmp_path, 1), train(tmp_path, 2)
    assert sorted(alone) == sorted(together)
    assert len([name for name in alone if name.endswith(" mask")]) == 3
    for name, value in alone.items():
        if name.split()[-1] in ("mask", "bits", "mask_fade", "scale_frozen"):
            np.testing.assert_array_equal(together[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(together[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert alone["sequential few_shot mask"].mean() == 0.25 and alone["sequential few_shot mask_fade"] == 0.0
    assert alone["sequential few_shot bits"] == 4.0 and alone["sequential few_shot scale_frozen"] == 1.0


@pytest.mark.parametrize("kind", ["Distiller", "CoTrainer"])
def test_two_replicas_weigh_every_term_of_a_loss_as_one_device_does(tmp_path, kind):
    alone, together = (train(tmp_path, replicas, OWN_LOSSES, kind) for replicas in (1, 2))
    assert sorted(alone) == sorted(together)
    assert {"log loss", "log kl_loss"} <= set(alone)
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
