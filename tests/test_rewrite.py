"""The walk over a model's layers, and copies of models with some layers exchanged."""

import collections

import keras
import numpy as np
import pytest
from keras import ops

from keras_usm_lite.rewrite import in_float32, layer_path, rewrite, walk_layers

UNITS = 4
X = np.random.default_rng(0).normal(size=(5, UNITS)).astype("float32")
Pair = collections.namedtuple("Pair", "left right")


def array(tensor):
    return ops.convert_to_numpy(tensor)


def dense(name):
    return keras.layers.Dense(UNITS, name=name, bias_initializer="ones")


@keras.saving.register_keras_serializable("test_rewrite")
class Composite(keras.layers.Layer):
    """Builds its parts by calling them, as most layers do."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = dense("first")
        self.attention = keras.layers.MultiHeadAttention(2, 2, name="attention")
        self.drop = keras.layers.Dropout(0.5, name="drop")

    def call(self, x, training=None):
        x = self.first(x)
        sequence = ops.expand_dims(x, 1)
        return self.drop(x + ops.squeeze(self.attention(sequence, sequence), 1), training=training)

    def get_config(self):
        return super().get_config()


@keras.saving.register_keras_serializable("test_rewrite")
class Holder(keras.Model):
    """Holds layers in every way an attribute can, and has no build()."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.single = dense("single")
        self.listed = [dense("listed_0"), dense("listed_1")]
        self.named = {"a": dense("named_a"), "norm": keras.layers.LayerNormalization(name="norm")}
        self.pair = (dense("pair_0"), dense("pair_1"))
        self.deep = [[dense("deep_0")], {"x": (Pair(dense("deep_1"), dense("deep_2")),)}]
        self.composite = Composite(name="composite")
        self.sequence = keras.Sequential([dense("late")], name="sequence")
        self.graph = keras.Sequential([keras.Input((UNITS,)), dense("early")], name="graph")
        self.again = self.single

    def call(self, x, training=None):
        deep = self.deep[1]["x"][0]
        for layer in (
            *(self.single, *self.listed, *self.named.values(), *self.pair, self.deep[0][0], deep.left, deep.right),
            *(self.sequence, self.graph, self.again),
        ):
            x = layer(x)
        return self.composite(x, training=training)

    def get_config(self):
        return {"name": self.name}


HOLDER_PATHS = [
    *("holder/single", "holder/listed_0", "holder/listed_1", "holder/named_a", "holder/pair_0", "holder/pair_1"),
    *("holder/deep_0", "holder/deep_1", "holder/deep_2", "holder/composite/first", "holder/sequence/late"),
    "graph/early",  # a Sequential with an Input is built before the model holds it
]


def holder():
    keras.utils.set_random_seed(0)
    model = Holder(name="holder")
    model(X)
    return model


def functional():
    keras.utils.set_random_seed(0)
    shared = dense("shared")
    part_input = keras.Input((UNITS,))
    part = keras.Model(part_input, dense("part_own")(shared(part_input)), name="part")
    inputs = keras.Input((UNITS,), name="features")
    x = part(shared(inputs)) + inputs  # an operation that is not a layer
    x = Composite(name="composite")(ops.concatenate([x, 2.0 * x], axis=-1)[:, :UNITS])
    return keras.Model(inputs, keras.layers.Activation("tanh")(x), name="functional")


def wider(layer):
    """Exchange every Dense for a Dense with the same weights and a relu, to see that the exchange has an effect."""
    if type(layer) is not keras.layers.Dense:
        return None
    new = keras.layers.Dense(layer.units, activation="relu", name=layer.name)
    return new, lambda built: built.set_weights(layer.get_weights())


def dense_layers(model):
    return [layer for layer in walk_layers(model) if type(layer) is keras.layers.Dense]


def paths(layers):
    return [layer_path(layer) for layer in layers]


def seeds(model):
    return [array(layer.seed_generator.state) for layer in walk_layers(model) if hasattr(layer, "seed_generator")]


MODELS = {"functional": functional, "holder": holder}


def test_the_walk_yields_every_layer_once_parents_first():
    model = holder()
    found = list(walk_layers(model))
    assert len({id(layer) for layer in found}) == len(found)
    assert found[0] is model
    assert paths(dense_layers(model)) == HOLDER_PATHS
    names = paths(found)
    assert names.index("holder/composite") < names.index("holder/composite/first") < names.index("holder/sequence")


def test_the_walk_enters_nested_functional_models_and_sees_a_shared_layer_once():
    assert paths(dense_layers(functional())) == ["shared", "part_own", "composite/first"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_without_exchanges_computes_the_same_and_shares_no_weights(kind):
    model = MODELS[kind]()
    copy = rewrite(model, lambda layer: None)
    np.testing.assert_array_equal(array(copy(X)), array(model(X)))
    assert [type(layer) for layer in walk_layers(copy)] == [type(layer) for layer in walk_layers(model)]
    assert [weight.path for weight in copy.weights] == [weight.path for weight in model.weights]
    before = array(model(X))
    for weight in copy.weights:
        weight.assign(np.zeros(weight.shape))
    np.testing.assert_array_equal(array(model(X)), before)


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_is_exchanged_in_place_wherever_it_is_held(kind):
    model = MODELS[kind]()
    before = array(model(X))
    copy = rewrite(model, wider)
    assert [layer.activation.__name__ for layer in dense_layers(copy)] == ["relu"] * len(dense_layers(model))
    assert paths(dense_layers(copy)) == paths(dense_layers(model))
    assert [weight.path for weight in copy.weights] == [weight.path for weight in model.weights]
    for new, old in zip(copy.weights, model.weights, strict=True):
        np.testing.assert_array_equal(array(new), array(old))
    for layer in dense_layers(model):
        layer.activation = keras.activations.relu
    assert np.any(array(model(X)) != before)
    np.testing.assert_allclose(array(copy(X)), array(model(X)), rtol=1e-6)  # so the copy calls the new layers


def test_a_layer_used_in_several_graphs_and_attributes_stays_one_layer():
    copy = rewrite(functional(), wider)
    assert copy.get_layer("shared") is copy.get_layer("part").get_layer("shared")
    copy = rewrite(holder(), wider)
    assert copy.again is copy.single


def test_only_the_asked_layers_are_exchanged_and_nothing_below_them_is_asked():
    asked = []

    def replace(layer):
        asked.append(layer.name)
        return (keras.layers.Activation("linear"), lambda new: None) if layer.name == "composite" else None

    copy = rewrite(functional(), replace)
    assert "composite" in asked and "first" not in asked and "drop" not in asked
    assert len(asked) == len(set(asked))
    assert [layer.name for layer in copy.layers if isinstance(layer, Composite)] == []


@pytest.mark.parametrize("kind", MODELS)
def test_random_layers_of_the_copy_go_on_where_the_original_stands(kind):
    model = MODELS[kind]()
    model(X, training=True)
    assert np.any(seeds(model))
    np.testing.assert_array_equal(seeds(rewrite(model, lambda layer: None)), seeds(model))


def test_a_compiled_model_gives_a_copy_that_is_not_compiled_whatever_its_loss():
    model = functional()
    model.compile("sgd", loss=lambda y_true, y_pred: ops.mean(y_pred))
    copy = rewrite(model, wider)
    assert not copy.compiled and model.compiled


def test_several_named_inputs_and_outputs_keep_their_structure():
    inputs = {"a": keras.Input((UNITS,), name="a"), "b": keras.Input((UNITS,), name="b")}
    outputs = {"sum": dense("sum")(inputs["a"] + inputs["b"]), "b": dense("only_b")(inputs["b"])}
    model = keras.Model(inputs, outputs)
    batch = {"a": X, "b": 2 * X}
    copy = rewrite(model, wider)(batch)
    assert sorted(copy) == ["b", "sum"]
    for key, expected in model(batch).items():
        np.testing.assert_allclose(array(copy[key]), np.maximum(array(expected), 0), rtol=1e-6)


def test_a_model_called_on_a_dict_is_copied_under_the_same_paths():
    @keras.saving.register_keras_serializable("test_rewrite")
    class OfDict(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.head = dense("head")

        def call(self, inputs):
            return self.head(inputs["a"] + inputs["b"])

        def get_config(self):
            return {"name": self.name}

    model = OfDict(name="of_dict")
    batch = {"a": X, "b": X}
    expected = array(model(batch))
    copy = rewrite(model, lambda layer: None)
    np.testing.assert_array_equal(array(copy(batch)), expected)
    assert paths(dense_layers(copy)) == ["of_dict/head"]


def test_an_embedding_and_batch_statistics_are_kept():
    model = keras.Sequential(
        [keras.Input((3,), dtype="int32"), keras.layers.Embedding(7, 4), keras.layers.BatchNormalization()]
    )
    model.layers[1].moving_mean.assign(np.arange(4.0))
    copy = rewrite(model, wider)
    batch = np.array([[0, 6, 3]], "int32")
    np.testing.assert_array_equal(array(copy(batch)), array(model(batch)))


def test_a_model_that_is_not_built_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="'bare' is not built.*Call it on a batch"):
        rewrite(keras.Sequential([dense("a")], name="bare"), wider)


def test_a_layer_that_its_configuration_does_not_describe_is_named():
    class Forgetful(keras.layers.Layer):
        def __init__(self, width, table=None, **kwargs):
            super().__init__(**kwargs)
            self.inner = keras.layers.Dense(width + len(table), name="inner")

        def call(self, x):
            return self.inner(x)

        def get_config(self):
            return super().get_config()

    inputs = keras.Input((UNITS,))
    model = keras.Model(inputs, Forgetful(2, table=(1, 2), name="forgetful")(inputs))
    with pytest.raises(ValueError, match="'forgetful' of class Forgetful cannot be copied through get_config"):
        rewrite(model, wider)


def test_a_model_of_sixteen_bits_is_copied_into_float32_with_its_weights_wherever_its_policies_are():
    shape = keras.Input((UNITS,))
    inner = Composite(dtype="mixed_bfloat16", name="inner")
    half = keras.Model(shape, keras.layers.Dense(2, dtype="mixed_float16", name="out")(inner(shape)))
    copy = in_float32(half)
    assert {layer.compute_dtype for layer in (copy.get_layer("inner"), copy.get_layer("out"))} == {"float32"}
    for ours, theirs in zip(copy.get_weights(), half.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(array(copy(X)), array(half(X)), atol=0.05)


def test_a_model_of_float32_is_not_copied():
    model = keras.Sequential([keras.Input((UNITS,)), dense("first")])
    assert in_float32(model) is model


@keras.saving.register_keras_serializable("test_rewrite")
class Normalized(keras.Model):
    """Normalizes its inputs by statistics it has seen, as a subclassed model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.normalization = keras.layers.Normalization()
        self.out = dense("out")

    def call(self, inputs):
        return self.out(self.normalization(inputs))


@pytest.mark.parametrize("kind", ["Sequential", "subclassed"])
def test_normalization_goes_on_with_the_statistics_it_was_adapted_to(kind):
    x = np.random.default_rng(0).normal(5, 3, size=(64, UNITS)).astype("float32")
    normalization = keras.layers.Normalization()
    normalization.adapt(x)
    model = keras.Sequential([keras.Input((UNITS,)), normalization, dense("out")])
    if kind == "subclassed":
        model = Normalized()
        model.normalization.adapt(x)  # before the first call: Keras would build it in a scope that ends
        model(x)
    copy = rewrite(model, lambda layer: None)
    np.testing.assert_allclose(array(copy(x)), array(model(x)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_frozen_stays_frozen_and_nothing_else(kind):
    model = MODELS[kind]()
    frozen, *others = dense_layers(model)
    frozen.trainable = False
    copy = rewrite(model, wider)
    flags = [layer.trainable for layer in dense_layers(copy)]
    assert flags == [False, *(True for _ in others)]
    assert len(copy.trainable_variables) == len(model.trainable_variables)


@pytest.mark.parametrize("base", [keras.Sequential, keras.Model])
def test_a_graph_with_a_call_of_its_own_is_refused_as_its_copy_would_compute_something_else(base):
    class Doubled(base):
        def call(self, inputs, training=None, mask=None):
            return 2 * super().call(inputs, training=training, mask=mask)

    inputs, layer = keras.Input((UNITS,)), dense("a")
    model = Doubled([inputs, layer]) if base is keras.Sequential else Doubled(inputs, layer(inputs))
    with pytest.raises(ValueError, match="Doubled.*`call` of its own"):
        rewrite(model, wider)


def test_layers_are_found_in_attributes_whose_names_begin_like_those_of_keras():
    class Listed(keras.Model):
        def __init__(self):
            super().__init__()
            self._layers_of_mine = [dense("a")]
            self._metrics_head = dense("b")

        def call(self, inputs):
            return self._metrics_head(self._layers_of_mine[0](inputs))

        def get_config(self):
            return {}

        @classmethod
        def from_config(cls, config):
            return cls()

    model = Listed()
    model(X)
    copy = rewrite(model, wider)
    assert [layer.activation for layer in dense_layers(copy)] == 2 * [keras.activations.relu]


def test_training_a_copy_leaves_the_original_alive():
    """On JAX a training step gives its buffers away; random states that shared one would die in both models."""
    layers = [keras.Input((UNITS,)), keras.layers.Dropout(0.5), dense("out")]
    model = keras.Sequential(layers)
    copy = rewrite(model, lambda layer: None)
    before = model.predict(X, verbose=0)
    copy.compile("sgd", "mse")
    copy.fit(X, X, verbose=0)
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)
    model.compile("sgd", "mse")
    assert np.isfinite(model.evaluate(X, X, verbose=0)) and np.isfinite(model.fit(X, X, verbose=0).history["loss"][0])


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="lookups are layers of TensorFlow")
def test_a_lookup_keeps_the_vocabulary_that_it_learned():
    lookup, numbers = keras.layers.IntegerLookup(), np.array([[7, 8, 9, 8]])
    lookup.adapt(numbers)
    model = keras.Sequential([keras.Input((4,), dtype="int64"), lookup, keras.layers.Embedding(6, 4)])
    np.testing.assert_array_equal(rewrite(model, lambda layer: None)(numbers), model(numbers))
    words = keras.layers.TextVectorization(output_mode="tf_idf")
    words.adapt(["up down up", "left"])
    model = keras.Sequential([keras.Input((), dtype="string"), words, keras.layers.Dense(2)])
    texts = keras.ops.convert_to_tensor(["up left", "sideways"])
    np.testing.assert_array_equal(rewrite(model, lambda layer: None)(texts), model(texts))
