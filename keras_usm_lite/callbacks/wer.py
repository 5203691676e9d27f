"""The word error rate of each epoch, where Keras looks for its metrics."""

import keras

from keras_usm_lite.error_rates import error_rates
from keras_usm_lite.transcribe import transcribe_dataset


class WordErrorRate(keras.callbacks.Callback):
    """Transcribes a dataset greedily at the end of an epoch and logs `val_wer` and `val_cer` (fractions).

    The history and the progress bar show both values. Keras hands one `logs` dict from callback to callback
    in the order of the list, so put this one *before* those that read it, such as
    `ModelCheckpoint(path, monitor="val_wer", mode="min", save_best_only=True)`, `EarlyStopping` and
    `CSVLogger`. (A `ModelCheckpoint` that finds no `val_wer` only warns, and saves every epoch.)

    Args:
        dataset: `len(dataset)` batches `dataset[i] = (x, y, sample_weight)`, see `transcribe_dataset`; the
            model must turn `x` into logits `[B, T, V]`.
        tokenizer: turns labels into text with `decode(ids)`.
        every: measure the first epoch of a training and then those whose number, counted from 1, is a
            multiple of this. The epochs in between repeat the last value, which no `ModelCheckpoint` takes
            for an improvement.
        prefix: what the names `wer` and `cer` are preceded by.

    Raises:
        ValueError: if `every` is below 1.

    Example:
        >>> import numpy as np
        >>> from keras_usm_lite.tokenizers.char_tokenizer import CharTokenizer
        >>> x = np.eye(3, dtype="float32")[[[1, 0, 2]]]  # the frames say "ab",
        >>> y = np.array([[1, 1]])  # the labels say "aa"
        >>> layer = keras.layers.Dense(3, kernel_initializer="identity")
        >>> model = keras.Sequential([keras.Input((None, 3)), layer])
        >>> model.compile(loss="ctc")
        >>> wer = WordErrorRate([(x, y, np.ones(1))], CharTokenizer("ab"))
        >>> history = model.fit(x, y, verbose=0, callbacks=[wer])
        >>> history.history["val_wer"], history.history["val_cer"]
        ([1.0], [0.5])
    """

    def __init__(self, dataset, tokenizer, every=1, prefix="val_"):
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1 epoch, got {every}.")
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.every = every
        self.prefix = prefix

    def on_train_begin(self, logs=None):
        """Forgets the rates of an earlier training."""
        self._rates = None

    def on_epoch_end(self, epoch, logs):
        """Adds the error rates to `logs`."""
        if self._rates is None or (epoch + 1) % self.every == 0:
            predict = self.model.predict_on_batch
            self._rates = error_rates(*transcribe_dataset(predict, self.dataset, self.tokenizer))
        logs[f"{self.prefix}wer"] = self._rates.wer
        logs[f"{self.prefix}cer"] = self._rates.cer
