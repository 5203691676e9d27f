"""`Backup`: a training that is killed at any moment and started again ends as if nothing had happened."""

import glob
import itertools
import json
import os
import warnings
import zipfile

import keras
import numpy as np
from keras import ops

from keras_usm_lite.callbacks.finite_loss import require_finite
from keras_usm_lite.callbacks.step_callback import require_built
from keras_usm_lite.compression import compressed_layers
from keras_usm_lite.data.manifest import replacing
from keras_usm_lite.optimizers.build_optimizer import build_optimizer
from keras_usm_lite.optimizers.slowed import schedule_factor, set_schedule_factor

DESCRIPTION = "training.json"


class Backup(keras.callbacks.Callback):
    """Keep the state of a training in one file, written before every epoch and at the end, and continue from it.

    The file holds all variables of the model, masks, scales, bits and the states of its random generators included; all
    variables of the optimizer, and so the position in every schedule; how much the learning rate was slowed down; the
    number of the epoch; and the logs of the epochs before. It takes the place of the one before when it is complete and
    flushed to the disk, so a process or machine that dies while writing loses nothing. The file of a finished training
    stays: save the model, then delete it. Until then the same `fit` made again gives the finished model at once, with a
    warning.

    `keras.callbacks.BackupAndRestore` leaves out random generators (dropout and SpecAugment start over) and writes
    weights and epoch number in place to two files (a kill within or between them leaves an unreadable state, or an
    epoch that is trained twice). With `save_freq` in steps, it repeats the batches of the epoch that were seen already.

    Put it *first* in the list: other callbacks then find the restored state when training begins, and have done their
    part of an epoch when it is written. The order of the data must follow from the epoch (`fit_ctc` sees to it, by
    `SpeechBatches.set_epoch`). Callbacks of Keras that remember, such as `EarlyStopping` and
    `ModelCheckpoint(save_best_only=True)`, start afresh; a training that one of them stopped is not at its end, so the
    same `fit` trains on. After a continuation, masks and bits come later by the steps that loss scaling has skipped.

    Args:
        folder: where `training.zip` is kept, one folder per training; it is made if missing.

    Attributes:
        path: path of the file.
        epoch: number of the epoch at whose beginning the file was written; None before that.

    Raises:
        OSError: the file cannot be written; the one before is intact.
        NonFiniteError: a trainable variable is not finite, also after the last step; the file before is intact.
        ValueError: the model is not built, or the file is damaged or of another model or optimizer.

    Example:

    >>> import tempfile
    >>> def train(folder, dies_in=None):
    ...     keras.utils.set_random_seed(0)
    ...     model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.5), keras.layers.Dense(2)])
    ...     model.compile("adam", "mse")
    ...     die = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: 1 / (epoch != dies_in))
    ...     callbacks = [Backup(folder), die]
    ...     return model.fit(np.ones((4, 8)), np.ones((4, 2)), epochs=4, verbose=0, callbacks=callbacks).history
    >>> whole = train(tempfile.mkdtemp())
    >>> folder = tempfile.mkdtemp()
    >>> try:
    ...     history = train(folder, dies_in=2)
    ... except ZeroDivisionError:
    ...     print("died")
    died
    >>> os.listdir(folder)
    ['training.zip']
    >>> np.allclose(train(folder)["loss"], whole["loss"])
    True
    """

    def __init__(self, folder):
        super().__init__()
        self.path = os.path.join(folder, "training.zip")

    def on_train_begin(self, logs=None):
        """Restore what an interrupted training left, if there was one."""
        require_built(self.model)
        build_optimizer(self.model)
        for leftover in glob.glob(f"{glob.escape(self.path)}.*.tmp"):  # of a process that died while writing
            os.remove(leftover)
        self.epoch, self._logs = None, []
        if os.path.exists(self.path):
            self.restore()
            if self.epoch >= self.params.get("epochs", np.inf):
                warnings.warn(
                    f"{self.path} holds this training at its end (epoch {self.epoch}): nothing is left to train. "
                    "Delete the file to train anew.",
                    stacklevel=2,
                )

    def on_epoch_begin(self, epoch, logs=None):
        """Write the state, unless it was just read."""
        self.model._initial_epoch = None  # it has begun there; the next fit of the model would, too
        if epoch != self.epoch:
            self.save(epoch)

    def on_epoch_end(self, epoch, logs=None):
        """Keep the logs; callbacks further down the list may still add to them."""
        self._logs.append(logs)

    def on_train_end(self, logs=None):
        """Write the last state, unless it was just read; put the epochs before the interruption into the history."""
        history = self.model.history
        before = self._logs[: len(self._logs) - len(history.epoch)]
        if history.epoch:
            self.save(history.epoch[-1] + 1)
        first = self.epoch - len(self._logs)
        history.epoch[:0] = range(first, first + len(before))
        for name in {name: None for epoch in before for name in epoch}:
            history.history.setdefault(name, [])[:0] = [epoch[name] for epoch in before if name in epoch]
        self.model._initial_epoch = None  # also if no epoch was left to begin

    def save(self, epoch):
        """Write the state at the beginning of an epoch.

        Args:
            epoch: number of the epoch that comes next.
        """
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            with replacing(self.path) as temporary:
                with open(temporary, "wb") as file:
                    with zipfile.ZipFile(file, "w") as archive:
                        self._write(archive, epoch)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            last = "the one before is intact" if os.path.exists(self.path) else "there is none before it"
            raise OSError(
                error.errno,
                f"Could not write the backup of epoch {epoch}, {last} ({error.strerror or error}); "
                "free space or choose a writable folder, then train again",
                self.path,
            ) from error
        self.epoch = epoch

    def restore(self):
        """Take the state from the file; the next `fit` begins at its epoch."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._read(archive)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise ValueError(
                f"The backup {self.path} is damaged ({error}); delete it to train from the start."
            ) from error

    def _variables(self):
        return [*self.model.variables, *self.model.optimizer.variables]

    def _write(self, archive, epoch):
        trainable = {id(variable) for variable in self.model.trainable_variables}
        for number, variable in enumerate(self._variables()):
            array = ops.convert_to_numpy(variable)
            if id(variable) in trainable:
                require_finite(variable, array, f"before epoch {epoch}")
            _write_array(archive, f"{number}.npy", array)
        for number, array in enumerate(_torch_generators()):
            _write_array(archive, f"torch_{number}.npy", array)
        description = {"epoch": epoch, "schedule_factor": schedule_factor(self.model), "logs": self._logs}
        description["compression"] = _compression(self.model)
        archive.writestr(DESCRIPTION, json.dumps(description, default=lambda value: np.asarray(value).tolist()))

    def _read(self, archive):
        variables = self._variables()
        count = sum(name[0].isdigit() for name in archive.namelist())
        if count != len(variables):
            raise ValueError(
                f"{self.path} holds {count} variables, this model and its optimizer {len(variables)}. Build and "
                "compile them as before, or delete the file to train from the start."
            )
        description = json.loads(archive.read(DESCRIPTION))
        before, now = description.get("compression"), _compression(self.model)  # files of older versions do not say
        if before not in (None, now):
            other = next(pair for pair in itertools.zip_longest(before, now) if pair[0] != pair[1])
            raise ValueError(
                f"{self.path} holds the training of a model with a layer of {other[0]}, where this one has {other[1]}. "
                "Give another folder, or delete the file to train from the start."
            )
        for number, variable in enumerate(variables):
            array = _read_array(archive, f"{number}.npy")
            if array.shape != tuple(variable.shape):
                raise ValueError(
                    f"{self.path} holds a variable of shape {array.shape} where {variable.path!r} has "
                    f"{tuple(variable.shape)}. Build the model as before, or delete the file to train from the start."
                )
            variable.assign(array.view(variable.dtype) if array.dtype.kind == "V" else array)
        _set_torch_generators([_read_array(archive, name) for name in archive.namelist() if name.startswith("torch_")])
        set_schedule_factor(self.model, description["schedule_factor"])
        self.epoch, self._logs = description["epoch"], description["logs"]
        self.model._initial_epoch = self.epoch  # as BackupAndRestore does: there is no public way


def _compression(model):
    """What each compressed layer was asked to be; its variables alone would fit another width or pattern, too."""
    return [f"{layer.quantization or 'float'} {layer.sparsity or 'dense'}" for layer in compressed_layers(model)]


def _write_array(archive, name, array):
    with archive.open(name, "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.asarray(array))


def _read_array(archive, name):
    with archive.open(name) as file:
        return np.lib.format.read_array(file)


def _torch_generators():
    """The states of torch's own generators, from which dropout without a seed draws on the torch backend."""
    if keras.backend.backend() != "torch":
        return []
    import torch

    return [torch.get_rng_state().numpy(), *(state.numpy() for state in torch.cuda.get_rng_state_all())]


def _set_torch_generators(states):
    if keras.backend.backend() != "torch" or not states:
        return
    import torch

    torch.set_rng_state(torch.from_numpy(states[0]))
    torch.cuda.set_rng_state_all([torch.from_numpy(state) for state in states[1:]])
