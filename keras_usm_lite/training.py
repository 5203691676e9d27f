"""Compile and fit a CTC recogniser with defaults that work, for examples, benchmarks and your own scripts."""

import warnings

import keras

from keras_usm_lite.callbacks.backup import Backup
from keras_usm_lite.callbacks.finite_loss import FiniteLoss, NonFiniteError
from keras_usm_lite.callbacks.wer import WordErrorRate
from keras_usm_lite.models.compressed_model import CompressedModel
from keras_usm_lite.optimizers.build_optimizer import build_optimizer
from keras_usm_lite.optimizers.slowed import slow_down
from keras_usm_lite.optimizers.step_adamw import StepAdamW

WARMUP = 600  # steps


def warmup_cosine(learning_rate, steps, warmup=None):
    """Return a Keras schedule: the rate rises linearly from zero, then falls as a cosine to zero.

    A Conformer that starts from random weights and meets its peak rate too soon learns to say nothing but blanks, and
    takes long to leave that. So by default the rate rises for a tenth of the training, but for at least 600 steps, or
    for half of a shorter training.

    Args:
        learning_rate: peak rate.
        steps: training steps of the whole run.
        warmup: None, or the share of the steps in which the rate rises; for fine-tuning 0.1 is enough.

    Returns:
        A `keras.optimizers.schedules.CosineDecay`.

    Raises:
        ValueError: a warmup that is not a share.

    Example:

    >>> schedule = warmup_cosine(0.5, steps=100)
    >>> [round(float(schedule(step)), 2) for step in (0, 25, 50, 100)]
    [0.0, 0.25, 0.5, 0.0]
    """
    if warmup is not None and not 0 <= warmup <= 1:
        raise ValueError(f"warmup={warmup!r} must be a share of the {steps} steps, from 0 to 1, or None.")
    rising = max(steps // 10, min(WARMUP, steps // 2)) if warmup is None else int(warmup * steps)
    falling = max(steps - rising, 1)
    return keras.optimizers.schedules.CosineDecay(0.0, falling, warmup_target=learning_rate, warmup_steps=rising)


def compile_ctc(model, learning_rate, steps, warmup=None, weight_decay=1e-2, freeze_step=None):
    """Compile a model for CTC: AdamW, `warmup_cosine`, gradient norms clipped at 1.

    Args:
        model: CTC logits with blank 0, padded frames certain blanks (`USMForCTC`).
        learning_rate: peak learning rate.
        steps: training steps of the whole run.
        warmup: None, or the share of the steps in which the rate rises; see `warmup_cosine`.
        weight_decay: decoupled decay of every kernel; biases, norms and learned scales have none.
        freeze_step: None, or the update from which the second moment is frozen (`StepAdamW`), for masks that are
            learned: with `NMPruning(start_step=freeze_step)`.

    Returns:
        The model. A file that `model.save` writes does not say that biases, norms and learned scales do not decay:
        after `load_model` call `compile_ctc` again. (`callbacks.Backup` needs nothing.)

    Example:

    >>> import keras_usm_lite as usm
    >>> type(compile_ctc(usm.USMForCTC(9, num_layers=1), 1e-3, steps=100).optimizer).__name__
    'AdamW'
    """
    schedule = warmup_cosine(learning_rate, steps, warmup)
    settings = {"weight_decay": weight_decay, "beta_2": 0.98, "clipnorm": 1.0}
    if freeze_step is None:
        optimizer = keras.optimizers.AdamW(schedule, **settings)
    else:
        optimizer = StepAdamW(schedule, freeze_step=freeze_step, **settings)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "scale_gain"])
    loss = keras.losses.CTC(reduction="mean_with_sample_weight")
    model.compile(optimizer, loss=loss, jit_compile=_compile_step())
    return model


def fit_ctc(model, train, dev, tokenizer, epochs, callbacks=(), backup_dir=None, recover=0, verbose="auto"):
    """Train a compiled model with the word error rate of `dev` in every epoch's logs.

    A loss that is not finite stops the training. With `recover` it goes back to the backup instead, to the beginning of
    the epoch, and takes the same batches again at half the learning rate.

    Args:
        model: compiled by `compile_ctc`.
        train, dev: `SpeechBatches`.
        tokenizer: turns label ids into text.
        epochs: passes over `train`.
        callbacks: further callbacks, for example `callbacks.NMPruning`; they see `val_wer` in the logs.
        backup_dir: folder for `callbacks.Backup`: an interrupted call, made again, continues at the epoch it was in
            and ends like one that was not interrupted. The state at the end stays in it too: delete it when the model
            is saved.
        recover: how many times a loss that is not finite may halve the learning rate; needs `backup_dir`.
        verbose: as in `model.fit`.

    Returns:
        The Keras `History`, with the epochs before an interruption.

    Raises:
        ValueError: the model tells another number of classes apart than the tokenizer has, an utterance of `train` has
            too few frames for its labels, or `recover` without `backup_dir`.
        NonFiniteError: the loss, or a weight at the end of an epoch, is not finite; the backup holds the state before.
    """
    if recover and not backup_dir:
        raise ValueError(f"recover={recover} needs a place to go back to; pass backup_dir, or recover=0.")
    _check_vocabulary(model, train, tokenizer)
    train.check_alignments(lambda frames: _output_shape(model, frames, train.feature_size)[1])
    build_optimizer(model)
    follow = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: train.set_epoch(epoch))
    backup = [Backup(backup_dir)] if backup_dir else []
    followers = [*backup, follow, WordErrorRate(dev, tokenizer), FiniteLoss(), *callbacks]
    for chances in range(recover, -1, -1):
        try:
            # The batches are shuffled already, reproducibly.
            return model.fit(train, epochs=epochs, shuffle=False, verbose=verbose, callbacks=followers)
        except NonFiniteError as error:
            if not chances:
                raise NonFiniteError(f"{error} {_outlook(backup, recover)}") from error
            warnings.warn(f"{error} Going back to {backup[0].path} at half the learning rate.", stacklevel=2)
            backup[0].restore()
            slow_down(model, 0.5)
            backup[0].save(backup[0].epoch)


def _output_shape(model, frames, bins):
    """The shape of the logits of one utterance, also of a functional model, which insists on its kind of input."""
    features = (1, frames, bins)
    inner = getattr(model, "student", model)
    inputs = getattr(inner.model if isinstance(inner, CompressedModel) else inner, "input", None)
    return model.compute_output_shape({"features": features, "lengths": (1,)} if isinstance(inputs, dict) else features)


def _check_vocabulary(model, train, tokenizer):
    """Refuse a model of other labels: CTC takes some of them without an error, and learns something else."""
    classes = _output_shape(model, 100, train.feature_size)[-1]
    labels = getattr(tokenizer, "vocab_size", classes)
    if classes != labels:
        raise ValueError(
            f"The model tells {classes} classes apart, the tokenizer has {labels} with the blank. Train with the "
            "tokenizer the model was made for, or make a model with USMForCTC(tokenizer.vocab_size)."
        )


def _outlook(backup, recover):
    """What to do after a loss that is not finite."""
    if not backup:
        return "With backup_dir and recover=3, fit_ctc goes back and halves the learning rate by itself."
    if not recover:
        return f"{backup[0].path} holds the last good state; recover=3 continues from it at half the learning rate."
    return f"{backup[0].path} holds the last good state, from which {recover} lower learning rates failed."


def _compile_step():
    """On a CPU, TensorFlow's own kernels beat XLA for these models; everywhere else let Keras decide."""
    if keras.backend.backend() != "tensorflow":
        return "auto"
    import tensorflow as tf

    accelerated = tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("TPU")
    return "auto" if accelerated else False
