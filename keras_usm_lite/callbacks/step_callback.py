"""`StepCallback`: knows the number of the next training step without asking the device for it in every step."""

import keras

from keras_usm_lite.optimizers.build_optimizer import build_optimizer


def require_built(model):
    """Raise for a model without weights, of which a callback could find nothing when training begins.

    Example:

    >>> require_built(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]))
    """
    if not model.built:
        raise ValueError(f"Model {model.name!r} is not built; call it on a batch before fit.")


class StepCallback(keras.callbacks.Callback):
    """Base of the schedules: calls `on_step(step)` before training step `step`, counted from 0 over the whole training.

    A step is one batch, also with `gradient_accumulation_steps`. The count is the optimizer's own, read once per epoch,
    so a training that was interrupted and restored (by `keras.callbacks.BackupAndRestore`, say) continues at the right
    step. Within an epoch steps are counted here, because reading the optimizer would wait for the device. With
    `steps_per_execution = k` the call comes every `k` steps.
    """

    def set_model(self, model):
        """Start counting: Keras calls this at the beginning of every training."""
        super().set_model(model)
        self._next = 0

    def on_train_begin(self, logs=None):
        """Build the optimizer before the first step."""
        require_built(self.model)
        build_optimizer(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        """Forget the count: the next batch reads the optimizer."""
        self._offset = None

    def on_train_batch_begin(self, batch, logs=None):
        """Work out the step and pass it on."""
        if self._offset is None:
            self.synchronize()
            # Steps that loss scaling skips are not in the optimizer's count, but time does not go back.
            self._offset = max(self._batches_seen(), self._next) - batch
        self._next = batch + self._offset + 1
        self.on_step(batch + self._offset)

    def _batches_seen(self):
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        # Not the public `iterations`: with gradient accumulation that counts updates instead of batches.
        return int(keras.ops.convert_to_numpy(optimizer._iterations))

    def synchronize(self):
        """Bring the variables up to date with the training step, where the backend keeps them apart (JAX)."""
        sync = getattr(self.model, "jax_state_sync", None)
        if sync is not None:
            sync()

    def on_step(self, step):
        """Act before training step `step`; `synchronize()` first if variables are read or written."""
        raise NotImplementedError
