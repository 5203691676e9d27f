"""CompressedModel: it behaves as the model inside and comes back from a file."""

import json

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.rewrite import walk_layers

X = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")
RULES = {"^tagger/keep": (None, None), "tagger/(up|down)": ("int4", "2:4")}


def array(tensor):
    return ops.convert_to_numpy(tensor)


@keras.saving.register_keras_serializable("test_compressed_model")
class Tagger(keras.Model):
    """A subclassed model whose output and mask depend on `training` and on the mask of its input."""

    def __init__(self, units=3, extra=(), **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.supports_masking = True
        self.up = keras.layers.Dense(8, name="up")
        self.keep = keras.layers.Dense(8, name="keep")
        self.drop = keras.layers.Dropout(0.5, name="drop")
        self.down = keras.layers.Dense(units, name="down")
        self.extra = list(extra)

    def call(self, x, training=None, mask=None):
        x = self.down(self.drop(self.keep(self.up(x)), training=training))
        for layer in self.extra:
            x = layer(x)
        return x if mask is None else x * ops.cast(ops.expand_dims(mask, -1), x.dtype)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {"name": self.name, "units": self.units, "extra": keras.saving.serialize_keras_object(self.extra)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "extra": keras.saving.deserialize_keras_object(config["extra"])})


def tagger(**kwargs):
    keras.utils.set_random_seed(0)
    model = Tagger(name="tagger", **kwargs)
    model(X)
    return model


def test_it_has_the_name_the_shapes_and_the_outputs_of_the_model_inside():
    small = usm.compress(tagger(), {**RULES, "tagger/(up|down)": (None, "2:4")})
    assert type(small) is usm.CompressedModel and type(small.model) is Tagger
    assert small.name == "tagger" and small.built
    assert tuple(small.compute_output_shape((None, 7, 4))) == (None, 7, 3)
    np.testing.assert_array_equal(array(small(X)), array(small.model(X)))
    np.testing.assert_allclose(array(small(X)), array(tagger()(X)), rtol=1e-5, atol=1e-6)
    assert [id(weight) for weight in small.weights] == [id(weight) for weight in small.model.weights]


def test_training_and_masks_reach_the_model_inside():
    small = usm.compress(tagger(), RULES)
    assert np.any(array(small(X, training=True)) != array(small(X)))
    masked = keras.layers.Masking()(X * np.array([1, 1, 1, 0, 0], "float32")[:, None])
    assert np.all(array(small(masked))[:, 3:] == 0) and np.all(array(small(masked))[:, :3] != 0)


def test_predict_gives_the_outputs_of_a_call():
    small = usm.compress(tagger(), RULES)
    np.testing.assert_allclose(small.predict(X, verbose=0), array(small(X)), rtol=1e-5, atol=1e-6)


def test_its_configuration_is_json_and_rebuilds_it_again_and_again():
    small = usm.compress(tagger(units=2), RULES)
    config = small.get_config()
    rebuilt = usm.CompressedModel.from_config(config)
    assert json.loads(json.dumps(config)) == json.loads(json.dumps(small.get_config()))
    assert rebuilt.model.units == 2
    rebuilt.set_weights(small.get_weights())
    np.testing.assert_array_equal(array(rebuilt(X)), array(small(X)))
    again = usm.CompressedModel.from_config(config)
    assert json.dumps(again.get_config()) == json.dumps(rebuilt.get_config())
    assert [type(layer) for layer in walk_layers(again)] == [type(layer) for layer in walk_layers(small)]


def test_masks_bits_and_frozen_scales_come_back_from_a_keras_file(tmp_path):
    small = usm.compress(tagger(), RULES)
    usm.update_masks(small)
    up, down = usm.compressed_layers(small)
    up.freeze_scale()
    down.bits.assign(8)
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    for new, old in zip(usm.compressed_layers(loaded), (up, down), strict=True):
        for key in ("kernel", "mask", "mask_fade", "bits", "scale_frozen", "kernel_scale"):
            np.testing.assert_array_equal(array(getattr(new, key)), array(getattr(old, key)), err_msg=key)
    np.testing.assert_array_equal(array(loaded(X)), array(small(X)))


def test_compressed_again_and_again_it_is_described_and_read_back_as_if_compressed_once(tmp_path):
    once = usm.compress(tagger(), {"up": ("int4", "2:4"), "down": ("int8", None)})
    small = tagger()
    for rules in (
        {"tagger": (None, "2:4")},
        {"tagger": ("int2", None)},
        {"up|keep|down": ("int8", "2:4")},
        {"keep": (None, None), "up|down": ("int8", None)},
        {"up": ("int4", "2:4"), "keep": ("int2", None)},
        {"up": (None, None), "down": ("int8", None)},
    ):
        small = usm.compress(small, rules)
    usm.update_masks(small)
    found = {layer.name: (layer.quantization, layer.sparsity) for layer in usm.compressed_layers(small)}
    kept = usm.QuantizationConfig(2)
    assert found == {"up": (usm.QuantizationConfig(4), usm.SparsityConfig(2, 4)), "keep": (kept, None),
                     "down": (usm.QuantizationConfig(8), None)}  # fmt: skip
    assert sorted(small.rules) == ["down(?#2)", "keep(?#1)", "up(?#0)"]
    assert len(json.dumps(small.get_config())) < 1.5 * len(json.dumps(once.get_config()))
    small.save(tmp_path / "small.keras")
    for loaded in (
        keras.models.load_model(tmp_path / "small.keras"),
        usm.load_packed(usm.save_packed(small, tmp_path / "small.usm"), custom_objects={"Tagger": Tagger}),
    ):
        np.testing.assert_array_equal(array(loaded(X)), array(small(X)))


def test_it_can_be_a_layer_of_another_model(tmp_path):
    inputs = keras.Input((5, 4))
    outer = keras.Model(inputs, keras.layers.Dense(2, name="top")(usm.compress(tagger(), RULES)(inputs)))
    smaller = usm.compress(outer, {"top": ("int8", None)})
    assert len(usm.compressed_layers(outer)) == 2 and len(usm.compressed_layers(smaller)) == 3
    smaller.save(tmp_path / "outer.keras")
    loaded = keras.models.load_model(tmp_path / "outer.keras")
    np.testing.assert_array_equal(array(loaded(X)), array(smaller(X)))


@keras.saving.register_keras_serializable("test_compressed_model")
class Shapeless(keras.Model):
    """A subclassed model that leaves it to Keras to find its output shape."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.down = keras.layers.Dense(4, name="down")

    def call(self, x):
        return self.down(x)


def test_a_model_without_output_shapes_of_its_own_can_be_a_layer_of_another_model():
    model = Shapeless()
    model(X)
    small = usm.compress(model, {"down": ("int4", None)})
    inputs = keras.Input((5, 4))
    np.testing.assert_array_equal(array(keras.Model(inputs, small(inputs))(X)), array(small(X)))


def test_a_lambda_in_the_original_model_is_not_run_from_a_file(tmp_path):
    model = usm.compress(tagger(extra=[keras.layers.Dense(3, name="last")]), RULES)
    config = model.get_config()
    config["template"]["config"]["extra"] = [
        keras.saving.serialize_keras_object(keras.layers.Lambda(lambda x: x * 0)),
    ]
    with pytest.raises(ValueError, match="[Ll]ambda"):
        usm.CompressedModel.from_config(config)


def test_a_changed_model_class_is_noticed_when_the_model_is_rebuilt():
    config = usm.compress(tagger(), RULES).get_config()
    with pytest.raises(ValueError, match="3 layers that can be compressed, but had 2 when it was compressed"):
        usm.CompressedModel.from_config({**config, "chosen": config["chosen"][:2]})


def attentive():
    """A functional model that becomes a `CompressedModel`, with outputs that have names."""
    inputs = keras.Input((5, 4))
    hidden = keras.layers.MultiHeadAttention(1, 4, name="attention")(inputs, inputs)
    outputs = {name: keras.layers.Dense(2, name=name)(hidden) for name in ("tags", "turns")}
    return keras.Model(inputs, list(outputs.values()), name="attentive")


def test_losses_and_metrics_may_be_named_by_output():
    small = usm.compress(attentive(), {"attention": ("int4", None)})
    assert isinstance(small, usm.CompressedModel)
    small.compile("sgd", loss={"tags": "mse", "turns": "mae"}, metrics={"turns": ["mse"]})
    logs = small.evaluate(X, [np.ones((3, 5, 2))] * 2, verbose=0, return_dict=True)
    assert {"tags_loss", "turns_loss", "turns_mse"} <= set(logs)


def test_what_was_frozen_or_set_free_after_compressing_stays_so_in_a_file(tmp_path):
    model = attentive()
    model.get_layer("turns").trainable = False
    small = usm.compress(model, {"attention": ("int4", None)})
    small.model.get_layer("turns").trainable, small.model.get_layer("tags").trainable = True, False
    small.compile("sgd", "mse")
    small.fit(X, [np.ones((3, 5, 2))] * 2, verbose=0)
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    trained = [[v.path.split("/", 1)[-1] for v in one.trainable_variables] for one in (small, loaded)]
    assert trained[0] == trained[1] and not any("tags" in path for path in trained[0])
    assert int(loaded.optimizer.iterations) == 1


def test_a_loss_of_its_own_is_missed_with_a_warning():
    class Own(Tagger):
        def compute_loss(self, *args, **kwargs):
            return ops.convert_to_tensor(1.0)

    model = Own()
    model(X)
    with pytest.warns(UserWarning, match="without the compute_loss of Own. Compress the model in it"):
        usm.compress(model, {"up": ("int4", None)})
