"""Copy a Keras model while exchanging some of its layers: the one walk that compressing and baking share."""

import contextlib
import json
import os
import tempfile

import keras
from keras import ops
from keras.src.models import Functional  # the class of functional models; Keras does not export it by name

GRAPHS = (keras.Sequential, Functional)


def sublayers(layer):
    """Return the direct sublayers of a layer or model, in the order in which Keras tracks them."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def walk_layers(layer):
    """Yield a layer and everything below it, parents first, each layer once.

    This finds layers in functional, Sequential, subclassed and nested models alike.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="a")])
    >>> [type(found).__name__ for found in walk_layers(model)]
    ['Sequential', 'InputLayer', 'Dense']
    """
    seen = set()
    pending = [layer]
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        pending = sublayers(current) + pending


def layer_path(layer):
    """Return the path of a built layer, such as "usm_for_ctc/encoder/block_0/conv/expand"."""
    return layer.path or layer.name


def rewrite(model, replace):
    """Return a copy of a built model with some layers exchanged; all other weights are kept.

    Args:
        model: a built Keras model or layer of any kind.
        replace: function `layer -> None` to keep a layer, or `layer -> (new_layer, fill)` where `new_layer` is not
            built and `fill(new_layer)` gives it its weights once it is. It is asked for every layer, parents first;
            nothing below an exchanged layer is visited.

    Returns:
        The copy. Layers used in several places stay shared.

    Raises:
        ValueError: the model is not built, a layer cannot be rebuilt from its configuration, or a functional or
            Sequential model has a `call` of its own.
    """
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built, so it has no weights to keep. Call it on a batch, or build() it."
        )
    rewriter = _Rewriter(replace)
    copy = rewriter.copy(model)
    for layer in walk_layers(model):  # parents first: a layer passes its flag on to all below it
        new = rewriter.copies.get(id(layer))
        if new is not None and new.trainable != layer.trainable:
            new.trainable = layer.trainable
    return copy


def in_float32(model):
    """Return a copy of a model that computes in float32, or the model itself if it does so already.

    A phone has no use for the 16-bit arithmetic that was quick in training, and converters handle it badly. Only models
    whose dtype policies are in their configurations can be copied so.

    Example:

    >>> half = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_bfloat16")])
    >>> in_float32(half).layers[0].compute_dtype
    'float32'
    """
    if all(layer.compute_dtype == "float32" for layer in walk_layers(model)):
        return model
    return _Rewriter(lambda layer: None, _policies_to_float32).copy(model)


def _policies_to_float32(config):
    """Return a configuration in which every dtype policy is "float32"."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return {**config, "config": {"name": "float32"}}
        return {key: _policies_to_float32(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(map(_policies_to_float32, config))
    return config


def build_again(layer, build_config, path):
    """Build a layer or model from recorded input shapes, so that everything below it gets the path it had.

    Keras runs a model that has no `build` of its own outside of its name scope, and does not run such a layer at all;
    a symbolic call does both.
    """
    with _scope_above(path):
        if type(layer).build is keras.Layer.build and "input_shape" in build_config:
            shapes = json.loads(json.dumps(build_config["input_shape"]))  # Keras wraps dicts; JAX knows plain ones only
            layer(keras.tree.map_shape_structure(keras.KerasTensor, shapes))
        else:
            layer.build_from_config(build_config)


@contextlib.contextmanager
def _scope_above(path):
    with contextlib.ExitStack() as scopes:
        for number, part in enumerate(path.split("/")[:-1]):
            scopes.enter_context(keras.name_scope(part, override_parent=None if number else ""))
        yield


class _Rewriter:
    def __init__(self, replace, change_config=lambda config: config):
        self.replace = replace
        self.change_config = change_config  # what becomes of the configuration that a layer is copied through
        self.copies = {}  # id of an old layer -> its new layer, so that shared layers stay shared

    def copy(self, old, plain=None):
        """Return the copy of a layer; `plain` is one that its owner's configuration gave, if there is one."""
        if id(old) not in self.copies:
            if isinstance(old, GRAPHS):
                self.copies[id(old)] = self._copy_graph(old, plain)
            else:
                self._fill(old, self._from_config(old) if plain is None else plain)
        return self.copies[id(old)]

    def _from_config(self, old):
        try:
            return type(old).from_config(self.change_config(old.get_config()))
        except Exception as error:
            raise _cannot_copy(old, error) from error

    def _copy_graph(self, old, plain):
        """Functional and Sequential models are graphs of calls: build the same graph with new layers."""
        if type(old).call not in [graph.call for graph in GRAPHS]:
            raise ValueError(
                f"Model {old.name!r} of class {type(old).__name__} is a graph of layers with a `call` of its own, "
                "which a copy of the graph would not have. Put what `call` does into a layer, or make the class a "
                "keras.Model that calls its layers itself."
            )
        fresh = []
        if plain is None and type(old) not in (*GRAPHS, keras.Model):
            plain = self._from_config(old)  # a subclass makes its layers itself; not all of them have a configuration
        parts = {} if plain is None else {layer.name: layer for layer in plain.layers}

        def clone(layer):
            if not isinstance(layer, keras.Layer):  # an operation such as x + y, which has no weights
                return type(layer).from_config(layer.get_config())
            if isinstance(layer, GRAPHS):
                return self.copy(layer, parts.get(layer.name))
            if id(layer) not in self.copies:
                new, fill = self.replace(layer) or (parts.get(layer.name), None)
                self.copies[id(layer)] = new = self._from_config(layer) if new is None else new
                fresh.append((layer, new, fill))
            return self.copies[id(layer)]

        with _scope_above(layer_path(old)):
            new = _clone(old, clone)
        for layer, copy, fill in fresh:  # a layer without build() has weights only now that it was called
            if fill is None:
                self._fill(layer, copy)
            else:
                fill(copy)
        return new

    def _fill(self, old, new):
        """Give a plain copy of a layer its weights, then exchange what it holds in its attributes."""
        try:
            build_config = old.get_build_config()
            if build_config and not new.built:
                build_again(new, build_config, layer_path(old))
            new.set_weights(old.get_weights())
            finish_normalization(new)
            _copy_assets(old, new)
        except Exception as error:
            raise _cannot_copy(old, error) from error
        self._exchange_below(old, new)

    def _exchange_below(self, old, new):
        self.copies[id(old)] = new
        if getattr(old, "seed_generator", None) is not None:
            state = ops.convert_to_numpy(old.seed_generator.state)  # two variables must not share a buffer on JAX
            new.seed_generator.state.assign(state)
        for place, old_child in _held_layers(old):
            new_child = _at(_attributes(new), place)
            answer = self._exchange(old_child, new_child)
            if answer is not new_child:
                _swap(new, place, new_child, answer)

    def _exchange(self, old, new):
        """Return what should stand in the copy where `new`, the plain copy of `old`, stands now."""
        if id(old) in self.copies:
            return self.copies[id(old)]
        answer = self.replace(old)
        if answer is not None:
            layer, fill = answer
            build_again(layer, old.get_build_config(), layer_path(old))
            fill(layer)
            self.copies[id(old)] = layer
            return layer
        if isinstance(old, GRAPHS):
            return self.copy(old, new)
        self._exchange_below(old, new)
        return new


def finish_normalization(layer):
    """Let `Normalization` layers work out from their weights what they multiply by, as Keras does after loading."""
    for found in walk_layers(layer):
        if isinstance(found, keras.layers.Normalization):
            found.finalize_state()


def _copy_assets(old, new):
    """Give a copy what its layers keep in files beside their weights: the vocabulary a lookup has learned."""
    keepers = ([layer for layer in walk_layers(root) if hasattr(layer, "save_assets")] for root in (old, new))
    for one, other in zip(*keepers, strict=True):
        weights = {}  # of "tf_idf", which are no variables; the assets need them
        one.save_own_variables(weights)
        other.load_own_variables(weights)
        with tempfile.TemporaryDirectory() as folder:
            one.save_assets(folder)
            if os.listdir(folder):
                other.load_assets(folder)


def _clone(model, clone):
    """Return a graph, not compiled, of new layers; `clone` gives the new layer for an old one."""
    if isinstance(model, keras.Sequential):
        (old,) = model.inputs
        layers = [keras.Input(batch_shape=old.shape, dtype=old.dtype, name=old.name), *map(clone, model.layers)]
        return keras.Sequential(layers, name=model.name)
    shell = keras.Model(model.input, model.output, name=model.name)  # the same graph, never compiled
    return keras.models.clone_model(shell, clone_function=clone)


def _cannot_copy(layer, error):
    return ValueError(
        f"Layer {layer_path(layer)!r} of class {type(layer).__name__} cannot be copied through get_config, "
        f"get_build_config and set_weights, which compressing it needs: {error}"
    )


def _attributes(layer):
    """Return the attributes that may hold sublayers; PyTorch keeps them apart, TensorFlow keeps a second list."""
    attributes = {**vars(layer), **vars(layer).get("_modules", {})}
    internal = ("_layers", "_metrics", "_modules", "_tracker")
    tensorflow = ("_self_unconditional", "_self_tracked")
    return {
        name: value for name, value in attributes.items() if name not in internal and not name.startswith(tensorflow)
    }


def _held_layers(layer):
    """Yield `(place, sublayer)` for every sublayer held in an attribute, or in lists, tuples and dicts there.

    A place is the name of the attribute, then the keys and positions that lead to the sublayer.
    """
    pending = [((name,), value) for name, value in _attributes(layer).items()]
    while pending:
        place, value = pending.pop(0)
        if isinstance(value, keras.Layer):
            yield place, value
        elif isinstance(value, dict):
            pending += [((*place, key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [((*place, position), item) for position, item in enumerate(value)]


def _at(value, place):
    for key in place:
        value = value[key]
    return value


def _swap(parent, place, old, new):
    """Put `new` where `old` stands, in the attribute and in Keras' own list of sublayers (in the same place)."""
    if parent._tracker.is_in_store("layers", old):
        parent._tracker.replace_tracked_value("layers", old, new)
    *above, key = place
    while above:
        container = _at(_attributes(parent), above)
        if not isinstance(container, tuple):
            container[key] = new
            return
        items = [*container[:key], new, *container[key + 1 :]]  # a tuple must be exchanged where it stands itself
        new = type(container)(*items) if hasattr(container, "_fields") else tuple(items)
        *above, key = above
    setattr(parent, key, new)
