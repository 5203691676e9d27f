"""permute_channels: the model computes what it did, and its masks keep more."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.layers.compressed_layer import CompressedLayer
from keras_usm_lite.layers.feed_forward import FeedForward
from keras_usm_lite.layers.light_conv import LightConv
from keras_usm_lite.layers.relative_attention import RelativeSelfAttention
from keras_usm_lite.permutation import permute_channels

SIZE = {"num_layers": 1, "dim": 16, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": 16}
BATCH = {
    "features": np.random.default_rng(0).normal(size=(2, 32, 16)).astype("float32"),
    "lengths": np.array([32, 21], "int32"),
}
Quantized = usm.QuantizationConfig
CONFIGS = {
    "2:4": (None, "2:4"),
    "int4 2:4": ("int4", "2:4"),
    "int8 dynamic 3:4": (Quantized(bits=8, activations="dynamic"), "3:4"),
    "int4 asymmetric": (Quantized(bits=4, codebook="asymmetric", scale="mse"), "2:4"),
    "int4 per tensor": (Quantized(bits=4, per_tensor=True), "2:4"),
    "int2 mse midrise": (Quantized(bits=2, scale="mse", codebook="midrise"), "2:4"),
    "int2 learned": (Quantized(bits=2, scale="learned"), "2:4"),
    "every step": (None, usm.SparsityConfig(2, 4, gradient="sr_ste", every_step=True)),
    "activation-weighted": ("int4", usm.SparsityConfig(2, 4, score="activation")),
}
MOVED = {"kernel_scale", "input_norm"}  # state that differs between channels and has to move with them


def array(tensor):
    return ops.convert_to_numpy(tensor)


def randomize(model):
    """Give every channel something of its own: biases, norms, trained scales, calibrated inputs."""
    draw = np.random.default_rng(0)
    for weight in model.trainable_variables:
        factor = draw.uniform(0.5, 1.5, size=weight.shape)
        weight.assign(array(weight) * factor + (0 if weight.name in MOVED else 0.1 * draw.normal(size=weight.shape)))
    for layer in usm.compressed_layers(model):
        layer.update_scale(only=("mse",))
        if hasattr(layer, "input_norm"):
            layer.input_norm.assign(draw.uniform(0.5, 1.5, size=layer.input_norm.shape))
    return model


def recogniser(quantization=None, sparsity="2:4"):
    keras.utils.set_random_seed(0)
    return randomize(usm.USMForCTC(9, quantization=quantization, sparsity=sparsity, **SIZE))


def kept(layer):
    """What a new mask of the layer would keep of its scores."""
    scores = array(layer.mask_scores())
    groups = np.sort(scores.reshape(-1, layer.sparsity.m, scores.shape[1]), axis=1)
    return float(np.sum(groups[:, layer.sparsity.m - layer.sparsity.n :], dtype="float64"))


def weights_of(model):
    return [array(weight) for weight in model.weights]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_do_not_change_and_every_mask_keeps_more(name):
    model = recogniser(*CONFIGS[name])
    consumers = {layer.path: layer for layer in usm.compressed_layers(model)}
    before, kept_before = array(model(BATCH)), {path: kept(layer) for path, layer in consumers.items()}
    gains = permute_channels(model, sweeps=20)
    places = ("ffn_start/down", "attention/output", "conv/project", "ffn_end/down")
    assert [path.split("/", 3)[-1] for path in gains] == list(places)
    tolerance = 0.05 if "dynamic" in name else 1e-4  # a rounding error may move an input to the next integer
    np.testing.assert_allclose(array(model(BATCH)), before, atol=tolerance)
    for path, gain in gains.items():
        assert gain > 0
        assert kept(consumers[path]) == pytest.approx(kept_before[path] * (1 + gain), rel=1e-6)
    for path in consumers.keys() - gains.keys():  # a producer's columns only change places
        assert kept(consumers[path]) == pytest.approx(kept_before[path], rel=1e-6)


def test_frozen_scales_and_producers_that_are_pruned_already_move_with_their_columns():
    model = recogniser("int4", "2:4")
    for layer in usm.compressed_layers(model):
        layer.freeze_scale()
        layer.kernel.assign(1.2 * array(layer.kernel))
        if layer.name in ("up", "expand", "value"):
            layer.update_mask()
    before = array(model(BATCH))
    assert min(permute_channels(model, sweeps=20).values()) > 0
    np.testing.assert_allclose(array(model(BATCH)), before, atol=1e-4)


def test_learned_scales_that_are_frozen_move_with_their_columns():
    model = recogniser(usm.QuantizationConfig(4, scale="learned"), "2:4")
    draw = np.random.default_rng(0)
    for layer in usm.compressed_layers(model):
        layer.set_frozen_scale(array(layer.kernel_scale) * draw.uniform(0.5, 1.5, layer.kernel_scale.shape))
    before = array(model(BATCH))
    permute_channels(model, sweeps=20)
    np.testing.assert_allclose(array(model(BATCH)), before, atol=1e-4)


def test_compressed_depthwise_kernels_move_too():
    model = usm.compress(recogniser(None, None), {"depthwise": ("int8", None), "block.*conv": ("int4", "2:4")})
    before = array(model(BATCH))
    gains = permute_channels(model, sweeps=20)
    assert any(path.endswith("conv/project") for path in gains)
    np.testing.assert_allclose(array(model(BATCH)), before, atol=1e-4)


@pytest.mark.parametrize("layer_class", [FeedForward, LightConv, RelativeSelfAttention])
def test_layers_are_found_in_any_model(layer_class):
    arguments = {FeedForward: {}, LightConv: {"kernel_size": 3}, RelativeSelfAttention: {"num_heads": 2}}[layer_class]
    inner = keras.Sequential([keras.Input((10, 16)), layer_class(sparsity="2:4", **arguments)])
    model = randomize(keras.Sequential([keras.Input((10, 16)), inner, keras.layers.Dense(2)]))
    x = np.random.default_rng(0).normal(size=(2, 10, 16)).astype("float32")
    before = array(model(x))
    (gain,) = permute_channels(model).values()
    assert gain > 0
    np.testing.assert_allclose(array(model(x)), before, atol=1e-5)


class Between(keras.layers.Layer):
    """A projection of ones own, then a sparse one."""

    def __init__(self, first):
        super().__init__()
        self.first, self.second = first, usm.NMSparseDense(3, "2:4")

    def build(self, shape):
        self.first.build(shape)
        self.second.build((*shape[:-1], 12))

    def call(self, x):
        return self.second(ops.tanh(self.first(x)))

    def free_channels(self):
        return self.second, 1, [self.first]


def test_a_layer_of_ones_own_says_which_channels_are_free():
    model = randomize(keras.Sequential([keras.Input((5,)), Between(keras.layers.Dense(12))]))
    x = np.random.default_rng(0).normal(size=(2, 5)).astype("float32")
    before = array(model(x))
    (gain,) = permute_channels(model).values()
    assert gain > 0
    np.testing.assert_allclose(array(model(x)), before, atol=1e-5)


def test_the_bias_of_a_compressed_layer_moves_with_its_kernel():
    first = CompressedLayer(keras.layers.EinsumDense("abc,cd->abd", (None, 12), bias_axes="d"), "int4")
    model = randomize(keras.Sequential([keras.Input((7, 5)), Between(first)]))
    x = np.random.default_rng(0).normal(size=(2, 7, 5)).astype("float32")
    before, bias = array(model(x)), array(first.layer.bias)
    permute_channels(model)
    assert (array(first.layer.bias) != bias).any()
    np.testing.assert_allclose(array(model(x)), before, atol=1e-5)


class Normed(keras.layers.Layer):
    """A layer between whose two projections each channel has numbers of its own, in a layer of Keras."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.second = keras.layers.Dense(12), middle, usm.NMSparseDense(3, "2:4")

    def build(self, input_shape):
        self.first.build(input_shape)
        self.middle.build((*input_shape[:-1], 12))
        self.second.build((*input_shape[:-1], 12))

    def call(self, x):
        return self.second(self.middle(self.first(x)))

    def free_channels(self):
        return self.second, 1, [self.first, self.middle]


@pytest.mark.parametrize("kind", ["BatchNormalization", "LayerNormalization", "RMSNormalization", "PReLU"])
def test_what_a_layer_in_between_holds_for_each_channel_moves_along(kind):
    model = keras.Sequential([keras.Input((5,)), Normed(getattr(keras.layers, kind)())])
    draw = np.random.default_rng(0)
    for weight in model.weights:
        if weight.name != "mask":
            weight.assign(draw.uniform(0.5, 1.5, size=weight.shape) * draw.choice([1, 1, 2], size=weight.shape))
    x = draw.normal(size=(4, 5)).astype("float32")
    before = array(model(x))
    assert next(iter(permute_channels(model).values())) > 0
    np.testing.assert_allclose(array(model(x)), before, rtol=1e-4, atol=1e-4)


class Shifted(keras.layers.Layer):
    def build(self, input_shape):
        self.shift = self.add_weight(name="shift", shape=input_shape[-1:])

    def call(self, x):
        return x + self.shift


def test_a_layer_in_between_whose_numbers_are_not_known_is_refused_and_nothing_moves():
    model = keras.Sequential([keras.Input((5,)), Normed(Shifted())])
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"\(Shifted\) has '.*shift', of which is not known whether it moves"):
        permute_channels(model)
    for old, new in zip(before, weights_of(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_kernels_whose_channels_lie_elsewhere_are_refused_and_nothing_moves():
    model = randomize(keras.Sequential([keras.Input((7, 5)), Between(keras.layers.Conv1D(12, 1))]))
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"Conv1D\) has a kernel of shape \[1, 5, 12\].*leave this layer out"):
        permute_channels(model)
    for weight, old in zip(weights_of(model), before, strict=True):
        np.testing.assert_array_equal(weight, old)


def test_heads_that_groups_straddle_are_left_alone():
    model = recogniser(None, "8:16")  # two heads of 8 channels
    assert {path.rsplit("/", 1)[1] for path in permute_channels(model, sweeps=5)} == {"down", "project"}


def test_same_seed_gives_the_same_weights():
    models = [recogniser() for _ in range(2)]
    for model in models:
        permute_channels(model, sweeps=20, seed=3)
    for one, other in zip(*map(weights_of, models), strict=True):
        np.testing.assert_array_equal(one, other)


def refused(model, match):
    """Assert that nothing is changed by a refusal."""
    before = weights_of(model)
    with pytest.raises(ValueError, match=match):
        permute_channels(model)
    for old, new in zip(before, weights_of(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_models_that_are_pruned_already_are_refused():
    model = recogniser()
    model.encoder.blocks[-1].ffn_end.down.update_mask()
    refused(model, "ffn_end/down' has a mask already \\(it keeps 50%\\)")


def test_scales_of_blocks_of_inputs_are_refused_and_the_advice_works():
    blocks = Quantized(bits=4, form="fake", block_size=8)
    refused(recogniser(blocks, "2:4"), "one scale per 8 inputs.*compress")
    model = usm.compress(recogniser(None, None), {"down|project": (None, "2:4")})
    before = array(model(BATCH))
    assert permute_channels(model, sweeps=5)
    np.testing.assert_allclose(array(model(BATCH)), before, atol=1e-4)
    model = usm.compress(model, {"down|project": (blocks, "2:4")})
    assert all(layer.quantization == blocks for layer in usm.compressed_layers(model))


def test_models_in_training_are_refused():
    model = recogniser()
    model.compile("adam")
    assert permute_channels(model, sweeps=5)
    model.optimizer.build(model.trainable_variables)
    refused(model, "averages of gradients")


def test_models_without_anything_to_permute_are_refused():
    refused(recogniser("int4", None), "no N:M sparse projection")
    refused(usm.compress(recogniser(None, None), {"up|expand": (None, "2:4")}), "no N:M sparse projection")
