"""Building a model under a budget: nothing is allocated, and too much is refused."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.packing.weight_budget import weight_budget


def built(units, layers=1):
    return keras.Sequential(
        [keras.Input((8,)), *[usm.QuantDense(units, "int4", sparsity="2:4") for _ in range(layers)]]
    )


def test_a_model_of_petabytes_is_refused_when_its_first_variable_is_created():
    with pytest.raises(ValueError, match="more than 100 variables or 1000 elements"), weight_budget(100, 1000):
        built(10**14)


def test_too_many_variables_are_refused_however_small():
    with pytest.raises(ValueError, match="more than 20 variables"), weight_budget(20, 10**9):
        for _ in range(10**6):
            keras.Variable(keras.initializers.Zeros(), shape=(0,))


def test_a_model_within_the_budget_is_built_and_the_budget_is_exact():
    sizes = [int(np.prod(weight.shape)) for weight in built(16, 2).weights]
    with weight_budget(len(sizes), sum(sizes)):
        assert built(16, 2).built
    for budget in ((len(sizes) - 1, sum(sizes)), (len(sizes), sum(sizes) - 1)):
        with pytest.raises(ValueError, match="are created"), weight_budget(*budget):
            built(16, 2)


@pytest.mark.parametrize("limit", [10, 10**6])
def test_models_are_built_as_ever_after_a_budget(limit):
    for _ in range(2):
        try:
            with weight_budget(limit, limit):
                built(16)
        except ValueError:
            pass
        model = built(16)
        assert np.isfinite(ops.convert_to_numpy(model(np.ones((1, 8), "float32")))).all()
