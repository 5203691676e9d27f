"""`calibrate`: what the inputs of the compressed layers look like on real data."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_usm_lite.compression import compressed_layers
from keras_usm_lite.layers.compressed_layer import CompressedLayer
from keras_usm_lite.rewrite import layer_path, rewrite


def calibrate(model, batches):
    """Run a model over calibration data and store in its layers what they need to know about their inputs.

    * `SparsityConfig(score="activation")`: `input_norm_i = sqrt(sum_t x_ti^2 / T)` of every input, for Wanda's scores
      `|w_ij| ||x_i||`. The mask is not touched: call `update_masks`, or train with `callbacks.NMPruning`, afterwards.
    * `QuantizationConfig(activations="static")`: the smallest and the largest input, the range of the int8 codes.

    The model is called as at serving time, in its present state: float activations, current kernels. A few dozen
    utterances are enough; they must not come from the test set.

    Args:
        model: a built model with compressed layers, on any backend.
        batches: iterable of what the model takes as input. Real frames count like padded ones, so batches of equal
            lengths are best.

    Returns:
        The number of layers that were calibrated.

    Raises:
        ValueError: no layer needs calibration, no batch, or inputs that are not finite. An earlier calibration stays.

    Source: Wanda (arXiv 2306.11695), section 3.

    Example:

    >>> from keras_usm_lite import QuantDense, SparsityConfig
    >>> layer = QuantDense(1, "int4", sparsity=SparsityConfig(1, 2, score="activation"))
    >>> model = keras.Sequential([keras.Input((2,)), layer])
    >>> calibrate(model, [np.array([[3.0, 0.5], [3.0, 0.5]])])
    1
    >>> ops.convert_to_numpy(layer.input_norm).tolist()
    [3.0, 0.5]
    """
    layers = [layer for layer in compressed_layers(model) if _needs_calibration(layer)]
    if not layers:
        raise ValueError(
            "No layer needs calibration. Use SparsityConfig(score='activation') or QuantizationConfig("
            "activations='static'), or leave calibrate out."
        )
    statistics = {id(layer): _InputStatistics() for layer in layers}
    with _unclipped(layers):
        count = run_with(model, batches, {id(layer): statistics[id(layer)].observe for layer in layers})
        if not count:
            raise ValueError("batches is empty; give at least one batch of inputs to calibrate with.")
        unseen = [layer_path(layer) for layer in layers if not statistics[id(layer)].calls]
        if unseen:
            raise ValueError(
                f"The model did not call {unseen} on these batches, so they cannot be calibrated with them."
            )
    for layer in layers:
        statistics[id(layer)].store(layer)
    return len(layers)


@contextlib.contextmanager
def _unclipped(layers):
    """Ranges of an earlier calibration would clip what later layers see; they come back if this one fails."""
    layers = [layer for layer in layers if hasattr(layer, "input_low")]
    ranges = [variable for layer in layers for variable in (layer.input_low, layer.input_high)]
    earlier = [float(ops.convert_to_numpy(variable)) for variable in ranges]
    for variable in ranges:
        variable.assign(0.0)
    try:
        yield
    except BaseException:
        for variable, value in zip(ranges, earlier, strict=True):
            variable.assign(value)
        raise


def run_with(model, batches, stand_ins):
    """Call a model on batches while functions stand in for some of its layers.

    The run goes through a copy of the model that shares the compressed layers, so nothing is hooked into the model.

    Args:
        model: a built model.
        batches: iterable of inputs.
        stand_ins: `{id(layer): function}`; `function(layer, inputs, *args, **kwargs)` gets the layer and what it was
            called with, and returns its outputs. It may change the layer first.

    Returns:
        The number of batches.
    """

    def replace(layer):
        return (_StandIn(layer, stand_ins[id(layer)]), lambda copy: None) if id(layer) in stand_ins else None

    copy = rewrite(model, replace)
    count = 0
    for batch in batches:
        copy(keras.tree.map_structure(ops.convert_to_tensor, batch), training=False)
        count += 1
    return count


class _StandIn(keras.layers.Layer):
    """Calls a function with a compressed layer that it shares with the original model, and that layer's inputs."""

    def __init__(self, layer, function):
        super().__init__(name=layer.name, autocast=False)
        self.shared, self.function = layer, function
        self.supports_masking = layer.supports_masking
        self.built = True

    def call(self, inputs, *args, **kwargs):
        return self.function(self.shared, inputs, *args, **kwargs)

    def compute_mask(self, *args, **kwargs):
        return self.shared.compute_mask(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        return self.shared.compute_output_spec(*args, **kwargs)


def input_matrix(layer, inputs):
    """Return the inputs of a compressed layer as a float32 NumPy matrix `[tokens, rows of the kernel]`, or None.

    None where a row of the kernel does not belong to one number of the input: embeddings and convolutions.
    """
    inputs = ops.convert_to_numpy(ops.cast(inputs, "float32"))
    axes = (-1,)
    if isinstance(layer, CompressedLayer):
        if layer.kernel_kind != "einsum":
            return None
        axes = layer.token_axes()
    inputs = np.moveaxis(inputs, axes, range(-len(axes), 0))
    return inputs.reshape(-1, layer.matrix_shape[0])


class _InputStatistics:
    def __init__(self):
        self.calls, self.tokens, self.squares, self.low, self.high = 0, 0, 0.0, 0.0, 0.0

    def observe(self, layer, inputs, *args, **kwargs):
        self.add(layer, ops.convert_to_numpy(ops.cast(inputs, "float32")))
        return layer(inputs, *args, **kwargs)

    def add(self, layer, inputs):
        if not np.isfinite(inputs).all():
            raise ValueError(f"The inputs of layer {layer.name!r} are not finite; check the data and the weights.")
        self.calls += 1
        self.low, self.high = min(self.low, inputs.min()), max(self.high, inputs.max())
        if hasattr(layer, "input_norm"):
            inputs = input_matrix(layer, inputs)
            self.tokens += len(inputs)
            self.squares = self.squares + np.sum(np.square(inputs, dtype=np.float64), axis=0)

    def store(self, layer):
        if hasattr(layer, "input_norm"):
            layer.input_norm.assign(np.sqrt(self.squares / self.tokens).astype(np.float32))
        if hasattr(layer, "input_low"):
            layer.input_low.assign(np.float32(self.low))
            layer.input_high.assign(np.float32(self.high))


def _needs_calibration(layer):
    return hasattr(layer, "input_norm") or hasattr(layer, "input_low")
