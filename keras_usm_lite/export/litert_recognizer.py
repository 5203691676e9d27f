"""`LiteRTRecognizer`: run an exported recogniser as a phone would."""

import time

import numpy as np

from keras_usm_lite.decoding import greedy_decode


class LiteRTRecognizer:
    """A `.tflite` recogniser with a dynamic length: audio (or features) in, text out.

    Args:
        path: file written by `export_litert`.
        tokenizer: turns label ids into text.
        num_threads: threads of the interpreter.

    Raises:
        ImportError: `ai-edge-litert` is not installed.

    Example:

    >>> import os, tempfile, keras_usm_lite as usm
    >>> model = usm.USMForCTC(3, num_layers=1, dim=16, num_heads=2, subsampling_channels=4)
    >>> path = usm.export_litert(model, os.path.join(tempfile.mkdtemp(), "model.tflite"), sample_rate_input=16000)
    >>> recognizer = LiteRTRecognizer(path, usm.WordTokenizer(["no", "yes"]))
    >>> recognizer.logits(np.zeros(16000)).shape
    (1, 25, 3)
    >>> text, seconds = recognizer.transcribe(np.zeros(16000))
    """

    def __init__(self, path, tokenizer, num_threads=1):
        from ai_edge_litert.interpreter import Interpreter

        self.tokenizer = tokenizer
        self.interpreter = Interpreter(str(path), num_threads=num_threads)
        details = self.interpreter.get_input_details()[0]
        self._input, self._rank = details["index"], len(details["shape"]) - 1
        self._output = self.interpreter.get_output_details()[0]["index"]
        self._shape = None

    def logits(self, inputs):
        """Return the logits `[1, frames, vocabulary]` of one utterance, `[samples]` or `[frames, bins]`.

        Raises:
            ValueError: inputs of another shape, or fewer than make a frame.
        """
        batch = np.asarray(inputs, np.float32)[None]
        if batch.ndim != self._rank + 1:
            expected = "samples [n], one channel" if self._rank == 1 else "features [frames, bins]"
            raise ValueError(f"The file takes {expected}; got an array of shape {batch.shape[1:]}.")
        try:
            if batch.shape != self._shape:
                self.interpreter.resize_tensor_input(self._input, batch.shape)
                self.interpreter.allocate_tensors()
                self._shape = batch.shape
            self.interpreter.set_tensor(self._input, batch)
            self.interpreter.invoke()
        except RuntimeError as error:
            self._shape = None  # whatever it was resized to, the next utterance begins anew
            raise ValueError(
                f"The file cannot run on an array of shape {batch.shape[1:]} ({error}). An utterance must fill one "
                "frame: 512 samples with the default front end."
            ) from error
        return self.interpreter.get_tensor(self._output)

    def transcribe(self, inputs):
        """Return `(text, seconds)` of one utterance; the time includes the front end where the file holds it."""
        start = time.perf_counter()
        logits = self.logits(inputs)
        seconds = time.perf_counter() - start
        return self.tokenizer.decode(greedy_decode(logits)[0]), seconds
