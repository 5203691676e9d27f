"""Any Keras model, not only our recogniser: compressed, trained a step, saved, reloaded and run by LiteRT."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.core.nm_mask import nm_violations
from keras_usm_lite.export.litert_weights import read_litert_weights

if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs the TensorFlow backend", allow_module_level=True)

X = np.random.default_rng(0).normal(size=(4, 10, 16)).astype("float32")


@keras.saving.register_keras_serializable(package="test_any_model")
class Block(keras.layers.Layer):
    """A layer that holds layers in a list."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [keras.layers.Dense(16, activation="relu", name=f"part_{i}") for i in range(2)]

    def build(self, input_shape):
        for part in self.parts:
            part.build(input_shape)

    def call(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs


@keras.saving.register_keras_serializable(package="test_any_model")
class Subclassed(keras.Model):
    """A model with a call of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(2, 8, name="attention")
        self.block = Block(name="block")
        self.out = keras.layers.Dense(4, name="out")

    def call(self, inputs):
        return self.out(self.block(inputs + self.attention(inputs, inputs)))

    def get_config(self):
        return {"name": self.name}


def nested():
    inner_inputs = keras.Input((10, 16))
    inner = keras.Model(
        inner_inputs, keras.layers.Dense(16, name="deep")(Block(name="block")(inner_inputs)), name="inner"
    )
    inputs = keras.Input((10, 16))
    attended = keras.layers.MultiHeadAttention(2, 8, name="attention")(inputs, inputs)
    stack = keras.Sequential([keras.Input((10, 16)), keras.layers.Dense(16, name="flat")], name="stack")
    return keras.Model(inputs, keras.layers.Dense(4, name="out")(stack(inner(inputs + attended))))


@pytest.mark.parametrize(("make", "kernels"), [(Subclassed, 7), (nested, 9)])
def test_a_model_becomes_int4_and_sparse_trains_reloads_and_runs_on_litert(make, kernels, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    keras.utils.set_random_seed(0)
    model = make()
    model(X)
    small = usm.compress(model, {".": ("int4", "2:4")}, target="litert")
    small.compile("adam", "mse")
    small.fit(X, np.ones((4, 10, 4)), verbose=0, callbacks=[usm.callbacks.NMPruning()])
    expected = ops.convert_to_numpy(small(X))
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(X)), expected)
    path = usm.export_litert(loaded, tmp_path / "small.tflite")
    weights = read_litert_weights(path)
    assert [weight.bits for weight in weights] == [4] * kernels
    assert all(int(nm_violations(weight.codes.T.astype("float32"), 2, 4)) == 0 for weight in weights)
    interpreter = Interpreter(path)
    (detail,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(detail["index"], X.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(detail["index"], X)
    interpreter.invoke()
    served = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    assert np.sqrt(np.mean((served - expected) ** 2)) / expected.std() < 0.03  # int8 activations
