"""`serving_model`: the functional model that is exported, with the shapes a caller asked for."""

import keras

from keras_usm_lite.layers.log_mel import LogMel


def require_tensorflow(what):
    """Raise a clear error unless Keras runs on TensorFlow, which writes the exported graphs.

    Raises:
        RuntimeError: another backend is active.
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"{what} needs the TensorFlow backend to write its graph; the active one is {keras.backend.backend()!r}. "
            "Save the model with model.save('model.keras') or usm.save_packed, and export it in a process started with "
            "KERAS_BACKEND=tensorflow."
        )


def serving_model(model, sample_rate_input=None, batch=1, length=None, frontend=None):
    """Wrap a recogniser into a functional model with one input of a fixed meaning.

    Args:
        model: log-mel features in, logits out.
        sample_rate_input: None for a model that takes features `[batch, frames, bins]`, or 16000 for one that takes raw
            audio `[batch, samples]` in [-1, 1] and computes the features itself.
        batch: rows, or None for any number.
        length: frames or samples, or None for any number.
        frontend: the `LogMel` the model was trained with; by default `LogMel(num_mel_bins=model.num_mel_bins)`.

    Returns:
        A functional model with input "features" or "audio" and output "logits".

    Raises:
        ValueError: a sample rate that the front end does not have, or a model whose number of bins is not known.

    Example:

    >>> import keras_usm_lite as usm
    >>> served = serving_model(usm.USMForCTC(9, num_layers=1), sample_rate_input=16000, length=16000)
    >>> served.input_shape, served.output_shape
    ((1, 16000), (1, 25, 9))
    """
    bins = num_mel_bins(model)
    if bins is None:
        raise ValueError(
            f"{type(model).__name__} {model.name!r} does not say how many mel bins it takes; only USMForCTC and "
            "its compressed copies can be exported with signatures. For others use usm.bake(model).export(...)."
        )
    if sample_rate_input is None:
        inputs = keras.Input(batch_shape=(batch, length, bins), name="features")
        features = inputs
    else:
        frontend = frontend if frontend is not None else LogMel(num_mel_bins=bins)
        if sample_rate_input != frontend.sample_rate or frontend.num_mel_bins != bins:
            raise ValueError(
                f"The model takes {bins} mel bins at the front end's {frontend.sample_rate} Hz; got sample_rate_input="
                f"{sample_rate_input!r} and a front end with {frontend.num_mel_bins} bins. Give the LogMel layer the "
                "model was trained with, and its sample rate."
            )
        inputs = keras.Input(batch_shape=(batch, length), name="audio")
        features = frontend(inputs)
    logits = model(features)
    return keras.Model(inputs, keras.layers.Identity(name="logits", dtype="float32")(logits), name="serving")


def num_mel_bins(model):
    """Return how many mel bins a recogniser takes, also through its compressed copies; None for other models.

    Example:

    >>> import keras_usm_lite as usm
    >>> num_mel_bins(usm.USMForCTC(9, num_layers=1)), num_mel_bins(keras.Sequential())
    (80, None)
    """
    while not hasattr(model, "num_mel_bins") and hasattr(model, "model"):
        model = model.model
    return getattr(model, "num_mel_bins", None)
