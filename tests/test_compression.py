"""compress: any Keras model with some layers made low-bit and sparse, and nothing else changed."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.core.nm_mask import nm_violations
from keras_usm_lite.rewrite import layer_path, walk_layers

UNITS = 8
X = np.random.default_rng(0).normal(size=(6, UNITS)).astype("float32")
SPARSE = {".": (None, "2:4")}


def array(tensor):
    return ops.convert_to_numpy(tensor)


def dense(name, **kwargs):
    return keras.layers.Dense(UNITS, name=name, **kwargs)


@keras.saving.register_keras_serializable("test_compression")
class Composite(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.up = dense("up", activation="relu")
        self.down = dense("down", use_bias=False)

    def build(self, input_shape):
        self.up.build(input_shape)
        self.down.build(input_shape)

    def call(self, x):
        return x + self.down(self.up(x))

    def get_config(self):
        return super().get_config()


@keras.saving.register_keras_serializable("test_compression")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = dense("first")
        self.blocks = [Composite(name=f"block_{i}") for i in range(2)]
        self.heads = {"loud": dense("loud")}
        self.pair = (dense("left"), keras.layers.LayerNormalization(name="norm"))

    def call(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.pair[1](self.pair[0](self.heads["loud"](x)))

    def get_config(self):
        return {"name": self.name}


def sequential():
    layers = [keras.Input((UNITS,)), dense("hidden", activation="tanh"), keras.layers.Dense(2, name="out")]
    return keras.Sequential(layers, name="sequential")


def functional():
    shared = dense("shared")
    inputs = keras.Input((UNITS,))
    return keras.Model(inputs, dense("out")(shared(shared(inputs)) + inputs), name="functional")


def nested():
    part = functional()
    inputs = keras.Input((UNITS,))
    return keras.Model(inputs, sequential()(part(inputs)), name="nested")


def composite():
    inputs = keras.Input((UNITS,))
    return keras.Model(inputs, dense("out")(Composite(name="composite")(inputs)), name="with_composite")


def subclassed():
    model = Subclassed(name="subclassed")
    model(X)
    return model


MODELS = {f.__name__: f for f in (sequential, functional, nested, composite, subclassed)}
RESULT = {"sequential": keras.Sequential, "functional": keras.Model, "nested": keras.Model}


def made(kind):
    keras.utils.set_random_seed(3)
    return MODELS[kind]()


def dense_paths(model):
    return [
        layer_path(layer) for layer in walk_layers(model) if isinstance(layer, (keras.layers.Dense, usm.QuantDense))
    ]


def compressions(model):
    """`{last part of the path: shorthand}` of the compressed layers, in model order."""
    return {
        layer_path(layer).split("/")[-1]: (
            None if layer.quantization is None else str(layer.quantization),
            None if layer.sparsity is None else str(layer.sparsity),
        )
        for layer in usm.compressed_layers(model)
    }


@pytest.mark.parametrize("kind", MODELS)
def test_with_dense_masks_and_no_quantization_the_outputs_are_the_same(kind):
    model = made(kind)
    small = usm.compress(model, SPARSE)
    np.testing.assert_allclose(array(small(X)), array(model(X)), rtol=1e-6, atol=1e-6)
    assert dense_paths(small) == dense_paths(model) == [layer_path(layer) for layer in usm.compressed_layers(small)]
    for new, old in zip(usm.compressed_layers(small), dense_layers(model), strict=True):
        np.testing.assert_array_equal(array(new.kernel), array(old.kernel))
        assert np.all(array(new.mask) == 1)


def dense_layers(model):
    return [layer for layer in walk_layers(model) if type(layer) is keras.layers.Dense]


@pytest.mark.parametrize(
    ("kind", "scale"),
    [*((kind, "absmax") for kind in MODELS), ("sequential", "learned"), ("composite", "learned"), ("composite", "mse")],
)
def test_at_eight_bits_the_outputs_are_close_whatever_the_scale(kind, scale):
    model = made(kind)
    for layer in dense_layers(model):
        layer.kernel.assign(20 * array(layer.kernel))  # a stored scale must come from these weights
    small = usm.compress(model, {".": (usm.QuantizationConfig(bits=8, scale=scale), None)})
    expected = array(model(X))
    error = np.abs(array(small(X)) - expected).mean() / np.abs(expected).mean()
    assert 0 < error < 0.05


@pytest.mark.parametrize("kind", MODELS)
def test_it_trains_prunes_saves_and_loads(kind, tmp_path):
    small = usm.compress(made(kind), {"shared|up|hidden|first": ("int4", "2:4"), ".": ("int8", None)})
    small.compile(keras.optimizers.SGD(0.1), "mse")
    before = [array(layer.kernel) for layer in usm.compressed_layers(small)]
    small.fit(X, np.ones_like(array(small(X))), verbose=0, callbacks=[usm.callbacks.NMPruning()])
    for layer, kernel in zip(usm.compressed_layers(small), before, strict=True):
        assert np.any(array(layer.kernel) != kernel), layer.name
        if layer.sparsity is not None:
            assert int(nm_violations(layer.effective_kernel(), 2, 4)) == 0
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    assert type(loaded) is type(small)
    assert isinstance(small, RESULT.get(kind, usm.CompressedModel))
    assert compressions(loaded) == compressions(small)
    np.testing.assert_array_equal(array(loaded(X)), array(small(X)))


@pytest.mark.parametrize("kind", MODELS)
def test_the_original_is_left_as_it_was(kind):
    model = made(kind)
    before, layers = array(model(X)), [id(layer) for layer in walk_layers(model)]
    small = usm.compress(model, {".": ("int2", "1:4")})
    for layer in usm.compressed_layers(small):
        layer.kernel.assign(0 * array(layer.kernel))
    np.testing.assert_array_equal(array(model(X)), before)
    assert [id(layer) for layer in walk_layers(model)] == layers


def test_a_shared_layer_stays_shared_and_is_counted_once():
    small = usm.compress(functional(), {"shared": ("int4", "2:4")})
    assert len(usm.compressed_layers(small)) == 1
    small.get_layer("shared").kernel.assign(np.zeros((UNITS, UNITS)))
    out = small.get_layer("out")
    expected = X @ array(out.kernel) + array(out.bias)  # the shared layer now gives zeros in both places
    np.testing.assert_allclose(array(small(X)), expected, rtol=1e-5, atol=1e-5)


def test_activations_and_missing_biases_are_kept():
    up, down = usm.compressed_layers(usm.compress(composite(), {"composite": (None, "2:4")}))
    assert up.activation is keras.activations.relu and up.use_bias
    assert down.activation is keras.activations.linear and down.bias is None


def test_the_first_rule_that_matches_wins_and_none_none_protects():
    rules = {"loud|first|block_1/down": (None, None), "block_0": ("int4", "2:4"), "block|left": ("int8", None)}
    small = usm.compress(subclassed(), rules)
    assert {layer_path(layer): str(layer.quantization) for layer in usm.compressed_layers(small)} == {
        "subclassed/block_0/up": "int4",
        "subclassed/block_0/down": "int4",
        "subclassed/block_1/up": "int8",
        "subclassed/left": "int8",
    }


def test_the_order_of_the_rules_survives_saving_and_packing(tmp_path):
    rules = {"z|block_0": ("int4", None), "block": ("int8", None)}
    small = usm.compress(subclassed(), rules)
    small.save(tmp_path / "small.keras")
    usm.save_packed(small, tmp_path / "small.usm")
    for loaded in (keras.models.load_model(tmp_path / "small.keras"), usm.load_packed(tmp_path / "small.usm")):
        configured = [str(layer.quantization) for layer in usm.compressed_layers(loaded)]
        assert configured == ["int4", "int4", "int8", "int8"]


def test_rules_with_whole_paths_hold_after_loading_although_keras_forgets_some_paths(tmp_path):
    inputs = keras.Input((UNITS,))
    mixed = keras.Model(inputs, sequential()(Composite(name="composite")(inputs)))
    for model, rules in (
        (subclassed(), {"^subclassed/first$": ("int4", None), "^subclassed/block_1/up$": ("int8", None)}),
        (mixed, {"^sequential/hidden$": ("int4", None), "^composite/up$": ("int8", None)}),
    ):
        small = usm.compress(model, rules)
        small.save(tmp_path / "small.keras")
        loaded = keras.models.load_model(tmp_path / "small.keras")
        assert compressions(loaded) == compressions(small)
        np.testing.assert_array_equal(array(loaded(X)), array(small(X)))


@pytest.mark.parametrize("kind", MODELS)
def test_a_compressed_model_can_be_compressed_again(kind, tmp_path):
    once = usm.compress(made(kind), {"out|down|left": ("int8", "2:4")})
    usm.update_masks(once)
    (first, *_) = usm.compressed_layers(once)
    twice = usm.compress(once, {"shared|up|hidden|first": ("int2", "1:4")})
    (kept, *_) = [layer for layer in usm.compressed_layers(twice) if layer_path(layer) == layer_path(first)]
    np.testing.assert_array_equal(array(kept.mask), array(first.mask))
    np.testing.assert_array_equal(array(kept.effective_kernel()), array(first.effective_kernel()))
    assert set(compressions(twice).values()) == {("int8", "2:4"), ("int2", "1:4")}
    assert dense_paths(twice) == dense_paths(once)
    twice.save(tmp_path / "twice.keras")
    loaded = keras.models.load_model(tmp_path / "twice.keras")
    np.testing.assert_array_equal(array(loaded(X)), array(twice(X)))


def test_compressing_again_exchanges_the_compression_of_a_layer_and_keeps_its_weights():
    once = usm.compress(subclassed(), {".": ("int8", "2:4")})
    usm.update_masks(once)
    again = usm.compress(once, {"first": ("int4", None)})
    assert compressions(again)["first"] == ("int4", None)
    assert compressions(again)["left"] == ("int8", "2:4")
    np.testing.assert_array_equal(array(again.model.first.kernel), array(once.model.first.kernel))


def test_usm_for_ctc_is_compressed_by_the_paths_of_its_blocks(tmp_path):
    size = {"num_layers": 1, "dim": 8, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": 8}
    model = usm.USMForCTC(5, name="usm", **size)
    small = usm.compress(model, {"ffn_end|depthwise": (None, None), "encoder/block_": ("int4", "2:4")})
    touched = [layer_path(layer) for layer in usm.compressed_layers(small)]
    parts = ("ffn_start/up", "ffn_start/down", *(f"attention/{name}" for name in ("query", "key", "value", "output")))
    assert touched == [f"usm/encoder/block_0/{part}" for part in (*parts, "conv/expand", "conv/project")]
    assert usm.update_masks(small) == (8 + 4 + 3) * 8 * 8 // 2
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    for new, old in zip(loaded.weights, small.weights, strict=True):
        assert new.path == old.path
        np.testing.assert_array_equal(array(new), array(old))


def test_keras_multi_head_attention_is_compressed_and_survives_save_and_reload(tmp_path):
    inputs = keras.Input((5, UNITS))
    attended = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    model = keras.Model(inputs, dense("out")(keras.layers.LayerNormalization()(attended + inputs)))
    batch = np.random.default_rng(1).normal(size=(2, 5, UNITS)).astype("float32")
    small = usm.compress(model, {"attention": (None, "2:4")})
    assert list(compressions(small)) == ["query", "key", "value", "attention_output"]
    np.testing.assert_allclose(array(small(batch)), array(model(batch)), rtol=1e-5, atol=1e-6)  # masks are dense yet
    small = usm.compress(small, {"attention": ("int4", "2:4")})
    usm.update_masks(small)
    small.compile("adam", "mse")
    small.fit(batch, np.zeros((2, 5, UNITS)), verbose=0)
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(array(loaded(batch)), array(small(batch)))


def test_every_layer_that_a_rule_does_not_fit_is_named_with_the_rule_that_leaves_it_out():
    size = {"num_layers": 1, "dim": 8, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": 8}
    model = usm.USMForCTC(5, name="usm", **size)
    with pytest.raises(ValueError) as caught:
        usm.compress(model, {"encoder": ("int4", "2:4")})
    message = str(caught.value)
    assert "2 layers cannot be compressed" in message
    assert "conv_0 has 1 inputs per tap, which sparsity 2:4 cannot group" in message
    assert "depthwise cannot be 2:4 sparse" in message
    first_rule = eval(message[message.index("{") : message.rindex("}") + 1])
    small = usm.compress(model, {**first_rule, "encoder": ("int4", "2:4")})
    assert not {"conv_0", "depthwise"} & set(compressions(small)) and "conv_1" in compressions(small)


def test_what_litert_cannot_run_is_refused_when_it_is_the_target():
    for pair, reason in {
        ("int3", None): "no 3-bit kernel; use bits=4",
        (usm.QuantizationConfig(2, form="fake", block_size=2), None): "use block_size=None",
        (usm.QuantizationConfig(4, "asymmetric"), "2:4"): "asymmetric 4-bit codes need 8 bits here",
    }.items():
        with pytest.raises(ValueError, match=f"hidden cannot run on LiteRT as int.: .*{reason}"):
            usm.compress(sequential(), {"hidden": pair}, target="litert")
        usm.compress(sequential(), {"hidden": pair})
    assert compressions(usm.compress(sequential(), {"hidden": ("int4", "2:4")}, target="litert"))
    with pytest.raises(ValueError, match="target='tpu' is not known"):
        usm.compress(sequential(), {"hidden": ("int4", None)}, target="tpu")


def test_update_masks_counts_the_entries_that_changed():
    small = usm.compress(sequential(), {"hidden": ("int4", "1:4"), "out": ("int8", None)})
    assert usm.update_masks(small) == UNITS * UNITS * 3 // 4
    assert usm.update_masks(small) == 0


def test_a_rule_without_a_layer_lists_the_layers_that_could_be_compressed():
    with pytest.raises(ValueError, match=r"matches \['hiden'\].*'sequential/hidden', 'sequential/out'"):
        usm.compress(sequential(), {"hiden": ("int4", None)})


def test_a_layer_that_cannot_be_exchanged_is_named_instead_of_left_out():
    @keras.saving.register_keras_serializable("test_compression")
    class OfSet(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.parts = {dense("lonely")}

        def call(self, x):
            return next(iter(self.parts))(x)

        def get_config(self):
            return {"name": self.name}

    model = OfSet(name="of_set")
    model(X)
    with pytest.raises(ValueError, match="'of_set/lonely'.*cannot be exchanged.*lists, tuples or dicts"):
        usm.compress(model, SPARSE)


def test_a_model_that_is_not_built_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="'bare' is not built; call it on a batch"):
        usm.compress(keras.Sequential([dense("a")], name="bare"), SPARSE)


def test_inputs_that_the_pattern_does_not_divide_are_refused_with_the_layer():
    model = keras.Sequential([keras.Input((6,)), dense("narrow")])
    with pytest.raises(ValueError, match="narrow has 6 inputs.*2:4"):
        usm.compress(model, SPARSE)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "rules must be a dict"),
        ([("a", ("int4", None))], "rules must be a dict"),
        ({"out": "int4"}, r"Rule 'out' must map to \(quantization, sparsity\), got 'int4'"),
        ({"out": ("int4",)}, "must map to"),
        ({"(": ("int4", None)}, "not a regular expression"),
        ({"out": ("int5", None)}, "'int5' is not understood"),
        ({"out": (None, "4:2")}, "n=4, m=2"),
    ],
)
def test_a_rule_that_is_not_understood_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        usm.compress(sequential(), rules)


def test_a_rule_behind_a_more_general_one_is_told_so():
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(4, name="body"), keras.layers.Dense(2, name="head")]
    )
    with pytest.raises(ValueError, match="'head'.*earlier rule"):
        usm.compress(model, {".*": ("int4", None), "head": ("int8", None)})


def test_a_layer_in_place_of_a_model_is_refused():
    with pytest.raises(ValueError, match="needs a keras.Model, got a Dense"):
        usm.compress(keras.layers.Dense(2), {".*": ("int4", None)})


def test_what_keras_has_quantized_or_normalizes_is_refused_with_the_layer():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="body")])
    model.quantize("int8")
    with pytest.raises(ValueError, match="body was quantized by Keras"):
        usm.compress(model, {"body": ("int4", None)})
    wrapped = keras.layers.SpectralNormalization(keras.layers.Dense(4, name="body"))
    with pytest.raises(ValueError, match="body is wrapped in SpectralNormalization"):
        usm.compress(keras.Sequential([keras.Input((8,)), wrapped]), {"body": ("int4", None)})


def test_the_copy_of_a_frozen_model_is_frozen_and_says_so():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.trainable = False
    with pytest.warns(UserWarning, match="is frozen"):
        assert not usm.compress(model, {".*": ("int4", None)}).trainable_variables


@pytest.mark.parametrize("wrap", ["compress", "distil", "co-train"])
def test_what_wraps_a_model_of_float16_scales_its_loss_as_the_model_would(wrap):
    sizes = {"num_layers": 1, "dim": 16, "num_heads": 2, "subsampling_channels": 4, "num_mel_bins": 16}
    model = usm.USMForCTC(9, dtype="mixed_float16", **sizes)
    small = usm.compress(model, {"ffn": ("int4", None)})
    wrapped = {
        "compress": lambda: small,
        "distil": lambda: usm.Distiller(small, model),
        "co-train": lambda: usm.CoTrainer(small),
    }[wrap]()
    wrapped.compile("adam", keras.losses.CTC())
    assert isinstance(wrapped.optimizer, keras.optimizers.LossScaleOptimizer)


def test_the_copy_leaves_inputs_to_the_model_whatever_policy_is_global():
    class Exact(keras.Model):
        def __init__(self):
            super().__init__(autocast=False, dtype="float32")
            self.out = keras.layers.Dense(4, dtype="float32")

        def call(self, inputs):
            return self.out(inputs)

        def get_config(self):
            return {}

        @classmethod
        def from_config(cls, config):
            return cls()

    model, x = Exact(), np.float32(1) + np.arange(32, dtype="float32").reshape(4, 8) / 4096
    model(x)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        copy = usm.compress(model, {"dense": (None, "2:4")})
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(copy(x)), ops.convert_to_numpy(model(x)))
