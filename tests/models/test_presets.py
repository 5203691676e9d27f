"""Presets: the sizes they promise, counted without allocating the large ones."""

import keras
import numpy as np
import pytest

import keras_usm_lite as usm
from keras_usm_lite.models.presets import PRESETS, preset


def block_weights(num_layers, dim, kernel_size, **_):
    return num_layers * (23 * dim**2 + kernel_size * dim)


def kernels(encoder):
    """Number of weights in the kernels of the Conformer blocks."""
    weights = [weight for block in encoder.blocks for weight in block.trainable_variables]
    return sum(int(np.prod(weight.shape)) for weight in weights if weight.name == "kernel")


def shape_only(**arguments):
    """An encoder whose weights have shapes but no values."""
    with keras.StatelessScope(initialize_variables=False):
        encoder = usm.USMEncoder(**arguments)
        encoder.build((None, None, 80))
    keras.utils.clear_session(free_memory=False)  # forgets that the weights wait for their values
    return encoder


@pytest.mark.parametrize("name", PRESETS)
def test_the_blocks_hold_the_weights_of_the_formula(name):
    assert kernels(shape_only(**preset(name))) == block_weights(**preset(name))


@pytest.mark.parametrize("name, billions", [("usm_0.6b", 0.579), ("usm_2b", 1.737)])
def test_the_large_presets_have_the_size_of_the_published_encoders(name, billions):
    assert round(block_weights(**preset(name)) / 1e9, 3) == billions


@pytest.mark.parametrize("name, least, most", [("tiny", 0.8e6, 1.2e6), ("small", 8e6, 11e6)])
def test_the_small_presets_are_as_small_as_they_say(name, least, most):
    encoder = shape_only(**preset(name))
    with_head = encoder.count_params() + 64 * (preset(name)["dim"] + 1)
    assert least < with_head < most


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "8:16"])
def test_every_pattern_divides_every_kernel(name, pattern):
    shape_only(**{**preset(name), "num_layers": 1}, sparsity=pattern)


def test_a_preset_is_the_callers_to_change():
    preset("tiny")["dim"] = 7
    assert preset("tiny")["dim"] == 96


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="preset='huge' is not known; choose one of tiny, small, usm_0.6b, usm_2b"):
        preset("huge")
