"""ConformerBlock: how its modules are put together, how many weights they hold, and that padding is never heard."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.testing import TestCase

import keras_usm_lite as usm
from keras_usm_lite.layers.masking import frame_mask

DIM = 16
COMPRESSED = {"quantization": "int4", "sparsity": "2:4"}


def array(tensor):
    return ops.convert_to_numpy(tensor)


def built(**kwargs):
    """A block whose biases are not zero, so that padding would be heard if it could."""
    keras.utils.set_random_seed(0)
    block = usm.ConformerBlock(num_heads=2, **{"kernel_size": 5, **kwargs})
    block.build((None, None, DIM))
    draw = np.random.default_rng(0)
    for weight in block.trainable_variables:
        weight.assign(array(weight) + 0.2 * draw.normal(size=weight.shape))
    for layer in block._flatten_layers():
        if isinstance(layer, usm.QuantDense) and layer.sparsity:
            layer.update_mask()
    return block


def frames(*shape):
    return np.random.default_rng(1).normal(size=(*shape, DIM)).astype("float32")


def normalised(x, norm):
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    return x * array(norm.gamma) + array(norm.beta)


class LayerContract(TestCase):
    def test_conformer_block_keeps_every_promise_of_a_keras_layer(self):
        self.run_layer_test(
            usm.ConformerBlock,
            init_kwargs={"num_heads": 2, "kernel_size": 3, "chunk_size": 4, "causal_conv": True, **COMPRESSED},
            input_shape=(2, 6, 8),
            expected_output_shape=(2, 6, 8),
            expected_num_trainable_weights=29,
            expected_num_non_trainable_weights=50,
            expected_num_seed_generators=4,
            expected_num_losses=0,
            supports_masking=True,
        )


@pytest.mark.parametrize("dim, kernel_size", [(8, 3), (16, 5), (32, 9)])
def test_the_matrices_hold_23_d_squared_weights_and_the_depthwise_kernel_k_d(dim, kernel_size):
    block = usm.ConformerBlock(num_heads=2, kernel_size=kernel_size)
    block.build((None, None, dim))
    kernels = [weight for weight in block.trainable_variables if weight.name == "kernel"]
    assert sum(np.prod(kernel.shape) for kernel in kernels if len(kernel.shape) == 2) == 23 * dim**2
    assert [np.prod(kernel.shape) for kernel in kernels if len(kernel.shape) != 2] == [kernel_size * dim]


def test_every_matrix_is_compressed():
    block = built(**COMPRESSED)
    dense = [layer for layer in block._flatten_layers() if isinstance(layer, usm.QuantDense)]
    assert sum(np.prod(layer.kernel.shape) for layer in dense) == 23 * DIM**2
    for layer in dense:
        assert (layer.quantization.bits, str(layer.sparsity)) == (4, "2:4")
        assert np.mean(array(layer.effective_kernel()) == 0) >= 0.5


def test_the_modules_are_added_in_order_with_half_steps_around():
    block = built()
    x = frames(2, 7)
    y = x + 0.5 * array(block.ffn_start(x))
    y = y + array(block.attention(normalised(y, block.attention_norm)))
    y = y + array(block.conv(y))
    y = y + 0.5 * array(block.ffn_end(y))
    np.testing.assert_allclose(array(block(x)), normalised(y, block.norm), rtol=1e-4, atol=1e-4)


def test_modules_that_say_nothing_leave_the_normalised_input():
    block = built()
    for last in (block.ffn_start.down, block.attention.output_projection, block.conv.project, block.ffn_end.down):
        for weight in last.trainable_variables:
            weight.assign(np.zeros(weight.shape))
    x = frames(2, 7)
    np.testing.assert_allclose(array(block(x)), normalised(x, block.norm), rtol=1e-5, atol=1e-5)


def test_dropout_of_everything_takes_every_module_away_in_training():
    block = built(dropout=1 - 1e-7)
    x = frames(2, 7)
    y = array(block(x, training=True))
    np.testing.assert_allclose(y, normalised(x, block.norm), rtol=1e-5, atol=1e-5)
    assert np.abs(array(block(x)) - y).max() > 0.1


@pytest.mark.parametrize("compression", [{}, COMPRESSED])
@pytest.mark.parametrize("streaming", [{}, {"chunk_size": 4, "causal_conv": True}])
def test_an_utterance_is_the_same_alone_and_in_a_padded_batch(streaming, compression):
    block = built(**streaming, **compression)
    lengths = [12, 9, 2]
    x = frames(3, 12)
    y = array(block(x, mask=frame_mask(lengths, 12)))
    for row, source, length in zip(y, x, lengths, strict=True):
        np.testing.assert_allclose(row[:length], array(block(source[None, :length]))[0], rtol=1e-5, atol=2e-5)
    if not streaming:  # without the mask padding would be heard
        assert np.abs(array(block(x))[1, :9] - y[1, :9]).max() > 1e-3


def test_a_streaming_block_never_looks_beyond_its_chunk():
    block = built(chunk_size=4, causal_conv=True)
    x = frames(1, 12)
    changed = np.concatenate([x[:, :4], frames(1, 20)[:, 12:]], axis=1)
    assert changed.shape == x.shape
    np.testing.assert_allclose(array(block(changed))[:, :4], array(block(x))[:, :4], rtol=1e-5, atol=1e-5)
    assert np.abs(array(block(changed))[:, 4:] - array(block(x))[:, 4:]).max() > 0.1


def test_a_mask_made_by_keras_is_obeyed():
    inputs = keras.Input((12, DIM))
    block = built()
    model = keras.Model(inputs, block(keras.layers.Masking()(inputs)))
    x = frames(1, 12)
    x[:, 8:] = 0
    expected = block(x, mask=frame_mask([8], 12))
    np.testing.assert_allclose(model.predict(x, verbose=0)[:, :8], array(expected)[:, :8], rtol=1e-5, atol=1e-5)
