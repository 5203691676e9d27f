"""Saving and loading hold one model and one layer more, not two models: peaks of fresh processes."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import pytest

import keras_usm_lite as usm

if keras.backend.backend() != "tensorflow":
    pytest.skip("PyTorch and JAX keep memory that was freed, so a peak says little there", allow_module_level=True)

if not pathlib.Path("/proc/self/clear_refs").exists():
    pytest.skip("peaks of memory are read from Linux' /proc", allow_module_level=True)

LAYERS, WIDTH = 12, 2048  # 201 MB of float32 kernels
KERNEL = 4 * WIDTH**2

PROGRAM = f"""
import json, os, sys
import keras, numpy as np, keras_usm_lite as usm

def model(layers, width):
    parts = [usm.QuantDense(width, "int4", sparsity="2:4") for _ in range(layers)]
    model = keras.Sequential([keras.Input((width,)), *parts])
    usm.update_masks(model)
    return model

def memory(key):
    text = open("/proc/self/status").read()
    return 1024 * int(text.split(key + ":")[1].split()[0])

def growth(function, *arguments):
    '''Peak of resident memory during a call above what was resident before it.'''
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    result = function(*arguments)
    return memory("VmHWM") - before, result

task, path = sys.argv[1:]
usm.load_packed(usm.save_packed(model(1, 64), path + ".small"))  # code and threads of the backend are loaded
if task == "save":
    peak, _ = growth(usm.save_packed, model({LAYERS}, {WIDTH}), path)
    size = os.path.getsize(path)
else:
    peak, loaded = growth(usm.load_packed, path)
    size = sum(int(np.prod(weight.shape)) * 4 for weight in loaded.weights)
print(json.dumps([peak, size]))
"""


def measured(task, path):
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(usm.__file__).parents[1])}
    command = [sys.executable, "-c", PROGRAM, task, str(path)]
    output = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def test_saving_takes_the_packed_bytes_and_loading_the_model_and_each_a_few_kernels_more(tmp_path):
    peak, size = measured("save", tmp_path / "model.usm")
    assert size < 0.09 * LAYERS * KERNEL
    print(f"save: {peak / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB")
    assert peak < size + 4 * KERNEL < 0.5 * LAYERS * KERNEL  # a float32 copy of all would be LAYERS * KERNEL alone
    peak, size = measured("load", tmp_path / "model.usm")
    print(f"load: {peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB")
    assert size > 2 * LAYERS * KERNEL  # kernels and masks
    assert peak < size + 8 * KERNEL < 1.5 * size
