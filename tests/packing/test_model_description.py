"""Rebuilding a model that nobody vouches for: no more weights than allowed, no code, and nothing is compiled."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.packing.model_description import describe_model, rebuild_model

X = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
LIMIT = 100, 10_000


def array(tensor):
    return ops.convert_to_numpy(tensor)


def described():
    return describe_model(keras.Sequential([keras.Input((8,)), usm.QuantDense(4, "int4"), keras.layers.Dense(2)]))


def saved(name, config, **more):
    """An object as Keras describes it."""
    module, name = name.rsplit(".", 1)
    return {"module": module, "class_name": name, "config": config, "registered_name": None, **more}


INNER = [saved("keras.layers.InputLayer", {"batch_shape": [None, 8]}), saved("keras.layers.Dense", {"units": 8})]
COMPILED = saved(
    "keras.Sequential", {"name": "c", "layers": INNER}, compile_config={"optimizer": "adam", "loss": "mse"}
)
OPTIMIZER = saved("keras.layers.TimeDistributed", {"layer": saved("keras.optimizers.Adam", {})})


@pytest.mark.parametrize("units", [10**12, 10**6])
def test_a_model_of_too_many_weights_is_refused_before_it_is_built(units):
    config = described()
    config["config"]["layers"][-1]["config"]["units"] = units
    with pytest.raises(usm.PackedFileError, match="more than 100 variables or 10000 elements are created"):
        rebuild_model(config, *LIMIT)


@pytest.mark.parametrize(
    ("planted", "message"), [(COMPILED, "10000 elements are created"), (OPTIMIZER, "in a stateless scope")]
)
def test_an_optimizer_whose_variables_cannot_be_tried_out_does_not_lift_the_limit(planted, message):
    config = described()
    config["config"]["layers"][-1]["config"]["units"] = 10**6
    config["config"]["layers"].insert(1, planted)
    with pytest.raises(usm.PackedFileError, match=message):
        rebuild_model(config, *LIMIT)


def test_a_nested_model_that_was_compiled_comes_back_and_is_not(tmp_path):
    inner = keras.Sequential([keras.Input((8,)), usm.QuantDense(8, "int4")], name="inner")
    inner.compile("adam", "mse")
    model = keras.Sequential([keras.Input((8,)), inner, keras.layers.Dense(2)])
    loaded = usm.load_packed(usm.save_packed(model, tmp_path / "model.usm"))
    assert not loaded.compiled and not loaded.get_layer("inner").compiled
    np.testing.assert_array_equal(array(loaded(X)), array(model(X)))


def test_a_recogniser_of_a_billion_layers_is_refused_at_once():
    size = {"num_layers": 1, "dim": 8, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": 8}
    config = describe_model(usm.USMForCTC(5, **size))
    config["config"]["num_layers"] = 10**9
    with pytest.raises(usm.PackedFileError, match="num_layers=1000000000 must be from 1 to 128"):
        rebuild_model(config, *LIMIT)


def test_a_class_that_makes_variables_of_arrays_can_be_loaded(tmp_path):
    class Shifted(keras.layers.Layer):
        def build(self, input_shape):
            self.shift = keras.Variable(np.arange(input_shape[-1], dtype="float32"))

        def call(self, x):
            return x + self.shift

    model = keras.Sequential([keras.Input((8,)), usm.QuantDense(4), Shifted()])
    loaded = usm.load_packed(usm.save_packed(model, tmp_path / "model.usm"), custom_objects={"Shifted": Shifted})
    np.testing.assert_array_equal(array(loaded(X)), array(model(X)))


def test_a_lambda_in_a_packed_file_is_not_run(tmp_path):
    model = keras.Sequential([keras.Input((8,)), usm.QuantDense(4), keras.layers.Lambda(lambda x: x * 0)])
    with pytest.raises(usm.PackedFileError, match="[Ll]ambda"):
        usm.load_packed(usm.save_packed(model, tmp_path / "model.usm"))


def test_what_is_no_model_is_refused():
    with pytest.raises(usm.PackedFileError, match="is a Zeros, not a model"):
        rebuild_model(saved("keras.initializers.Zeros", {}), *LIMIT)
