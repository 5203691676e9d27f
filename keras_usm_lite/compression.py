"""`compress`: any Keras 3 model, with some of its layers made low-bit and N:M sparse."""

import re
import warnings

import keras
from keras import ops

from keras_usm_lite.layers.compressed_kernel import CompressedKernel
from keras_usm_lite.layers.compressed_layer import CompressedLayer
from keras_usm_lite.layers.kernel_kinds import WRAPPABLE, fit_problem, kernel_view, layer_kind
from keras_usm_lite.layers.quant_dense import QuantDense
from keras_usm_lite.models.compressed_model import CompressedModel
from keras_usm_lite.quantization_config import QuantizationConfig
from keras_usm_lite.rewrite import GRAPHS, build_again, layer_path, rewrite, walk_layers
from keras_usm_lite.sparsity_config import SparsityConfig

DENSE_ARGUMENTS = (
    "name", "trainable", "dtype", "units", "activation", "use_bias", "kernel_initializer", "bias_initializer",
    "kernel_regularizer", "bias_regularizer", "activity_regularizer", "kernel_constraint", "bias_constraint",
)  # fmt: skip


TARGETS = (None, "litert")
OWN_TRAINING = ("train_step", "test_step", "compute_loss", "compute_metrics")  # what a copy does not have


def compress(model, rules, target=None):
    """Return a copy of a model whose layers named by `rules` multiply by compressed kernels.

    The copy has the same weights, inputs and outputs, what is frozen stays frozen, and it is not compiled. Masks start
    dense: fine-tune with `callbacks.NMPruning`, or prune at once with `update_masks`. What no rule touched is listed by
    `report`. A kernel that another layer reads, too (tied weights), is compressed for the layer that owns it only.

    Args:
        model: a built Keras 3 model: functional, Sequential, subclassed, nested. Its layers are copied through
            `get_config`, as saving and loading does; a `train_step` or `compute_loss` of its own does not come with
            them, of which a warning tells.
        rules: `{regex: (quantization, sparsity)}`. The regex is searched in the layer's path, such as
            "usm_for_ctc/encoder/block_0/conv/expand"; the first match wins. Quantization and sparsity are shorthands,
            configs or None; `(None, None)` leaves the layer as it is. Layers that can be compressed are Dense,
            EinsumDense (so MultiHeadAttention), Conv1D/2D/3D, DepthwiseConv1D/2D, Embedding and subclasses of these
            but Dense.
        target: None, or "litert": refuse what LiteRT cannot run at the width asked for.

    Returns:
        A model. Where the changed layers belong to a subclassed model or layer, whose own configuration does not
        mention them, the result is a `CompressedModel`, which remembers the rules and saves and loads like any model.

    Raises:
        ValueError: a model that is not built, a rule that is not understood or decides about no layer, layers that a
            rule's compression does not fit or the target cannot run (all of them at once, with the reasons), a layer
            held in something else than attributes, lists, tuples and dicts, or a graph with a `call` of its own.

    Source: arXiv 2312.08553, section 3 (which layers of a Conformer are compressed).

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="hidden"), keras.layers.Dense(2)])
    >>> small = compress(model, {"hidden": ("int4", "2:4")})
    >>> [type(layer).__name__ for layer in small.layers]
    ['QuantDense', 'Dense']
    """
    patterns = _parse_rules(rules)
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not known; choose one of {TARGETS}.")
    if not isinstance(model, keras.Model):
        raise ValueError(f"compress() needs a keras.Model, got a {type(model).__name__}. Compress the model it is in.")
    if not model.built:
        raise ValueError(f"Model {model.name!r} is not built; call it on a batch, or build() it, before compress().")
    layers = _compressible_layers(model)
    known = [layer_path(layer) for layer in layers]
    chosen = [next((number for number, pattern in enumerate(patterns) if pattern.search(path)), None) for path in known]
    _check_used(patterns, chosen, known)
    _check_fit(model, layers, chosen, list(rules.values()), target)
    own = [name for name in OWN_TRAINING if getattr(type(model), name) is not getattr(keras.Model, name)]
    if own:
        warnings.warn(
            f"The copy of {model.name!r} trains as any Keras model does, without the {' and '.join(own)} of "
            f"{type(model).__name__}. Compress the model in it that is meant (a student, an encoder), and put the copy "
            "into a new one.",
            stacklevel=2,
        )
    small = apply_rules(model, rules, chosen)
    if model.weights and not small.trainable_variables:
        warnings.warn(
            f"The copy of {model.name!r} is frozen, as the model is (a Distiller freezes its teacher). To train it, "
            "set its `trainable` to True.",
            stacklevel=2,
        )
    return small


def apply_rules(model, rules, chosen):
    """Compress a model by rules whose layers are known already: the second half of `compress`.

    A `CompressedModel` comes back from a file through this, because Keras does not give every layer the path it had.

    Args:
        model: a built Keras model.
        rules: as for `compress`.
        chosen: for every layer that could be compressed, in model order, the number of its rule, or None.

    Returns:
        A model, as `compress`.

    Raises:
        ValueError: `chosen` is for another model.
    """
    layers = _compressible_layers(model)
    if len(layers) != len(chosen):
        raise ValueError(
            f"Model {model.name!r} has {len(layers)} layers that can be compressed, but had {len(chosen)} when it was "
            "compressed. Load it with the same model code."
        )
    pairs = [_resolve(pair) for pair in rules.values()]
    plan = {
        id(layer): (layer, *pairs[number])
        for layer, number in zip(layers, chosen, strict=True)
        if number is not None and pairs[number] != (None, None)
    }
    new_layers = []

    def replace(layer):
        if id(layer) not in plan:
            return None
        new_layers.append(_new_layer(*plan.pop(id(layer))))
        return new_layers[-1], lambda new: _copy_weights(layer, new)

    changed = rewrite(model, replace)
    if plan:
        raise ValueError(
            f"Layers {[layer_path(layer) for layer, *_ in plan.values()]} are held where they cannot be exchanged. "
            "Hold them in attributes, lists, tuples or dicts."
        )
    for layer in new_layers:
        layer.update_scale()
    if _remembers_its_layers(changed):
        return changed
    inner = changed.model if isinstance(changed, CompressedModel) else changed
    if isinstance(model, CompressedModel):  # one step from the original, however many there were
        return CompressedModel(inner, model.template, *_both(model.rules, model.chosen, rules, chosen))
    return CompressedModel(inner, template=model, rules=rules, chosen=chosen)


def _both(old_rules, old_chosen, rules, chosen):
    """Return the rules and the choice that do at once what two compressions did one after the other."""
    pairs = [*old_rules.items(), *rules.items()]
    first = len(old_rules)
    numbers = [
        old if new is None or _resolve(pairs[first + new][1]) == (None, None) else first + new
        for old, new in zip(old_chosen, chosen, strict=True)
    ]
    used = sorted(set(numbers) - {None})
    plain = [re.sub(r"\(\?#\d+\)$", "", pattern) for pattern, _ in pairs]
    names = {number: f"{plain[number]}(?#{place})" for place, number in enumerate(used)}  # a comment makes them differ
    places = {None: None} | {number: place for place, number in enumerate(used)}
    return {names[number]: pairs[number][1] for number in used}, [places[number] for number in numbers]


def update_masks(model):
    """Recompute the N:M mask of every sparse layer of a model from its current kernel, at once.

    Returns:
        The number of mask entries that changed.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), QuantDense(2, sparsity="2:4")])
    >>> update_masks(model)
    8
    """
    return sum(layer.update_mask() for layer in compressed_layers(model) if layer.sparsity is not None)


def compressed_layers(model):
    """Return the layers of a model, nested ones included, that hold a compressed kernel.

    Example:

    >>> len(compressed_layers(keras.Sequential([keras.Input((8,)), QuantDense(2), keras.layers.Dense(2)])))
    1
    """
    return [
        layer
        for layer in walk_layers(model)
        if isinstance(layer, CompressedKernel) and (layer.quantization is not None or layer.sparsity is not None)
    ]


def uncompressed(layer):
    """Return a copy of a compressed layer that multiplies by the masked latent kernel, not rounded.

    Example:

    >>> import numpy as np
    >>> layer = QuantDense(1, "int2")
    >>> layer.build((None, 2))
    >>> layer.set_weights([np.array([[1.0], [0.25]]), *layer.get_weights()[1:]])
    >>> ops.convert_to_numpy(uncompressed(layer)(ops.ones((1, 2)))).tolist()
    [[1.25]]
    """
    copy = type(layer).from_config({**layer.get_config(), "quantization": None, "sparsity": None})
    build_again(copy, layer.get_build_config(), layer_path(layer))
    values = {}
    for weight in layer.weights:
        values.setdefault(weight.name, []).append(ops.convert_to_numpy(weight))
    for weight in copy.weights:
        weight.assign(values[weight.name].pop(0))
    copy.assign_matrix(layer.masked_kernel())
    return copy


def _parse_rules(rules):
    """Check the rules and return their patterns, compiled."""
    if not isinstance(rules, dict) or not rules:
        raise ValueError(f"rules must be a dict such as {{'block_.*': ('int4', '2:4')}}, got {rules!r}.")
    patterns = []
    for pattern, pair in rules.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"Rule {pattern!r} must map to (quantization, sparsity), got {pair!r}.")
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"Rule {pattern!r} is not a regular expression: {error}.") from None
        _resolve(pair)
    return patterns


def _check_used(patterns, chosen, known):
    """Refuse rules that no layer falls under, with the reason."""
    shadowed, unused = [], []
    for number, pattern in enumerate(patterns):
        if number not in chosen:
            (shadowed if any(map(pattern.search, known)) else unused).append(pattern.pattern)
    if unused:
        raise ValueError(
            f"No compressible layer matches {unused}. Layers that can be compressed: {known[:20]}"
            f"{' ...' if len(known) > 20 else ''}."
        )
    if shadowed:
        raise ValueError(
            f"Every layer that {shadowed} matches falls under an earlier rule, and the first match wins. Put special "
            "rules before general ones."
        )


def _resolve(pair):
    return QuantizationConfig.resolve(pair[0]), SparsityConfig.resolve(pair[1])


def _check_fit(model, layers, chosen, pairs, target):
    """Raise one error that names every layer its rule does not fit."""
    problems = {}  # by path: layers that share one have the same problem to mend
    normalized = {
        id(found.layer) for found in walk_layers(model) if isinstance(found, keras.layers.SpectralNormalization)
    }
    for layer, number in zip(layers, chosen, strict=True):
        if number is None:
            continue
        quantization, sparsity = _resolve(pairs[number])
        inner = layer.layer if isinstance(layer, CompressedLayer) else layer
        problem = _keras_problem(inner, normalized)
        if problem is not None:
            problems[layer_path(layer)] = problem
            continue
        kind, view = layer_kind(inner), kernel_view(inner)
        problem = fit_problem(kind, view, quantization, sparsity)
        if problem is None and target == "litert":
            from keras_usm_lite.export.litert_kernel import litert_problem  # export stands above this module

            problem = litert_problem(kind, quantization, sparsity, view.rows)
            problem = None if problem is None else f"cannot run on LiteRT as {quantization}: {problem}"
        if problem is not None:
            problems[layer_path(layer)] = problem
    if problems:
        lines = "\n".join(f"  {path} {problem}." for path, problem in problems.items())
        pattern = "|".join(problems)
        raise ValueError(
            f"{len(problems)} layers cannot be compressed as their rule says:\n{lines}\n"
            f"To leave them as they are, put this rule first: {{{pattern!r}: (None, None)}}."
        )


def _keras_problem(layer, normalized):
    """Why a layer cannot be compressed after what Keras did to it, or None."""
    if getattr(layer, "lora_enabled", False):
        return "has LoRA enabled. Save the model and load it without LoRA, which merges them"
    if getattr(layer, "quantization_mode", None):
        return f"was quantized by Keras already (quantize({layer.quantization_mode!r})). Compress the model of before"
    if id(layer) in normalized:
        return "is wrapped in SpectralNormalization, which would go on with the kernel of before. Take it out of there"
    return None


def _compressible_layers(model):
    layers = [layer for layer in walk_layers(model) if _can_compress(layer)]
    inside = {id(layer.layer) for layer in layers if isinstance(layer, CompressedLayer)}
    return [layer for layer in layers if id(layer) not in inside]


def _can_compress(layer):
    return type(layer) is keras.layers.Dense or isinstance(layer, (QuantDense, CompressedLayer, *WRAPPABLE))


def _new_layer(layer, quantization, sparsity):
    if not isinstance(layer, (keras.layers.Dense, QuantDense)):
        inner = layer.layer if isinstance(layer, CompressedLayer) else layer
        return CompressedLayer(type(inner).from_config(inner.get_config()), quantization, sparsity)
    config = {key: value for key, value in layer.get_config().items() if key in DENSE_ARGUMENTS}
    return QuantDense(**config, quantization=quantization, sparsity=sparsity)


def _copy_weights(old, new):
    """Give a compressed layer the weights of the layer it stands for."""
    if isinstance(new, CompressedLayer):
        new.layer.set_weights((old.layer if isinstance(old, CompressedLayer) else old).get_weights())
        return
    new.kernel.assign(ops.convert_to_numpy(old.kernel))  # through NumPy: two variables must not share a buffer on JAX
    if old.use_bias:
        new.bias.assign(ops.convert_to_numpy(old.bias))


def _remembers_its_layers(model):
    """True if rebuilding the model from its own configuration brings back the compressed layers."""
    if not isinstance(model, GRAPHS):
        return False
    for layer in model.layers:
        inside = [found for found in walk_layers(layer) if isinstance(found, CompressedKernel) and found is not layer]
        if inside and not _remembers_its_layers(layer):
            return False
    return True
