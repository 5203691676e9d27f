"""NMSparseDense: sparse by default, quantized on request."""

import numpy as np
from keras import ops
from keras.src.testing import TestCase

import keras_usm_lite as usm


class LayerContract(TestCase):
    def test_nm_sparse_dense_keeps_every_promise_of_a_keras_layer(self):
        self.run_layer_test(
            usm.NMSparseDense,
            init_kwargs={"units": 5, "sparsity": "1:4"},
            input_shape=(3, 8),
            expected_output_shape=(3, 5),
            expected_num_trainable_weights=2,
            expected_num_non_trainable_weights=2,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=True,
        )


def test_the_two_classes_compose_to_the_same_layer():
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    sparse_first = usm.NMSparseDense(3, "2:4", quantization="int4", kernel_initializer="he_normal")
    quant_first = usm.QuantDense(3, "int4", sparsity="2:4")
    sparse_first.build((None, 8)), quant_first.build((None, 8))
    quant_first.set_weights(sparse_first.get_weights())
    sparse_first.update_mask(), quant_first.update_mask()
    np.testing.assert_array_equal(ops.convert_to_numpy(sparse_first(x)), ops.convert_to_numpy(quant_first(x)))


def test_a_layer_is_dense_until_its_first_mask():
    layer = usm.NMSparseDense(3, "1:4")
    layer.build((None, 8))
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.effective_kernel()), ops.convert_to_numpy(layer.kernel))
    assert layer.update_mask() == 18
    assert layer.update_mask() == 0
