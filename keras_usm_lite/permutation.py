"""`permute_channels`: reorder the hidden channels of a model so that its N:M masks keep more magnitude."""

import keras
import numpy as np
from keras import ops

from keras_usm_lite.core.permutation import kept_magnitude, permute_rows
from keras_usm_lite.rewrite import layer_path, walk_layers

PER_OUTPUT = (
    "kernel", "bias", "mask", "kernel_scale", "scale_gain", "kernel_zero_point", "embeddings",
    "gamma", "beta", "moving_mean", "moving_variance", "scale", "alpha",  # of normalizations and PReLU
)  # fmt: skip
PER_INPUT = ("kernel", "input_norm")


def permute_channels(model, sweeps=300, seed=0):
    """Give the channels between two projections the order in which the second one's N:M mask keeps most.

    `(x A) B = (x A P) (P^T B)` for every permutation `P`, with anything done to each channel alone in between; which
    rows of `B` share a group of M depends on `P`. The free channels of a Conformer are:

    | layer | channels | moved together |
    |---|---|---|
    | `FeedForward` | hidden | columns of `up` with bias; rows of `down` |
    | `LightConv` | inner | value and gate columns of `expand`, `depthwise`, `conv_norm`; rows of `project` |
    | `RelativeSelfAttention` | values, within a head whose width M divides | columns of `value`; rows of `output` |

    A layer of your own joins in with a method `free_channels()` that returns `(consumer, heads, producers)`: the
    projection whose rows may move, in how many equal parts they stay (1: anywhere), and the layers whose outputs move
    along: projections, depthwise convolutions, embeddings, normalizations and `PReLU`. Nothing between them may tell
    channels apart, and kernels must be matrices `[inputs, outputs]`, those of the producers also depthwise ones
    `[taps, channels, 1]`.

    Scales and zero points move with their columns and calibrated input norms with their rows, so the model computes
    what it did, up to float rounding, quantized or not. Layers whose second projection is not sparse stay as they are.

    Call it once, before masks are made and before `compile`: on what `compress` returns of a trained model, say.

    Args:
        model: a built model, changed in place.
        sweeps: how long to search for each layer, see `core.permutation.permute_rows`.
        seed: of the search.

    Returns:
        `{path of the second projection: gain}`, what its mask will keep more, as a share of what it would have kept;
        magnitude, or activation-weighted magnitude where that is the score. Never negative.

    Raises:
        ValueError: nothing to permute, or a layer that must not be: it has a mask already, its scales belong to blocks
            of inputs, its kernel has another form, or the optimizer holds averages of gradients in the old order.
            Nothing is changed then.

    Source: Pool and Yu 2021, "Channel Permutations for N:M Sparsity" (NeurIPS).

    Example:

    >>> from keras_usm_lite.layers.feed_forward import FeedForward
    >>> layer = FeedForward(sparsity="2:4")
    >>> layer.build((None, None, 8))
    >>> gains = permute_channels(layer)
    >>> [gain > 0 for gain in gains.values()]
    [True]
    """
    places = [place for layer in walk_layers(model) for place in _free_channels(layer)]
    if not places:
        raise ValueError(
            f"{model.name!r} has no N:M sparse projection behind free channels. Build it with sparsity='2:4', or apply "
            "compress(model, rules) first; layers that can be permuted are FeedForward, LightConv, "
            "RelativeSelfAttention and those with a method free_channels()."
        )
    _check_optimizer(model)
    for consumer, _, producers in places:
        _check_consumer(consumer)
        for layer in (consumer, *producers):
            _check_kernel(layer, depthwise=layer is not consumer)
        for layer in producers:
            _check_variables(layer)
    return {layer_path(consumer): _permute(consumer, *rest, sweeps, seed) for consumer, *rest in places}


def _free_channels(layer):
    """Return `[(consumer, heads, producers)]` for a layer with free channels before a sparse projection, else []."""
    if not layer.built or not hasattr(layer, "free_channels"):
        return []
    consumer, heads, producers = layer.free_channels()
    sparsity = getattr(consumer, "sparsity", None)
    if sparsity is None or consumer.matrix_shape[0] // heads % sparsity.m:
        return []
    return [(consumer, heads, producers)]


def _check_optimizer(model):
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        raise ValueError(
            f"The optimizer of {model.name!r} holds averages of gradients for channels in their present order. Permute "
            "the channels first, then compile()."
        )


def _check_consumer(layer):
    kept = float(np.mean(ops.convert_to_numpy(layer.mask)))
    if kept < 1:
        raise ValueError(
            f"Layer {layer_path(layer)!r} has a mask already (it keeps {kept:.0%}), which was made for the present "
            "order. Permute the channels before the masks are made."
        )
    if layer.quantization is not None and layer.quantization.block_size is not None:
        raise ValueError(
            f"Layer {layer_path(layer)!r} has one scale per {layer.quantization.block_size} inputs; other inputs would "
            "share a scale. Permute a copy that is sparse only (compress(model, {pattern: (None, '2:4')})), then give "
            "that copy its block_size with compress()."
        )


def _check_kernel(layer, depthwise):
    kernel = _variable(layer, "kernel")
    shape = () if kernel is None else tuple(kernel.shape)
    if len(shape) > 2 and not (depthwise and shape[2:] == (1,)):
        raise ValueError(
            f"Layer {layer_path(layer)!r} ({type(layer).__name__}) has a kernel of shape {list(shape)}, whose channels "
            "are not moved. Allowed are matrices [inputs, outputs], as those of Dense, and in front of the sparse "
            "projection depthwise kernels [taps, channels, 1]; leave this layer out of free_channels()."
        )


def _check_variables(layer):
    known = {id(_variable(layer, name)) for name in (*PER_OUTPUT, *PER_INPUT)}
    strange = [one.path for one in layer.weights if id(one) not in known and np.prod(one.shape) > 1]
    if strange:
        raise ValueError(
            f"Layer {layer_path(layer)!r} ({type(layer).__name__}) has {strange[0]!r}, of which is not known whether "
            "it moves with the channels. Leave the layer out of free_channels(), or call such a variable by one of the "
            f"names {PER_OUTPUT}."
        )


def _variable(layer, name):
    """A variable by its name, or None; a `CompressedLayer` leaves the bias to the layer that it wraps."""
    found = getattr(layer, name, getattr(getattr(layer, "layer", None), name, None))
    return found if isinstance(found, keras.Variable) else None  # the `scale` of a LayerNormalization is True or False


def _permute(consumer, heads, producers, sweeps, seed):
    """Reorder the channels in front of one sparse projection; return the relative gain."""
    scores = ops.convert_to_numpy(consumer.mask_scores())
    n, m = consumer.sparsity.n, consumer.sparsity.m
    blocks = np.split(scores, heads)
    moves = [permute_rows(block, n, m, sweeps, seed) for block in blocks]
    order = np.concatenate([move + head * len(blocks[0]) for head, move in enumerate(moves)])
    for producer in producers:
        for name in PER_OUTPUT:
            # Axis 1 of matrices and of depthwise kernels [taps, channels, 1], the only axis of vectors.
            _reorder(_variable(producer, name), order, axis=1)
    for name in PER_INPUT:
        _reorder(_variable(consumer, name), order, axis=0)
    before, after = kept_magnitude(scores, n, m), kept_magnitude(scores[order], n, m)
    return after / before - 1.0 if before else 0.0


def _reorder(variable, order, axis):
    """Reorder the channels of a variable, each of its halves alike if it has two, nothing if all share one number."""
    if variable is None:
        return
    axis = min(axis, len(variable.shape) - 1)
    halves = variable.shape[axis] // len(order)
    if halves:
        whole = np.concatenate([order + half * len(order) for half in range(halves)])
        variable.assign(ops.take(variable, whole, axis=axis))
