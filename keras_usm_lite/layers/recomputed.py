"""`recomputed`: call a layer without keeping what its backward pass needs; it is computed again there."""

import keras
from keras import ops


def recomputed(layer, inputs, **kwargs):
    """Return `layer(inputs, **kwargs)`, computed a second time in the backward pass (rematerialisation).

    Between the passes only the inputs are kept: memory for one more forward pass. Masks, random states and losses of
    the layer enter and leave as values, so the second computation repeats the first, its dropout included, and changes
    nothing. `keras.RematScope` of Keras 3.15 cannot do this: it refuses layers that are called with `training`.

    What is computed again must not be used from outside. So where the layer's `call` was exchanged for one that keeps
    outputs (`Distiller`), this one is kept instead, by its attribute `exchange_output`.

    Args:
        layer: a built layer.
        inputs: a float tensor.
        **kwargs: further arguments of its `call`; no gradient goes to them.

    Returns:
        The outputs of the layer.

    Source: arXiv 1604.06174.

    Example:

    >>> layer = keras.layers.Dense(2, kernel_initializer="ones")
    >>> layer.build((None, 3))
    >>> [float(y) for y in recomputed(layer, ops.ones((1, 3)))[0]]
    [3.0, 3.0]
    """
    state = [ops.stop_gradient(variable) for variable in layer.non_trainable_variables]  # read now, not when used
    changed = []
    # Losses of regularizers come last, and Keras adds them by itself.
    regularized = sum(variable.regularizer is not None for variable in layer.trainable_variables)

    def call(inputs, *weights):
        outputs, after, losses = layer.stateless_call(weights, state, inputs, return_losses=True, **kwargs)
        losses = losses[: len(losses) - regularized]
        changed[:] = [number for number, value in enumerate(after) if value is not state[number]]
        return outputs, [after[number] for number in changed], losses

    # Copies: TensorFlow's eager recomputation counts the gradient of a variable that it is given itself twice.
    weights = [ops.copy(variable) for variable in layer.trainable_variables]
    outputs, values, losses = keras.remat(call)(inputs, *weights)
    for number, value in zip(changed, values, strict=True):
        layer.non_trainable_variables[number].assign(value)
    for loss in losses:
        layer.add_loss(loss)
    exchange_output = getattr(vars(layer).get("call"), "exchange_output", None)
    if exchange_output is not None:
        exchange_output(outputs)
    return outputs
