"""examples/float_model.py: what a fine-tuning may start from."""

import importlib
import pathlib
import types

import keras
import numpy as np
import pytest

import keras_usm_lite as usm

SIZE = {"num_layers": 1, "dim": 16, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[2] / "examples"))
    return importlib.import_module("float_model")


@pytest.fixture
def task():
    """Data with two words."""
    frontend, corpus = types.SimpleNamespace(num_mel_bins=80), types.SimpleNamespace(name="mine")
    return types.SimpleNamespace(tokenizer=usm.WordTokenizer(["up", "down"]), frontend=frontend, corpus=corpus)


def float_model(task, **size):
    return usm.USMForCTC(task.tokenizer.vocab_size, **SIZE | size)


def test_keras_and_packed_files_of_a_float_model_give_the_same_weights(script, task, tmp_path):
    model = float_model(task)
    model.save(tmp_path / "float.keras")
    usm.save_packed(model, tmp_path / "float.usm")
    for name in ("float.keras", "float.usm"):
        loaded = script.load_float_model(task, str(tmp_path / name))
        for weight, before in zip(loaded.weights, model.weights, strict=True):
            np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (weight, before)))


def test_a_compressed_model_is_refused_packed_or_not(script, task, tmp_path):
    model = float_model(task, quantization="int4")
    model.save(tmp_path / "model.keras")
    usm.save_packed(model, tmp_path / "model.usm")
    for name in ("model.keras", "model.usm"):
        with pytest.raises(SystemExit, match=f"{name} is compressed already"):
            script.load_float_model(task, str(tmp_path / name))


def test_a_model_of_other_features_is_refused(script, task, tmp_path):
    float_model(task, num_mel_bins=64).save(tmp_path / "float.keras")
    with pytest.raises(SystemExit, match="takes features of 64 mel bins, the data has 80"):
        script.load_float_model(task, str(tmp_path / "float.keras"))


def test_other_labels_are_refused_by_their_number_or_by_the_tokenizer_beside_the_model(script, task, tmp_path):
    float_model(task).save(tmp_path / "float.keras")
    usm.save_tokenizer(usm.WordTokenizer(["up", "left"]), tmp_path / "tokenizer.json")
    with pytest.raises(SystemExit, match="other labels than mine has .3 and 3 with the blank"):
        script.load_float_model(task, str(tmp_path / "float.keras"))
    (tmp_path / "tokenizer.json").unlink()
    task.tokenizer = usm.WordTokenizer(["up", "down", "left"])
    with pytest.raises(SystemExit, match="3 and 4 with the blank"):
        script.load_float_model(task, str(tmp_path / "float.keras"))
