"""interop: PyTorch reads back exactly the kernel that was trained, and what it cannot take is refused with the fix."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.interop import DTYPES, to_torch_semi_structured
from keras_usm_lite.layers.compressed_layer import CompressedLayer

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")

Q = usm.QuantizationConfig
CONFIGS = {
    "int8 2:4": (Q(bits=8), "2:4"),
    "int4 2:4": (Q(bits=4), "2:4"),
    "int4 1:4": (Q(bits=4), "1:4"),
    "int2 midrise 2:4": (Q(bits=2, scale="mse", codebook="midrise"), "2:4"),
    "int4 asymmetric 2:4": (Q(bits=4, codebook="asymmetric"), "2:4"),
    "int4 per tensor 2:4": (Q(bits=4, per_tensor=True), "2:4"),
}


def built_layer(quantization="int4", sparsity="2:4", inputs=128, units=32, masked=True):
    keras.utils.set_random_seed(0)
    layer = usm.QuantDense(units, quantization, sparsity, name="ffn")
    layer.build((None, inputs))
    layer.kernel.assign(np.random.default_rng(0).normal(0.1, 1.0, (inputs, units)))
    if masked and sparsity is not None:
        layer.update_mask()
    layer.update_scale()
    return layer


def to_dense(weight):
    """PyTorch's own reading of its compressed layout."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    return sparse_semi_structured_to_dense_cutlass(weight.packed, weight.meta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_round_trip_through_torch_is_the_effective_kernel_bit_for_bit(name, dtype):
    layer = built_layer(*CONFIGS[name])
    weight, scale = to_torch_semi_structured(layer, dtype)
    assert isinstance(weight, torch.sparse.SparseSemiStructuredTensor)
    assert weight.shape == (32, 128) and weight.packed.shape == (32, 64) and weight.dtype == getattr(torch, dtype)
    kernel = (to_dense(weight).float() * scale[:, None]).T
    np.testing.assert_array_equal(kernel.numpy(), ops.convert_to_numpy(layer.effective_kernel()))


def test_a_float_kernel_is_rounded_to_the_nearest_value_of_the_type():
    layer = built_layer(quantization=None)
    weight, scale = to_torch_semi_structured(layer, "float16")
    assert (scale == 1).all()
    expected = ops.convert_to_numpy(layer.effective_kernel()).astype("float16")
    np.testing.assert_array_equal(to_dense(weight).T.numpy(), expected)


def test_other_layers_with_a_2_4_kernel_convert_as_matrices():
    wrapped = CompressedLayer(keras.layers.Conv1D(32, 2), "int4", "2:4")
    wrapped.build((None, 10, 64))
    wrapped.update_mask()
    weight, scale = to_torch_semi_structured(wrapped)
    kernel = (to_dense(weight).float() * scale[:, None]).T
    np.testing.assert_array_equal(kernel.numpy(), ops.convert_to_numpy(wrapped.effective_kernel()))


@pytest.mark.parametrize("sparsity, masked", [("2:4", False), ("4:8", True), (None, True)])
def test_kernels_that_are_not_2_4_are_refused(sparsity, masked):
    with pytest.raises(ValueError, match="'ffn' has sparsity .* of 1024 groups.*more than 2 non-zeros.*update_masks"):
        to_torch_semi_structured(built_layer(sparsity=sparsity, masked=masked))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["CUTLASS", "CUSPARSELT"])
def test_shapes_are_multiples_of_what_both_backends_of_torch_demand(dtype, backend):
    demands = getattr(torch.sparse, f"SparseSemiStructuredTensor{backend}")._DTYPE_SHAPE_CONSTRAINTS
    _, outputs, inputs = DTYPES[dtype]
    demand = demands[getattr(torch, dtype)]
    assert outputs % demand.sparse_min_rows == 0 and inputs % demand.sparse_min_cols == 0
    for shape in ({"inputs": inputs + 8}, {"units": outputs + 8}):
        with pytest.raises(ValueError, match=f"multiples of {inputs} inputs and {outputs} outputs as {dtype}"):
            to_torch_semi_structured(built_layer(**{"inputs": inputs, "units": outputs, **shape}), dtype)


def test_what_cannot_be_exact_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="float32' is not known.*bfloat16, float16, int8.*1:2"):
        to_torch_semi_structured(built_layer(), "float32")
    with pytest.raises(ValueError, match="one scale per 16 inputs.*block_size=None"):
        to_torch_semi_structured(built_layer(Q(bits=4, form="fake", block_size=16)))
    with pytest.raises(ValueError, match="integers up to .* and int8 holds those up to 127"):
        shifted = built_layer(Q(bits=8, codebook="asymmetric"))
        shifted.kernel.assign(ops.abs(ops.convert_to_tensor(shifted.kernel)))
        to_torch_semi_structured(shifted, "int8")
    with pytest.raises(ValueError, match="'ffn' is not quantized; choose dtype"):
        to_torch_semi_structured(built_layer(quantization=None), "int8")
    with pytest.raises(ValueError, match="Dense has no compressed kernel; give a QuantDense"):
        to_torch_semi_structured(keras.layers.Dense(3))
