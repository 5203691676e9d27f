"""Hand compressed kernels to other libraries: PyTorch's semi-structured tensors, for NVIDIA's sparse tensor cores."""

import numpy as np
from keras import ops

from keras_usm_lite.core.nm_mask import nm_violations
from keras_usm_lite.layers.compressed_kernel import CompressedKernel
from keras_usm_lite.rewrite import layer_path

# dtype: (largest integer up to which all are exact, multiple of outputs, multiple of inputs), for both of PyTorch's
# backends. float32 is missing as its sparse tensor cores take 1:2, not 2:4.
DTYPES = {"bfloat16": (256, 32, 64), "float16": (2048, 32, 64), "int8": (127, 32, 128)}


def to_torch_semi_structured(layer, dtype="bfloat16", device="cpu"):
    """Convert a 2:4 kernel into a tensor that PyTorch multiplies by on NVIDIA's sparse tensor cores.

    The tensor holds the integer codes, which every dtype here represents exactly, so no value is rounded:

    `y = linear(x, weight) * scale + bias`, where `weight.T * scale` is `layer.effective_kernel()` bit for bit.

    A kernel that is sparse but not quantized is rounded to `dtype` (nearest), with `scale = 1`.

    On a GPU this is `torch.sparse.to_sparse_semi_structured`. On the CPU, where PyTorch has no product with such a
    tensor, it has the CUTLASS layout; it is there to be stored, sent and checked.

    Args:
        layer: a built compressed layer with at most 2 non-zeros in every 4 consecutive inputs, such as "2:4" or "1:4".
        dtype: "bfloat16", "float16" or "int8".
        device: PyTorch device of the result.

    Returns:
        The pair `(weight, scale)`: a `torch.sparse.SparseSemiStructuredTensor` `[outputs, inputs]` and a float32
        tensor `[outputs]`.

    Raises:
        ValueError: another layer, one that is not 2:4, one with a scale per block of inputs, codes that `dtype` does
            not hold, or a shape that PyTorch does not take.

    Source: Mishra et al. 2021 (arXiv 2104.08378); PyTorch's documentation of `torch.sparse`.

    Example::

        weight, scale = usm.interop.to_torch_semi_structured(layer, device="cuda")
        y = torch.nn.functional.linear(x.bfloat16(), weight) * scale + bias
    """
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}. (Sparse tensor cores take 2:4 in "
            "these; float32 would have to be 1:2.)"
        )
    if not isinstance(layer, CompressedKernel):
        raise ValueError(f"{type(layer).__name__} has no compressed kernel; give a QuantDense or a CompressedLayer.")
    weight, scale = _integers_and_scale(layer, dtype)
    _check_pattern(layer, weight, dtype)
    import torch

    weight = torch.from_numpy(weight.T.copy()).to(getattr(torch, dtype)).to(device)
    return _semi_structured(weight), torch.from_numpy(scale.copy()).to(device)


def _integers_and_scale(layer, dtype):
    """Return float32 arrays `[inputs, outputs]` and `[outputs]` whose product is the effective kernel."""
    if layer.quantization is None:
        if dtype == "int8":
            raise ValueError(f"Layer {layer_path(layer)!r} is not quantized; choose dtype='bfloat16' or 'float16'.")
        kernel = ops.convert_to_numpy(layer.effective_kernel())
        return kernel, np.ones(kernel.shape[1], np.float32)
    if layer.quantization.block_size is not None:
        raise ValueError(
            f"Layer {layer_path(layer)!r} has one scale per {layer.quantization.block_size} inputs, which cannot be "
            "multiplied behind the product. Train with block_size=None."
        )
    codes, scale, *zero_point = (ops.convert_to_numpy(part) for part in layer.quantized_kernel())
    integers = codes.astype(np.float32) - (zero_point[0] if zero_point else 0.0)
    highest = DTYPES[dtype][0]
    if np.abs(integers).max() > highest:
        raise ValueError(
            f"Layer {layer_path(layer)!r} has integers up to {np.abs(integers).max():g}, and {dtype} holds those up to "
            f"{highest}. Choose another dtype, or train with codebook='symmetric'."
        )
    return integers, np.broadcast_to(scale.astype(np.float32)[0], integers.shape[1])


def _check_pattern(layer, weight, dtype):
    inputs, outputs = weight.shape
    _, outputs_step, inputs_step = DTYPES[dtype]
    if inputs % inputs_step or outputs % outputs_step:
        raise ValueError(
            f"Layer {layer_path(layer)!r} has {inputs} inputs and {outputs} outputs; PyTorch takes multiples of "
            f"{inputs_step} inputs and {outputs_step} outputs as {dtype}."
        )
    violations = int(nm_violations(weight, 2, 4))
    if violations:
        raise ValueError(
            f"Layer {layer_path(layer)!r} has sparsity {layer.sparsity} and {violations} of {inputs // 4 * outputs} "
            "groups of 4 inputs with more than 2 non-zeros. Train with sparsity='2:4', and make the masks with "
            "usm.update_masks(model) or callbacks.NMPruning."
        )


def _semi_structured(weight):
    import torch

    if weight.device.type != "cpu":
        return torch.sparse.to_sparse_semi_structured(weight)
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)  # the public function insists on a GPU
    nothing = {"packed_t": None, "meta_t": None, "compressed_swizzled_bitmask": None}
    return torch.sparse.SparseSemiStructuredTensorCUTLASS(weight.shape, packed=packed, meta=meta, **nothing)
