"""`verify_litert`: the gate that an exported recogniser passes only if it hears what the Keras model hears."""

import dataclasses
import functools

import numpy as np

from keras_usm_lite.decoding import greedy_decode
from keras_usm_lite.error_rates import ErrorRates, error_rates
from keras_usm_lite.export.litert_integers import check_integers, litert_kernels
from keras_usm_lite.export.parity_error import ParityError
from keras_usm_lite.export.serving import num_mel_bins
from keras_usm_lite.layers.log_mel import LogMel


@dataclasses.dataclass(frozen=True)
class Parity:
    """What `verify_litert` found; print it, or read the counts.

    Attributes:
        keras, litert: `ErrorRates` of the model and of the file.
        differing: `(reference, text of the model, text of the file)` wherever the two texts differ.
        frames: output frames compared.
        frames_differing: those in which another token is the best.
        logits_error: root mean square of the difference of the logits, relative to their standard deviation.
        kernels: layers whose integers were compared.
        integers: integers that were compared, all of them equal.
    """

    keras: ErrorRates
    litert: ErrorRates
    differing: tuple
    frames: int
    frames_differing: int
    logits_error: float
    kernels: int
    integers: int

    @property
    def wer_change(self):
        """WER of the file minus WER of the model, a fraction."""
        return self.litert.wer - self.keras.wer

    def __str__(self):
        return (
            f"Keras   {self.keras}\n"
            f"LiteRT  {self.litert}\n"
            f"{len(self.differing)} of {self.keras.utterances} texts differ, {self.frames_differing} of {self.frames} "
            f"frames; logits differ by {self.logits_error:.2e} of their deviation (root mean square)\n"
            f"{self.integers:,} integers of {self.kernels} kernels are equal"
        )


def verify_litert(model, path, dataset, tokenizer=None, tolerance=0.01, frontend=None):
    """Run a Keras model and its `.tflite` file on the same utterances and refuse a file that is worse, or other.

    Passes if `|WER(LiteRT) - WER(Keras)| <= tolerance` and the integers read back from the file are the trained ones.
    Both hear each utterance alone, exactly as the file takes it: without padding where the length of the file is free,
    else cut or padded with zeros to its fixed length. Some difference of the logits is normal, for LiteRT quantizes
    activations to int8; it is reported, not judged.

    Args:
        model: the model that was exported, log-mel features in.
        path: the file that `export_litert` wrote.
        dataset: `len(dataset)` batches `dataset[i] = (x, y, sample_weight)` of what the file takes: `x` features
            `[B, frames, bins]` or audio `[B, samples]`, or `{"features" or "audio": ..., "lengths": int [B]}` where
            rows are padded; `y` labels `int [B, L]`, padded with 0; `sample_weight` `[B]`, 0 for rows that only fill
            up. For files that take features, `SpeechBatches` is one.
        tokenizer: turns labels into text with `decode(ids)`; with None every label counts as a word.
        tolerance: largest difference of WER, an absolute fraction: 0.01 is one word in a hundred.
        frontend: for files that take audio, the `LogMel` the model was trained with, if it is not the default.

    Returns:
        A `Parity`.

    Raises:
        ParityError: the integers differ, the file has another vocabulary than the model, gives logits that are not
            numbers, or differs in WER by more than the tolerance.
        ValueError: a dataset without utterances or not of what the file takes, a tokenizer that does not fit, or a
            tolerance below 0.
        ImportError: `ai-edge-litert` is not installed.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance!r} must be a WER of at least 0, such as 0.01.")
    require_utterances(dataset)
    run, shape, vocab_size = _open(path)
    _check_inputs(dataset, shape)
    if tokenizer is not None and tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"The file gives logits of {vocab_size} tokens; the tokenizer has {tokenizer.vocab_size}. Give the "
            "tokenizer the model was trained with."
        )
    kernels = litert_kernels(model)
    integers = check_integers(path, kernels)
    predict = functools.partial(_keras_logits, model, _frontend(model, frontend) if len(shape) == 2 else None)
    decode = _joined_numbers if tokenizer is None else tokenizer.decode
    texts, logits = [], _LogitsComparison()
    for utterance, labels in _utterances(dataset):
        inputs = _as_the_file_takes_it(utterance, shape)
        pair = predict(inputs), run(inputs)
        if pair[0].shape != pair[1].shape or not np.isfinite(pair[1]).all():
            raise ParityError(
                f"The file gives logits {pair[1].shape}, {np.sum(~np.isfinite(pair[1]))} of them not finite numbers; "
                f"the model gives {pair[0].shape}. It is not an export of this model."
            )
        logits.add(*pair)
        texts.append((decode(labels), *(decode(greedy_decode(part)[0]) for part in pair)))
    references, expected, heard = zip(*texts, strict=True)
    parity = Parity(
        keras=error_rates(references, expected),
        litert=error_rates(references, heard),
        differing=tuple(row for row in texts if row[1] != row[2]),
        frames=logits.frames,
        frames_differing=logits.frames_differing,
        logits_error=logits.relative_error(),
        kernels=sum(kernel.bits is not None for kernel in kernels),
        integers=integers,
    )
    if abs(parity.wer_change) > tolerance:
        raise ParityError(
            f"The WER of the file differs by {100 * parity.wer_change:+.2f} points, more than "
            f"tolerance={tolerance!r} allows.\n{parity}"
        )
    return parity


def require_utterances(dataset):
    """Stop before any work if there is nothing to compare.

    Raises:
        ValueError: a dataset without batches, or one of fill rows only.
    """
    if not any(np.any(dataset[index][2]) for index in range(len(dataset))):
        raise ValueError("The dataset has no utterances, so nothing can be compared. Give some of the test set.")


def _open(path):
    """Return a function from inputs to logits, the shape the file takes, -1 where it is free, and its vocabulary."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0]["shape"]) not in (2, 3):
        raise ValueError(
            f"{path} has {len(inputs)} inputs and {len(outputs)} outputs; verify_litert compares files that turn one "
            "whole recording, audio or features, into logits, as export_litert writes them."
        )
    index = inputs[0]["index"]

    def run(batch):
        if tuple(interpreter.get_input_details()[0]["shape"]) != batch.shape:
            interpreter.resize_tensor_input(index, batch.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(index, batch)
        interpreter.invoke()
        return interpreter.get_tensor(outputs[0]["index"])

    return run, tuple(inputs[0]["shape_signature"].tolist()), int(outputs[0]["shape"][-1])


def _check_inputs(dataset, shape):
    """Stop before any work if the dataset is not what the file takes."""
    found = np.shape(_values_and_lengths(dataset[0][0])[0])
    if len(found) != len(shape) or shape[2:] != found[2:]:
        wanted = "audio [batch, samples]" if len(shape) == 2 else f"features [batch, frames, {shape[2]}]"
        raise ValueError(f"The file takes {wanted}; the dataset has inputs of shape {found}. Give the dataset as such.")


def _values_and_lengths(x):
    if not isinstance(x, dict):
        return np.asarray(x), np.full(len(x), len(x[0]))
    (values,) = (value for name, value in x.items() if name != "lengths")
    return np.asarray(values), x["lengths"]


def _utterances(dataset):
    """Yield every utterance without its padding, and its labels."""
    for index in range(len(dataset)):
        x, labels, sample_weight = dataset[index]
        values, lengths = _values_and_lengths(x)
        for row in np.flatnonzero(sample_weight):
            yield values[row, : int(lengths[row])].astype(np.float32), np.asarray(labels[row])


def _as_the_file_takes_it(utterance, shape):
    batch, length = shape[:2]
    if length != -1:
        missing = max(length - len(utterance), 0)
        utterance = np.pad(utterance[:length], ((0, missing), *((0, 0),) * (utterance.ndim - 1)))
    return np.repeat(utterance[None], max(batch, 1), axis=0)


def _frontend(model, frontend):
    return LogMel(num_mel_bins=num_mel_bins(model)) if frontend is None else frontend


def _keras_logits(model, frontend, inputs):
    return np.asarray(model.predict_on_batch(inputs if frontend is None else frontend(inputs)))


def _joined_numbers(labels):
    return " ".join(str(label) for label in labels if label)


class _LogitsComparison:
    """Sums over all logits seen so far."""

    def __init__(self):
        self.frames = self.frames_differing = 0
        self._sums = np.zeros(4)

    def add(self, expected, logits):
        self.frames += expected[0].shape[0]
        self.frames_differing += int(np.sum(expected[0].argmax(axis=-1) != logits[0].argmax(axis=-1)))
        expected = expected.astype(np.float64)
        difference = logits - expected
        self._sums += expected.size, expected.sum(), np.sum(expected**2), np.sum(difference**2)

    def relative_error(self):
        count, total, square, difference = self._sums
        return float(np.sqrt(difference / max(square - total**2 / count, 1e-30)))
