"""`one_shot`: prune and quantize a trained model in one pass over calibration data, without training."""

import keras
import numpy as np
from keras import ops

from keras_usm_lite.calibration import input_matrix, run_with
from keras_usm_lite.compression import compressed_layers, uncompressed
from keras_usm_lite.core.optimal_brain import optimal_brain_surgeon
from keras_usm_lite.core.quantize import code_range, dequantize
from keras_usm_lite.core.reconstruction import matched_kernel, polished, refitted
from keras_usm_lite.rewrite import GRAPHS, layer_path


def one_shot(model, inputs, damping=0.01):
    """Prune and quantize all compressed layers of a model at once, each making up for its own errors and earlier ones.

    The batch flows through the model twice, side by side: through its layers as they were (masks they had included,
    nothing rounded), and through the compressed ones. When it reaches a layer, mask and integers are chosen so that its
    outputs for the inputs it will see in service come as close as they can, in the mean square over the batch, to those
    of the float layer for the exact inputs:

    ```
    min E|x W - x^ W^|^2        x: inputs in the float model, x^: behind the compressed layers
    ```

    The aim is put in terms of the disturbed inputs (`core.reconstruction.matched_kernel`); what is pruned is chosen by
    `core.optimal_brain.optimal_brain_surgeon` and made up for by all survivors (`refitted`); then they are rounded,
    each making up for those before it, and rounded again until hardly a change would help (`polished`). This is far
    better than magnitude pruning where there is no time to train.

    Masks, latent kernels and scales are set in place; scales are frozen. Latent kernels are what is rounded to the
    chosen integers, so that a training can go on from them. Layers whose inputs are not a matrix
    (convolutions, embeddings), or that the model does not call at serving time, get their usual mask and scale.

    Args:
        model: a built model with compressed layers, such as `compress` returns of a trained one; it must take batches
            of any size.
        inputs: one batch of calibration inputs, as the model takes them: some thousand frames, about ten times the
            widest layer, of equal lengths, never from the test set.
        damping: share of the mean square of the inputs added to each of them; more is more cautious.

    Returns:
        `{layer path: relative error of its output}`: `|x W - x^ W^|^2 / |x W|^2` over the batch; where inputs are not
        a matrix, of its kernel.

    Raises:
        ValueError: no compressed layers, a batch that has a fixed size or is not the first axis throughout, inputs
            that are not finite, fewer tokens than two, or a layer in a float warm-up.

    Source: SparseGPT (arXiv 2301.00774), GPTQ (arXiv 2210.17323), GPTAQ (arXiv 2504.02692) for the exact inputs, ALPS
    (arXiv 2406.07831) and CDQuant (arXiv 2406.17542) for the survivors and the last sweeps.

    Example:

    >>> import keras, keras_usm_lite as usm
    >>> layer = usm.QuantDense(4, "int4", sparsity="2:4")
    >>> model = keras.Sequential([keras.Input((8,)), layer])
    >>> errors = one_shot(model, np.random.default_rng(0).normal(size=(256, 8)))
    >>> list(errors.values())[0] < 0.3, float(np.mean(layer.mask))
    (True, 0.5)
    """
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping!r}; the usual value is 0.01.")
    layers = compressed_layers(model)
    if not layers:
        raise ValueError(f"Model {model.name!r} has no compressed layers. Make a copy that has some with usm.compress.")
    _check_batch_size(model)
    for layer in layers:
        if layer.quantization is not None and layer.active_bits > 8:
            raise ValueError(
                f"Layer {layer_path(layer)!r} is in a float warm-up. Finish the QuantizationSchedule, or compress anew."
            )
    twice = keras.tree.map_structure(lambda part: np.concatenate([ops.convert_to_numpy(part)] * 2), inputs)
    run_with(model, [twice], {id(layer): _checked for layer in layers})
    exact, settled = {}, {}

    def stand_in(layer, inputs, *args, **kwargs):
        before, now = ops.split(inputs, 2)
        if id(layer) not in settled:  # a shared layer is settled by its first use
            exact[id(layer)] = uncompressed(layer)
            settled[id(layer)] = _settle(layer, input_matrix(layer, before), _tokens(layer, now), damping)
        return ops.concatenate([exact[id(layer)](before, *args, **kwargs), layer(now, *args, **kwargs)])

    run_with(model, [twice], {id(layer): stand_in for layer in layers})
    errors = {}
    for layer in layers:
        path, number = layer_path(layer), 1
        while path in errors:  # Keras does not give every layer a path of its own
            number += 1
            path = f"{layer_path(layer)}#{number}"
        errors[path] = settled[id(layer)] if id(layer) in settled else _settle(layer, None, None, damping)
    return errors


def _check_batch_size(model):
    sizes = {part.shape[0] for part in model.inputs} - {None} if isinstance(model, GRAPHS) else None
    if sizes:
        raise ValueError(
            f"Model {model.name!r} takes batches of {min(sizes)} only, but two copies of the batch go through it side "
            "by side. Make it with keras.Input(shape), without a batch size."
        )


def _checked(layer, inputs, *args, **kwargs):
    """Call a layer whose inputs are two equal halves; nothing in the model has been changed yet."""
    values = ops.convert_to_numpy(inputs)
    if not np.isfinite(values).all():
        raise ValueError(f"The inputs of layer {layer_path(layer)!r} are not finite; check the data and the weights.")
    before, now = values[: (len(values) + 1) // 2], values[len(values) // 2 :]
    if not np.allclose(before, now, rtol=1e-2, atol=1e-3 * np.abs(before).max(initial=0)):
        raise ValueError(
            f"The inputs of layer {layer_path(layer)!r} do not have the batch as their first axis, or depend on other "
            "examples of it, so two copies of the batch cannot go through the model side by side. Compress the model "
            "without one_shot: update_masks, or a training."
        )
    return layer(inputs, *args, **kwargs)


def _tokens(layer, inputs):
    """The inputs of a layer as its kernel sees them: rounded, if activations are quantized."""
    if layer.kernel_kind == "dense":
        inputs = layer.forward_inputs(inputs)
    elif layer.kernel_kind == "einsum":
        inputs = layer.forward_inputs(inputs, axes=layer.token_axes())
    return input_matrix(layer, inputs)


def _settle(layer, exact, tokens, damping):
    """Choose mask, integers and scale of one layer; return the relative error of its output.

    `exact` and `tokens` are its inputs in the float and in the compressed model; None if they are not a matrix.
    """
    before = ops.convert_to_numpy(layer.masked_kernel()).astype(np.float64)
    if tokens is None:
        if layer.sparsity is not None:
            layer.update_mask()
        _fix_scale(layer)
        change = before - ops.convert_to_numpy(layer.effective_kernel())
        return float(np.sum(change**2) / max(np.sum(before**2), 1e-30))
    if len(tokens) < 2:
        raise ValueError(f"Layer {layer_path(layer)!r} sees {len(tokens)} token, which must be at least 2.")
    exact, tokens = exact.astype(np.float64), tokens.astype(np.float64)
    moment, cross = tokens.T @ tokens / len(tokens), tokens.T @ exact / len(tokens)
    wanted = matched_kernel(before, moment, cross, damping)
    layer.assign_matrix(wanted)
    if layer.sparsity is not None:
        _prune(layer, wanted, moment, damping)
    _fix_scale(layer)  # survivors have grown: now the scale that fits them is known
    if layer.quantization is not None:
        _round(layer, wanted, moment, damping)
    after, power = ops.convert_to_numpy(layer.effective_kernel()), np.sum((exact @ before) ** 2) / len(tokens)
    error = power - 2 * np.sum(after * (cross @ before)) + np.sum(after * (moment @ after))
    return float(max(error, 0.0) / max(power, 1e-30))  # a difference of large numbers


def _prune(layer, wanted, moment, damping):
    """Set the mask, and the latent kernel to the survivors that stand in best for the wanted kernel."""
    pattern = {"n": layer.sparsity.n, "m": layer.sparsity.m}
    mask, weights = optimal_brain_surgeon(wanted, moment, damping=damping, **pattern)
    layer.mask.assign(mask)
    layer.mask_fade.assign(0.0)  # of a training that ended while pruned weights were fading
    layer.assign_matrix(refitted(wanted, moment, mask, weights, damping))


def _round(layer, wanted, moment, damping):
    """Set the latent kernel to one whose integers stand in best for the wanted kernel."""
    mask = None if layer.sparsity is None else ops.convert_to_numpy(layer.mask)
    rounded = _rounding(layer)
    start = ops.convert_to_numpy(layer.kernel_matrix())
    _, latent = optimal_brain_surgeon(start, moment, mask=mask, rounded=rounded, damping=damping)
    layer.assign_matrix(polished(wanted, moment, latent, rounded, mask, damping))


def _fix_scale(layer):
    if layer.quantization is not None:
        layer.scale_frozen.assign(0.0)  # by an earlier call, or in a file
        layer.update_scale()
        layer.freeze_scale()


def _rounding(layer):
    """Return the function that rounds one row of the kernel as the layer does, without a call of the backend.

    The levels of a column are equally far apart, so `quantize` and `dequantize` are a multiplication away. A weight in
    the very middle of two levels may go to the other one.
    """
    bits, codebook = layer.active_bits, layer.quantization.codebook
    grid = layer.quantized_kernel()[1:]
    rows, groups, steps = layer.matrix_shape[0], grid[0].shape[0], 2**bits - 1 - (codebook == "symmetric")
    lowest, highest = (
        ops.convert_to_numpy(dequantize(ops.full(grid[0].shape, code), *grid)) for code in code_range(bits, codebook)
    )
    step = (highest - lowest) / steps

    def rounded(row, weights):
        group = row * groups // rows
        number = np.floor((weights.astype(np.float32) - lowest[group]) / step[group] + 0.5)
        return lowest[group] + np.clip(number, 0, steps) * step[group]

    return rounded
