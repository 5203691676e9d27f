"""The kinds of layers whose kernel can be compressed: how the kernel is a matrix, and what it can become."""

import keras

from keras_usm_lite.core.matrix_view import MatrixView

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
WRAPPABLE = (keras.layers.EinsumDense, keras.layers.Embedding, *CONVOLUTIONS, *DEPTHWISE)


def layer_kind(layer):
    """Return "dense", "einsum", "batched einsum", "convolution", "convolution 3d", "depthwise" or "embedding".

    A batched einsum has a kernel axis that inputs and outputs both have.

    Example:

    >>> layer_kind(keras.layers.Conv1D(4, 3)), layer_kind(keras.layers.EinsumDense("ab,bc->ac", 3))
    ('convolution', 'einsum')
    """
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel, outputs = einsum_terms(layer.equation)
        return "batched einsum" if set(inputs) & set(kernel) & set(outputs) else "einsum"
    if isinstance(layer, keras.layers.Conv3D):
        return "convolution 3d"
    if isinstance(layer, keras.layers.Embedding):
        return "embedding"
    if isinstance(layer, DEPTHWISE):
        return "depthwise"
    return "convolution" if isinstance(layer, CONVOLUTIONS) else "dense"


def kernel_of(layer):
    """Return the kernel variable of a built layer; an embedding's is its table."""
    return layer.embeddings if isinstance(layer, keras.layers.Embedding) else layer.kernel


def kernel_view(layer):
    """Return the `MatrixView` of a built layer's kernel.

    Example:

    >>> layer = keras.layers.Embedding(100, 8)
    >>> layer.build()
    >>> kernel_view(layer).rows, kernel_view(layer).columns
    (8, 100)
    """
    shape = tuple(kernel_of(layer).shape)
    axes = tuple(range(len(shape)))
    if isinstance(layer, keras.layers.EinsumDense):
        _, kernel, outputs = einsum_terms(layer.equation)
        reduced = tuple(axis for axis in axes if kernel[axis] not in outputs)
    elif isinstance(layer, keras.layers.Embedding):
        reduced = axes[1:]
    else:
        reduced = axes[:-2] if isinstance(layer, DEPTHWISE) else axes[:-1]
    return MatrixView(shape, reduced, tuple(axis for axis in axes if axis not in reduced))


def fit_problem(kind, view, quantization, sparsity):
    """Return why a kernel cannot be compressed so, with the fix; or None if it can.

    Args:
        kind: from `layer_kind`.
        view: the kernel's `MatrixView`.
        quantization: a `QuantizationConfig` or None.
        sparsity: a `SparsityConfig` or None.

    Example:

    >>> from keras_usm_lite import SparsityConfig
    >>> fit_problem("dense", MatrixView((6, 2), (0,), (1,)), None, SparsityConfig(2, 4))[:40]
    'has 6 inputs, which sparsity 2:4 cannot '
    """
    if sparsity is not None and kind in ("embedding", "depthwise"):
        return (
            f"cannot be {sparsity} sparse: N:M skips products inside a sum over inputs, which this kind of layer "
            f"({kind}) does not have. Give it sparsity=None"
        )
    if sparsity is not None and sparsity.score == "activation" and kind not in ("dense", "einsum"):
        return (
            f"cannot have score='activation': the norms of a layer of this kind ({kind}) are not collected. Give it "
            "score='magnitude'"
        )
    inputs = view.shape[view.reduced[-1]] if kind in ("convolution", "convolution 3d") else view.rows
    if sparsity is not None and inputs % sparsity.m:
        return (
            f"has {inputs} inputs{' per tap' if inputs != view.rows else ''}, which sparsity {sparsity} cannot "
            f"group: not a multiple of {sparsity.m}. Choose another pattern or width, or sparsity=None for this layer"
        )
    if quantization is None:
        return None
    if quantization.block_size is not None and view.rows % quantization.block_size:
        return (
            f"has {view.rows} inputs, which is not a multiple of block_size={quantization.block_size}. Choose a "
            "block_size that divides the inputs, or None for one scale per channel"
        )
    if quantization.activations is not None and kind not in ("dense", "einsum", "batched einsum"):
        return (
            f"cannot have activations={quantization.activations!r}: integer activations are simulated for Dense and "
            "EinsumDense. Give it activations=None"
        )
    return None


def einsum_terms(equation):
    """Return the terms of an equation such as "abc,cd->abd": inputs, kernel, outputs.

    Example:

    >>> einsum_terms("abc,cde->abde")
    ('abc', 'cde', 'abde')
    """
    operands, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    return inputs, kernel, outputs
