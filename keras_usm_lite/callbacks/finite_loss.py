"""`FiniteLoss`: a training whose loss is no number stops, and says so."""

import math

import keras
import numpy as np
from keras import ops


class NonFiniteError(FloatingPointError):
    """A loss or a weight is infinite or not a number; the message says when it was noticed and what to do."""


def require_finite(variable, array, moment):
    """Raise `NonFiniteError` if the value of a variable is not finite; `moment` says when, for the message."""
    if not np.isfinite(array).all():
        raise NonFiniteError(
            f"Variable {variable.path!r} is not finite {moment}. Look for features that are not finite, or lower the "
            "learning rate."
        )


class FiniteLoss(keras.callbacks.Callback):
    """Raise `NonFiniteError` as soon as the training loss is not finite, or if the weights are not at the end.

    `keras.callbacks.TerminateOnNaN` ends the training as if it were complete. This one does not make the device wait
    either: where Keras reads losses in another thread (on JAX), the error may come a few batches late.

    Raises:
        NonFiniteError: the running loss of the epoch, or a weight after the last step, is infinite or not a number.

    Example:

    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> try:
    ...     history = model.fit(np.full((4, 2), np.nan), np.ones((4, 1)), verbose=0, callbacks=[FiniteLoss()])
    ... except NonFiniteError as error:
    ...     print(str(error).split(" (")[0])
    The loss is nan after batch 0 of epoch 0
    """

    async_safe = True  # tells Keras not to wait for the loss of each batch

    def on_epoch_begin(self, epoch, logs=None):
        """Remember the epoch for the message."""
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        """Look at the loss."""
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"The loss is {loss} after batch {batch} of epoch {self._epoch} (both counted from 0). "
                "Look for features that are not finite, or lower the learning rate."
            )

    def on_train_end(self, logs=None):
        """Look at the weights: no loss has seen what the last step did to them."""
        for variable in self.model.trainable_variables:
            require_finite(variable, ops.convert_to_numpy(variable), "after the last step")
