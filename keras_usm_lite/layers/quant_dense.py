"""`QuantDense`: a dense layer whose kernel is low-bit and, if asked, N:M sparse."""

import keras
from keras import ops

from keras_usm_lite.core.quantize import WIDEST_BITS
from keras_usm_lite.layers.compressed_kernel import CompressedKernel, compression_config, resolve_compression


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class QuantDense(CompressedKernel, keras.layers.Layer):
    """Dense layer trained with the integer kernel it will be served with.

    `y = activation((x @ codes) * scale + bias)` with `codes = round(mask * kernel / scale)`: the integer-valued
    operand is multiplied first and the product scaled afterwards ("native" quantization); rounding passes the gradient
    straight through. See `CompressedKernel` for the state and `QuantizationConfig`, `SparsityConfig` for the choices.

    Shapes: `[..., inputs] -> [..., units]`.

    Args:
        units: outputs.
        quantization: None, "int8", "int4", "int3", "int2", "int1" or a `QuantizationConfig`.
        sparsity: None, "2:4", "1:4", "4:8", ... (non-zeros:group) or a `SparsityConfig`. The mask starts dense; call
            `update_mask()` or use `callbacks.NMPruning`.
        activation, use_bias, kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer,
            activity_regularizer, kernel_constraint, bias_constraint: as `keras.layers.Dense`.

    Raises:
        ValueError: an unknown setting, or inputs that the sparsity pattern or block size does not divide.

    Source: arXiv 2312.08553, section 2; arXiv 2203.15952, section 2.

    Example:

    >>> layer = QuantDense(3, quantization="int4", sparsity="2:4")
    >>> tuple(layer(keras.ops.ones((2, 8))).shape)
    (2, 3)
    >>> layer.update_mask()  # half of the 24 weights are pruned
    12
    >>> codes, scale = layer.quantized_kernel()
    >>> int(keras.ops.max(keras.ops.abs(codes)))
    7
    """

    def __init__(
        self,
        units,
        quantization="int4",
        sparsity=None,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        if not isinstance(units, int) or units < 1:
            raise ValueError(f"units must be a positive integer, got {units!r}.")
        self.units = units
        self.use_bias = use_bias
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True
        resolve_compression(self, quantization, sparsity)

    def build(self, input_shape):
        """Create kernel, bias and the state of the compression."""
        inputs = input_shape[-1]
        self.kernel = self.add_weight(
            name="kernel",
            shape=(inputs, self.units),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
            autocast=False,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.units,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        self._build_compression()
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: inputs})

    def call(self, inputs, training=None):
        """Multiply by the compressed kernel."""
        if training:
            self._refresh_mask_in_step()
            self._add_penalties()
        outputs = self._product(self.forward_inputs(inputs), training)
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs if self.activation is None else self.activation(outputs)

    def _product(self, inputs, training):
        if self.quantization is None or self.quantization.form != "native":
            return ops.matmul(inputs, ops.cast(self.forward_kernel(training), self.compute_dtype))
        codes, scale, zero_point = self._train_codes()
        codes = codes if zero_point is None else codes - zero_point
        # Codes of about 1 by a power of two, which is exact: float16 ends at 65504, and sums of 8-bit codes get there.
        unit = ops.power(2.0, ops.minimum(ops.convert_to_tensor(self.bits), WIDEST_BITS) - 1.0)
        product = ops.matmul(inputs, ops.cast(codes / unit, self.compute_dtype))
        # The float32 scale that is served; a 16-bit copy of it would be another.
        return ops.cast(ops.cast(product, "float32") * (unit * scale[0]), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        """`[..., inputs] -> [..., units]`."""
        return (*input_shape[:-1], self.units)

    def get_config(self):
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "units": self.units,
            **compression_config(self),
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "activity_regularizer": keras.regularizers.serialize(self.activity_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }
