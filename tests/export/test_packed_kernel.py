"""PackedKernel: TensorFlow unpacks what pack_layer packed, bit for bit, once per load."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.packing.bits import pack_bits

if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs the TensorFlow backend", allow_module_level=True)

import tensorflow as tf  # noqa: E402

from keras_usm_lite.export.packed_kernel import PackedKernel, unpack_stream  # noqa: E402

Q = usm.QuantizationConfig
CONFIGS = {
    "int8": (Q(bits=8), None),
    "int4 2:4": (Q(bits=4), "2:4"),
    "int3 4:8": (Q(bits=3), "4:8"),  # words of 31 bits
    "int2 1:4": (Q(bits=2, scale="mse"), "1:4"),
    "int1 midrise 2:4": (Q(bits=1, scale="mse", codebook="midrise"), "2:4"),
    "int2 midrise": (Q(bits=2, scale="mse", codebook="midrise"), None),
    "int4 asymmetric 2:4": (Q(bits=4, codebook="asymmetric"), "2:4"),
    "int4 asymmetric blocks": (Q(bits=4, form="fake", codebook="asymmetric", block_size=8), "2:4"),
    "int4 per tensor": (Q(bits=4, per_tensor=True), "2:4"),
    "float 1:8": (None, "1:8"),
}


def built_layer(quantization, sparsity, inputs=48, units=10):
    keras.utils.set_random_seed(0)
    layer = usm.QuantDense(units, quantization, sparsity)
    layer.build((None, inputs))
    layer.kernel.assign(np.random.default_rng(0).normal(0.1, 1.0, (inputs, units)))
    if sparsity is not None:
        layer.update_mask()
    layer.update_scale()
    return layer


@given(st.integers(1, 31), st.data())
@settings(max_examples=60, deadline=None)
def test_a_stream_of_any_width_is_read_back(bits, data):
    values = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40)), np.int64)
    read = unpack_stream(tf.constant(pack_bits(values, bits)), bits, len(values))
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_unpacked_kernel_is_the_effective_kernel_bit_for_bit(name):
    layer = built_layer(*CONFIGS[name])
    kernel = PackedKernel(layer, "layer")
    np.testing.assert_array_equal(kernel.read(), ops.convert_to_numpy(layer.effective_kernel()))
    assert len(np.unique(kernel.read())) > 1


def test_what_is_stored_has_the_promised_number_of_bits():
    stored = PackedKernel(built_layer("int4", "2:4", 4000, 10), "layer").arrays
    assert {name: variable.dtype.name for name, variable in stored.items()} == {
        "codes": "uint8",
        "patterns": "uint8",
        "scale": "float32",
    }
    assert stored["codes"].shape[0] * 8 == 2 * 4000 * 10 and stored["patterns"].shape[0] * 8 == 0.65 * 4000 * 10


def test_kernels_of_other_values_or_codebooks_are_kept_apart():
    layers = [built_layer("int4", "2:4"), built_layer("int4", "2:4"), built_layer("int2", "2:4")]
    layers[1].kernel.assign(-layers[1].kernel)
    kernels = [PackedKernel(layer, "layer") for layer in layers]
    for kernel, layer in zip(kernels, layers, strict=True):
        np.testing.assert_array_equal(kernel.read(), ops.convert_to_numpy(layer.effective_kernel()))


def test_a_layer_that_cannot_be_packed_is_named():
    layer = usm.QuantDense(4, "int4", "2:4")
    layer.build((None, 8))
    with pytest.raises(ValueError, match="'block/ffn'.*2:4.*update_masks"):
        PackedKernel(layer, "block/ffn")
