"""OffsetDense: the product with a shifted kernel, without the shifted kernel."""

import keras
import numpy as np
import pytest

from keras_usm_lite.export.offset_dense import OffsetDense

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(3, 4, 8)).astype("float32")
KERNEL, OFFSET, BIAS = (DRAW.normal(size=shape).astype("float32") for shape in ((8, 5), (5,), (5,)))


@pytest.mark.parametrize("use_bias", [True, False])
def test_it_is_a_dense_layer_with_the_offset_added_to_every_weight(use_bias):
    layer = OffsetDense(5, "relu", use_bias)
    layer.build(X.shape)
    layer.set_weights([KERNEL, OFFSET, BIAS] if use_bias else [KERNEL, OFFSET])
    dense = keras.layers.Dense(5, "relu", use_bias)
    dense.build(X.shape)
    dense.set_weights([KERNEL + OFFSET, BIAS] if use_bias else [KERNEL + OFFSET])
    outputs, expected = (keras.ops.convert_to_numpy(one(X)) for one in (layer, dense))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    assert outputs.shape == layer.compute_output_shape(X.shape)


def test_it_comes_back_from_its_configuration():
    layer = OffsetDense(5, "relu", use_bias=False, name="offset")
    assert OffsetDense.from_config(layer.get_config()).get_config() == layer.get_config()
