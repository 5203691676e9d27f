"""bake: the float copy computes what the compressed model computes, and nothing of this package is left in it."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.export.bake import bake
from keras_usm_lite.rewrite import layer_path, walk_layers

SIZE = {"num_layers": 1, "dim": 32, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": 16}
CONFIGS = {
    "int8": ("int8", None),
    "int4 2:4": ("int4", "2:4"),
    "int4 blocks": (usm.QuantizationConfig(bits=4, form="fake", block_size=8), None),
    "int4 asymmetric 1:4": (usm.QuantizationConfig(bits=4, codebook="asymmetric"), "1:4"),
    "int2 mse": (usm.QuantizationConfig(bits=2, scale="mse"), None),
    "int2 midrise 2:4": (usm.QuantizationConfig(bits=2, scale="mse", codebook="midrise"), "2:4"),
    "2:4": (None, "2:4"),
    "float": (None, None),
}


def array(tensor):
    return ops.convert_to_numpy(tensor)


def with_random_biases(model):
    draw = np.random.default_rng(0)
    for weight in model.trainable_variables:
        weight.assign(array(weight) + 0.1 * draw.normal(size=weight.shape))
    usm.update_masks(model)
    return model


def recogniser(quantization=None, sparsity=None):
    keras.utils.set_random_seed(0)
    return with_random_biases(usm.USMForCTC(9, quantization=quantization, sparsity=sparsity, **SIZE))


def features():
    return np.random.default_rng(1).normal(size=(2, 40, 16)).astype("float32")


def compressed_dense(model):
    return [layer for layer in walk_layers(model) if isinstance(layer, usm.QuantDense)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_baked_model_computes_the_same_with_float_layers_only(name):
    model = recogniser(*CONFIGS[name])
    baked = bake(model)
    assert type(baked) is usm.USMForCTC
    assert compressed_dense(model) and not compressed_dense(baked)
    np.testing.assert_allclose(array(baked(features())), array(model(features())), rtol=1e-5, atol=1e-5)


def test_every_dense_kernel_is_an_effective_kernel_under_the_same_path():
    model = recogniser("int4", "2:4")
    baked = {layer_path(layer): layer for layer in walk_layers(bake(model)) if type(layer) is keras.layers.Dense}
    assert {layer_path(layer) for layer in compressed_dense(model)} == set(baked)
    for layer in usm.compressed_layers(model):
        path = layer_path(layer)
        np.testing.assert_array_equal(array(baked[path].kernel), array(layer.effective_kernel()))
        groups = array(baked[path].kernel).reshape(-1, 4, layer.units)
        assert np.count_nonzero(groups, axis=1).max() == 2


def test_the_original_is_left_as_it_was():
    model = recogniser("int4", "2:4")
    weights, logits = [array(weight).copy() for weight in model.weights], array(model(features()))
    layers = compressed_dense(model)
    baked = bake(model)
    for weight in baked.weights:
        weight.assign(np.zeros(weight.shape, "float32"))
    assert compressed_dense(model) == layers
    for before, after in zip(weights, model.weights, strict=True):
        np.testing.assert_array_equal(array(after), before, err_msg=after.path)
    np.testing.assert_array_equal(array(model(features())), logits)


def test_a_compressed_model_is_baked_into_the_class_it_was_made_from():
    small = usm.compress(recogniser(), {"ffn": ("int4", "2:4"), "attention|head": ("int8", None)})
    usm.update_masks(small)
    baked = bake(small)
    assert isinstance(small, usm.CompressedModel) and type(baked) is usm.USMForCTC
    assert not compressed_dense(baked)
    np.testing.assert_allclose(array(baked(features())), array(small(features())), rtol=1e-5, atol=1e-5)


def test_a_functional_model_keeps_activations_and_missing_biases():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16,))
    hidden = usm.QuantDense(8, "int4", "2:4", activation="relu", name="hidden")(inputs)
    model = keras.Model(inputs, usm.QuantDense(3, "int8", use_bias=False, name="out")(hidden))
    with_random_biases(model)
    baked = bake(model)
    assert [type(layer) for layer in baked.layers[1:]] == [keras.layers.Dense] * 2
    assert baked.get_layer("hidden").activation is keras.activations.relu and not baked.get_layer("out").use_bias
    x = np.random.default_rng(2).normal(size=(4, 16)).astype("float32")
    np.testing.assert_allclose(array(baked(x)), array(model(x)), rtol=1e-5, atol=1e-5)


def test_a_model_that_is_not_built_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="'young' is not built.*build"):
        bake(keras.Sequential([usm.QuantDense(2)], name="young"))
