"""`NMSparseDense`: a dense layer with N:M sparsity first and quantization if asked."""

import keras

from keras_usm_lite.layers.quant_dense import QuantDense


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class NMSparseDense(QuantDense):
    """Dense layer that keeps `n` of every `m` consecutive inputs of each output channel.

    `y = activation(x @ (mask * kernel) + bias)`; with `quantization` the masked kernel is quantized as in
    `QuantDense`. The layer is dense until the first `update_mask()`.

    Shapes: `[..., inputs] -> [..., units]`.

    Args:
        units: outputs.
        sparsity: "2:4", "1:4", "4:8", ... (non-zeros:group) or a `SparsityConfig`.
        quantization: None, "int8", "int4", "int3", "int2", "int1" or a `QuantizationConfig`.
        **kwargs: as `QuantDense`.

    Raises:
        ValueError: an unknown setting, or inputs that are not a multiple of the group size.

    Source: arXiv 2312.08553, section 2; Mishra et al. 2021 (arXiv 2104.08378).

    Example:

    >>> layer = NMSparseDense(2, sparsity="1:4")
    >>> layer.build((None, 4))
    >>> layer.update_mask()  # 3 of 4 weights in each of 2 channels
    6
    >>> int(keras.ops.sum(keras.ops.cast(layer.effective_kernel() != 0, "int32")))
    2
    """

    def __init__(self, units, sparsity="2:4", quantization=None, **kwargs):
        super().__init__(units, quantization=quantization, sparsity=sparsity, **kwargs)
