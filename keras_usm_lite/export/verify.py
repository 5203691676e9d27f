"""`verify_litert`: the gate that an exported recogniser passes only if it hears what the Keras model hears."""

import dataclasses
import functools

import numpy as np

from keras_usm_lite.decoding import greedy_decode
from keras_usm_lite.error_rates import ErrorRates, error_rates
from keras_usm_lite.export.litert_integers import check_integers, litert_kernels
from keras_usm_lite.export.parity_error import ParityError
from keras_usm_lite.export.serving import num_mel_bins
from keras_usm_lite.export.streaming_recognizer import StreamingRecognizer, is_streaming
from keras_usm_lite.export.verify_data import check_dataset, decoder, utterances
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
    else cut or padded with zeros to its fixed length. A streaming file hears it step by step, and is held against what
    the model makes of the whole. Some difference of the logits is normal, for LiteRT quantizes activations to int8; it
    is reported, not judged.

    Args:
        model: the model that was exported, log-mel features in.
        path: the file that `export_litert` or `export_litert_streaming` wrote.
        dataset: for a file that takes audio, the utterances of a manifest: `SpeechTask.utterances["test"]`, or what
            `data.read_manifest` returns. For one that takes features, `SpeechTask.labelled("test")`. For either,
            `len(dataset)` batches `dataset[i] = (x, y, sample_weight)`: `x` features `[B, frames, bins]` or audio
            `[B, samples]`, or `{"features" or "audio": ..., "lengths": int [B]}` where rows are padded; `y` labels
            `int [B, L]`, padded with 0; `sample_weight` `[B]`, 0 for rows that only fill up.
        tokenizer: turns labels into text with `decode(ids)`; with None, for batches only, every label counts as a word.
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

    Example:

    >>> import os, tempfile, keras_usm_lite as usm
    >>> model = usm.USMForCTC(4, quantization="int4", num_layers=1, dim=16, num_heads=2, subsampling_channels=4)
    >>> path = usm.export_litert(model, os.path.join(tempfile.mkdtemp(), "model.tflite"), sample_rate_input=16000)
    >>> audio = 0.1 * np.random.default_rng(0).normal(size=(1, 16000))
    >>> dataset = [(audio, np.array([[1, 2, 3]]), np.ones(1))]
    >>> parity = verify_litert(model, path, dataset, tolerance=np.inf)  # an untrained model's words mean nothing
    >>> parity.frames, parity.kernels, parity.logits_error < 0.05
    (25, 11, True)
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance!r} must be a WER of at least 0, such as 0.01.")
    run, shape, vocab_size = _open(path)
    frontend = _frontend(model, frontend, shape)
    check_dataset(dataset, tokenizer, shape, vocab_size)
    kernels = litert_kernels(model)
    integers = check_integers(path, kernels)
    texts, logits, decode = [], _LogitsComparison(), decoder(tokenizer)
    for utterance, said in utterances(dataset, tokenizer, frontend):
        inputs = _as_the_file_takes_it(utterance, shape)
        pair = _keras_logits(model, frontend, inputs), run(inputs)
        if pair[0].shape != pair[1].shape or not np.isfinite(pair[1]).all():
            raise ParityError(
                f"The file gives logits {pair[1].shape}, {np.sum(~np.isfinite(pair[1]))} of them not finite numbers; "
                f"the model gives {pair[0].shape}. It is not an export of this model."
            )
        logits.add(*pair)
        texts.append((said, *(decode(greedy_decode(part)[0]) for part in pair)))
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


def verify_gate(model, signature, dataset, tokenizer, frontend):
    """Return `verify_litert` waiting for the path of a file, or None without a dataset; stop now if it does not fit.

    Args:
        model, dataset, tokenizer, frontend: as `verify_litert` takes them.
        signature: inputs and outputs, as Keras tensors, of what is going to be the file: two lists. None if they are
            not known before the file exists, and so not checked.

    Raises:
        ValueError: see `verify_litert`.
    """
    if dataset is None:
        return None
    if signature is not None:
        shape, vocab_size = _check_signature("The file", *([tensor.shape for tensor in side] for side in signature))
        check_dataset(dataset, tokenizer, shape, vocab_size)
    return functools.partial(verify_litert, model, dataset=dataset, tokenizer=tokenizer, frontend=frontend)


def _open(path):
    """Return a function from inputs to logits, the shape the file takes, -1 where it is free, and its vocabulary."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    if is_streaming(interpreter):
        recognizer = StreamingRecognizer(path, tokenizer=None)
        return lambda batch: recognizer.logits(batch[0]), (1, -1, *recognizer.item_shape), recognizer.vocab_size
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    shapes = ([tuple(detail["shape_signature"].tolist()) for detail in side] for side in (inputs, outputs))
    shape, vocab_size = _check_signature(path, *shapes)
    index = inputs[0]["index"]

    def run(batch):
        if tuple(interpreter.get_input_details()[0]["shape"]) != batch.shape:
            interpreter.resize_tensor_input(index, batch.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(index, batch)
        interpreter.invoke()
        return interpreter.get_tensor(outputs[0]["index"])

    return run, shape, vocab_size


def _check_signature(file, inputs, outputs):
    """Return the shape of the one input and the classes of the one output, from the shapes of all."""
    if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0]) not in (2, 3):
        raise ValueError(
            f"{file} has {len(inputs)} inputs and {len(outputs)} outputs; verify_litert compares files that turn one "
            "recording, audio or features, into logits, as export_litert and export_litert_streaming write them."
        )
    return inputs[0], outputs[0][-1]


def _as_the_file_takes_it(utterance, shape):
    batch, length = shape[:2]
    if length != -1:
        missing = max(length - len(utterance), 0)
        utterance = np.pad(utterance[:length], ((0, missing), *((0, 0),) * (utterance.ndim - 1)))
    return np.repeat(utterance[None], max(batch, 1), axis=0)


def _frontend(model, frontend, shape):
    """Return the `LogMel` behind a file that takes audio; None for one that takes features."""
    if len(shape) == 3:
        return None
    return LogMel(num_mel_bins=num_mel_bins(model)) if frontend is None else frontend


def _keras_logits(model, frontend, inputs):
    return np.asarray(model.predict_on_batch(inputs if frontend is None else frontend(inputs)))


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
