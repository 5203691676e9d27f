"""`CompressedLayer`: any Keras layer with one kernel, called with the compressed form of that kernel."""

import keras
from keras import ops

from keras_usm_lite.layers.compressed_kernel import CompressedKernel, compression_config, resolve_compression
from keras_usm_lite.layers.kernel_kinds import WRAPPABLE, einsum_terms, kernel_of, kernel_view, layer_kind


@keras.saving.register_keras_serializable(package="keras_usm_lite")
class CompressedLayer(CompressedKernel, keras.layers.Wrapper):
    """Calls a Keras layer with its kernel masked and quantized: `y = layer(x; kernel = effective_kernel())`.

    This reaches the layers that are not `keras.layers.Dense`: `EinsumDense` (so `MultiHeadAttention`), convolutions,
    depthwise convolutions, embeddings. The kernel is seen as a matrix whose rows are summed over:

    | layer | rows (summed over) | columns (one scale each) |
    |---|---|---|
    | EinsumDense | kernel axes that the output does not have | the others |
    | Conv1D, Conv2D, Conv3D | taps x inputs; N:M groups are inputs of one tap | filters |
    | DepthwiseConv1D, DepthwiseConv2D | taps | channels |
    | Embedding | the vector | tokens |

    Here every form multiplies by the dequantized kernel; "native" differs from that by float rounding only.

    Args:
        layer: the layer to wrap, built or not; its kernel becomes the latent one.
        quantization, sparsity: compression of the kernel, see `QuantDense`. Embeddings and depthwise convolutions
            cannot be sparse: nothing is saved by skipping products they do not sum over.

    Raises:
        ValueError: a layer of another kind, or a compression that it cannot have, with the reason.

    Source: convolutions grouped along their inputs: arXiv 2102.04010; per-token scales of embeddings: LiteRT.

    Example:

    >>> layer = CompressedLayer(keras.layers.Conv1D(4, 3), quantization="int4", sparsity="2:4")
    >>> tuple(layer(keras.ops.ones((1, 10, 8))).shape), layer.matrix_shape
    ((1, 8, 4), (24, 4))
    """

    def __init__(self, layer, quantization="int4", sparsity=None, **kwargs):
        if not isinstance(layer, WRAPPABLE):
            raise ValueError(
                f"CompressedLayer wraps {', '.join(kind.__name__ for kind in WRAPPABLE)}; got {type(layer).__name__}. "
                "For keras.layers.Dense use QuantDense."
            )
        kwargs.setdefault("name", layer.name)
        # Masks and scales are computed in float32; the wrapped layer casts by its own policy.
        kwargs.setdefault("dtype", "float32")
        super().__init__(layer, autocast=False, activity_regularizer=layer.activity_regularizer, **kwargs)
        resolve_compression(self, quantization, sparsity)
        self.supports_masking = layer.supports_masking

    def build(self, input_shape=None):
        """Build the wrapped layer and the state of the compression."""
        if not self.layer.built:
            self.layer.build(input_shape)
        self._build_compression()

    @property
    def kernel(self):
        """The latent kernel variable of the wrapped layer."""
        return kernel_of(self.layer)

    @property
    def kernel_kind(self):
        """The kind of the wrapped layer, see `layer_kind`."""
        return layer_kind(self.layer)

    @property
    def kernel_view(self):
        """How the kernel is seen as a matrix."""
        return kernel_view(self.layer)

    def call(self, inputs, training=None, **kwargs):
        """Call the wrapped layer; further arguments are passed on."""
        if training:
            self._refresh_mask_in_step()
            self._add_penalties()
        if self.quantization is not None and self.quantization.activations is not None:
            inputs = self.forward_inputs(inputs, axes=self.token_axes())
        kernel = self.kernel_view.from_matrix(self.forward_kernel(training))
        state = [(variable, ops.convert_to_tensor(variable)) for variable in self.layer.variables]
        state = [(variable, kernel if variable is self.kernel else value) for variable, value in state]
        with keras.StatelessScope(state_mapping=state):
            return self.layer(inputs, **kwargs)

    def compute_output_shape(self, *args, **kwargs):
        """The output shape of the wrapped layer."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        """Shape and type as `call` gives them; Keras would take the type from this layer's float32 policy."""
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def token_axes(self):
        """Axes of an EinsumDense's input that are summed over: one token."""
        terms, kernel, outputs = einsum_terms(self.layer.equation)
        return tuple(_axis(terms, letter) for letter in kernel if letter in terms and letter not in outputs)

    def compute_mask(self, inputs, mask=None):
        """The mask of the wrapped layer."""
        return self.layer.compute_mask(inputs, mask)

    def get_config(self):
        """Return the constructor's arguments."""
        config = {**super().get_config(), **compression_config(self)}
        config.pop("activity_regularizer", None)  # the wrapped layer's configuration has it
        return config


def _axis(term, letter):
    """Position of a letter in a term; behind an ellipsis it is counted from the end."""
    before, _, behind = term.partition("...")
    return before.index(letter) if letter in before else behind.index(letter) - len(behind)
