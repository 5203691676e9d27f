"""SparsityConfig: shorthands, serialisation and refused values."""

import json

import keras
import numpy as np
import pytest

from keras_usm_lite.sparsity_config import SparsityConfig


@pytest.mark.parametrize("text, n, m", [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("3:16", 3, 16)])
def test_shorthands_are_non_zeros_of_group(text, n, m):
    config = SparsityConfig.resolve(text)
    assert (config.n, config.m, str(config)) == (n, m, text)


def test_a_config_survives_keras_serialisation():
    config = SparsityConfig(n=1, m=8, gradient="sr_ste", every_step=True, sr_ste_decay=1e-3)
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(config)) == config
    assert SparsityConfig.resolve(config.get_config()) == config


def test_integers_of_numpy_are_kept_as_plain_ones():
    config = SparsityConfig(np.int64(2), np.int32(4))
    assert config == SparsityConfig(2, 4) and json.dumps(config.get_config())


@pytest.mark.parametrize("n, m", [(0, 4), (4, 4), (5, 4), (2, 17), (2.0, 4), (True, 4)])
def test_patterns_that_prune_nothing_or_everything_are_refused(n, m):
    with pytest.raises(ValueError, match="1 <= n < m <= 16"):
        SparsityConfig(n=n, m=m)


@pytest.mark.parametrize("value", ["2/4", "2:", 2, (2, 4)])
def test_unknown_shorthands_are_refused(value):
    with pytest.raises(ValueError, match="'2:4'"):
        SparsityConfig.resolve(value)


def test_unknown_gradients_and_negative_decay_are_refused():
    with pytest.raises(ValueError, match="gradient='soft'"):
        SparsityConfig(gradient="soft")
    with pytest.raises(ValueError, match="negative"):
        SparsityConfig(sr_ste_decay=-1.0)
