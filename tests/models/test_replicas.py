"""replica_share: what Keras divides its own losses by. Whole trainings: `tests/test_distribution.py`."""

import types

import keras
import numpy as np
import pytest
from keras import ops

from keras_usm_lite.models.replicas import replica_share


def array(tensor):
    return ops.convert_to_numpy(tensor)


def test_without_a_strategy_a_mean_counts_whole():
    assert array(replica_share()) == 1.0 and array(replica_share()).dtype == np.float32


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's")
def test_of_four_replicas_each_counts_a_quarter_as_in_keras_own_losses(monkeypatch):
    import tensorflow as tf

    mean = array(keras.losses.MeanSquaredError()(np.zeros((2, 3)), np.full((2, 3), 2.0)))
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: types.SimpleNamespace(num_replicas_in_sync=4))
    assert array(replica_share()) == 0.25
    assert array(keras.losses.MeanSquaredError()(np.zeros((2, 3)), np.full((2, 3), 2.0))) == 0.25 * mean
