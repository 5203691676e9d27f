"""`describe_model` and `rebuild_model`: the Keras configuration of a model, and the model of one from a file."""

import traceback

import keras

from keras_usm_lite.packing.packed_file_error import PackedFileError
from keras_usm_lite.packing.weight_budget import weight_budget


def describe_model(model):
    """Return the Keras configuration of a model, without what it, or a model inside, was compiled with.

    Example:

    >>> inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)], name="inner")
    >>> inner.compile("adam", "mse")
    >>> "compile_config" in str(describe_model(keras.Sequential([inner])))
    False
    """
    return _uncompiled(keras.saving.serialize_keras_object(model))


def rebuild_model(config, variables, elements, custom_objects=None):
    """Return the model of a configuration with arbitrary weights, after trying out that they are not too many.

    The trial takes no memory for weights (`weight_budget`). A class that makes variables of arrays cannot be tried out;
    where a layer of yours does, the model is built without a limit. What Keras would compile is not compiled.

    Args:
        config: what `describe_model` returned, or something else of JSON.
        variables: how many variables the model may create, random states and what it builds in passing included.
        elements: how many elements they may have together.
        custom_objects: classes of your own that the model contains.

    Returns:
        The model, not compiled.

    Raises:
        PackedFileError: too many weights, or no configuration of a model.

    Example:

    >>> config = describe_model(keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)]))
    >>> rebuild_model(config, variables=2, elements=9).count_params()
    9
    """
    config = _uncompiled(config)
    try:
        try:
            with weight_budget(variables, elements):
                keras.saving.deserialize_keras_object(_uncompiled(config), custom_objects=custom_objects)
        except ValueError as error:
            if "in a stateless scope" not in str(error) or not _in_a_class_of_yours(error):
                raise
        model = keras.saving.deserialize_keras_object(config, custom_objects=custom_objects)
    except Exception as error:
        raise PackedFileError(f"the model cannot be rebuilt from its description: {error}") from error
    if not isinstance(model, keras.Layer):
        raise PackedFileError(f"what is rebuilt from its description is a {type(model).__name__}, not a model.")
    return model


def _uncompiled(config):
    """A copy without optimizers and losses: Keras would make them at once, with variables of their own."""
    if isinstance(config, dict):
        dropped = {"compile_config"} if "class_name" in config else set()
        return {key: _uncompiled(value) for key, value in config.items() if key not in dropped}
    return [_uncompiled(value) for value in config] if isinstance(config, (list, tuple)) else config


def _in_a_class_of_yours(error):
    """Whether a layer that is neither Keras' nor ours was at work."""
    owners = (type(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__))
    known = ("keras", "keras_usm_lite")
    return any(issubclass(owner, keras.Layer) and owner.__module__.split(".")[0] not in known for owner in owners)
