"""`build_optimizer`: make an optimizer's variables before the training step is traced."""


def build_optimizer(model):
    """Make the variables of the optimizer of a compiled model, if the model has its own and the optimizer does not.

    Keras makes them in the first training step. There TensorFlow, which must not make variables twice, traces that step
    a second time; so a Conformer whose optimizer is built trains its first step after half the wait.

    Args:
        model: a compiled model. One that is not built is left to Keras.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> build_optimizer(model)
    >>> model.optimizer.built
    True
    """
    if model.built and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
