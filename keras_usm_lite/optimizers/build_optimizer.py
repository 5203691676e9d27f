"""`build_optimizer`: make an optimizer's variables before the training step is traced."""


def build_optimizer(model):
    """Make the variables of a compiled model's optimizer, if the model is built and they are not there yet.

    Keras makes them in the first training step. There TensorFlow, which must not make variables twice, traces that step
    a second time; so a Conformer whose optimizer is built trains its first step after half the wait.

    Args:
        model: a model. One that is not built, or has no optimizer (a training loop of your own), stays as it is.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> build_optimizer(model)
    >>> model.optimizer.built
    True
    """
    optimizer = getattr(model, "optimizer", None)  # only compile() makes the attribute
    if model.built and optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
