"""Compile and fit a CTC recogniser with defaults that work, for examples, benchmarks and your own scripts."""

import keras

from keras_usm_lite.callbacks.wer import WordErrorRate


def compile_ctc(model, learning_rate, steps, warmup=0.1, weight_decay=1e-2):
    """Compile a model for CTC: AdamW, linear warm-up and cosine decay to zero, gradient norm clipped at 1.

    Args:
        model: CTC logits with blank 0, padded frames certain blanks (`USMForCTC`).
        learning_rate: peak learning rate.
        steps: training steps of the whole run.
        warmup: share of the steps in which the rate rises.
        weight_decay: decoupled decay of every kernel; biases, norms and learned scales have none.

    Returns:
        The model.

    Example:

    >>> import keras_usm_lite as usm
    >>> type(compile_ctc(usm.USMForCTC(9, num_layers=1), 1e-3, steps=100).optimizer).__name__
    'AdamW'
    """
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(steps - int(warmup * steps), 1), warmup_target=learning_rate, warmup_steps=int(warmup * steps)
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=weight_decay, beta_2=0.98, clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "kernel_scale"])
    loss = keras.losses.CTC(reduction="mean_with_sample_weight")
    model.compile(optimizer, loss=loss, jit_compile=_compile_step())
    return model


def fit_ctc(model, train, dev, tokenizer, epochs, callbacks=(), backup_dir=None, verbose="auto"):
    """Train a compiled model with the word error rate of `dev` in every epoch's logs.

    Args:
        model: compiled by `compile_ctc`.
        train, dev: `SpeechBatches`.
        tokenizer: turns label ids into text.
        epochs: passes over `train`.
        callbacks: further callbacks, for example `callbacks.NMPruning`; they see `val_wer` in the logs.
        backup_dir: folder for `keras.callbacks.BackupAndRestore`: an interrupted call, made again, continues at the
            epoch it was in, with the batches in the order they would have had.
        verbose: as in `model.fit`.

    Returns:
        The Keras `History`.
    """
    follow = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: train.set_epoch(epoch))
    backup = [keras.callbacks.BackupAndRestore(backup_dir)] if backup_dir else []
    return model.fit(
        train,
        epochs=epochs,
        shuffle=False,  # the batches are shuffled already, reproducibly
        verbose=verbose,
        callbacks=[follow, WordErrorRate(dev, tokenizer), *backup, *callbacks],
    )


def _compile_step():
    """On a CPU, TensorFlow's own kernels beat XLA for these models; everywhere else let Keras decide."""
    if keras.backend.backend() != "tensorflow":
        return "auto"
    import tensorflow as tf

    accelerated = tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("TPU")
    return "auto" if accelerated else False
