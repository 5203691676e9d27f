"""`StreamingRecognizer`: run a streaming `.tflite` file as a phone would, on audio as it arrives."""

import numpy as np

from keras_usm_lite.models.usm_for_ctc import IMPOSSIBLE

FRAMES_PER_SECOND = 25  # output frames of 40 ms


class StreamingRecognizer:
    """A `.tflite` recogniser with a streaming signature: pieces of audio (or features) of any length in, text out.

    ```
    text = recognizer.feed(piece)  # as often as there is something new
    text = recognizer.finish()  # hears the rest and is ready for the next recording
    ```

    Pieces are collected until they fill a step of the file; `finish` fills the last step with zeros. Texts are greedy
    readings of all frames so far: `B(argmax_k logits[t])`, where `B` merges repeats, also across the border of two
    steps, and drops blanks. The text of `finish` is that of the whole recording.

    Args:
        path: file written by `export_litert_streaming`.
        tokenizer: turns label ids into text.
        num_threads: threads of the interpreter.

    Attributes:
        step: samples (or frames) of one step.
        sample_rate: samples per second; None for a file that takes features.
        item_shape: shape of one sample, `()`, or of one frame, `(bins,)`.
        vocab_size: classes of the logits, the blank included.

    Raises:
        ImportError: `ai-edge-litert` is not installed.
        ValueError: the file has no streaming signature.

    Source: A. Graves et al., "Connectionist Temporal Classification", ICML 2006, section 3.2 (best path decoding).

    Example:

    >>> import os, tempfile, keras_usm_lite as usm
    >>> size = {"num_layers": 1, "dim": 16, "num_heads": 2, "subsampling_channels": 4}
    >>> model = usm.USMForCTC(3, chunk_size=5, causal_conv=True, **size)
    >>> path = os.path.join(tempfile.mkdtemp(), "streaming.tflite")
    >>> path = usm.export_litert_streaming(model, path, usm.LogMel(normalization="running"))
    >>> recognizer = StreamingRecognizer(path, usm.WordTokenizer(["no", "yes"]))
    >>> recognizer.step, recognizer.sample_rate  # 5 output frames of 40 ms
    (3200, 16000)
    >>> early = recognizer.feed(np.zeros(5000))
    >>> recognizer.finish().startswith(early)
    True
    """

    def __init__(self, path, tokenizer, num_threads=1):
        from ai_edge_litert.interpreter import Interpreter

        self.tokenizer = tokenizer
        interpreter = Interpreter(str(path), num_threads=num_threads)
        if not is_streaming(interpreter):
            raise ValueError(
                f"{path} has no streaming signature (audio or features, length, state -> logits, state); write one "
                "with export_litert_streaming, or run this one with LiteRTRecognizer."
            )
        self._run = interpreter.get_signature_runner()
        inputs, outputs = self._run.get_input_details(), self._run.get_output_details()
        self._state_shape = tuple(inputs["state"]["shape"])
        self._input = "audio" if "audio" in inputs else "features"
        self.step = int(inputs[self._input]["shape"][1])
        frames, self.vocab_size = (int(size) for size in outputs["logits"]["shape"][1:])
        self.sample_rate = self.step * FRAMES_PER_SECOND // frames if self._input == "audio" else None
        self.item_shape = tuple(inputs[self._input]["shape"][2:])
        self.reset()

    def reset(self):
        """Forget everything: the next piece starts a recording."""
        self._state = np.zeros(self._state_shape, np.float32)
        self._waiting = np.zeros((0, *self.item_shape), np.float32)
        self._labels, self._last = [], 0

    def feed(self, piece):
        """Hear the next piece of a recording.

        Args:
            piece: samples `[n]` in [-1, 1], or features `[n, bins]`; any `n`.

        Returns:
            The text of all full steps so far.

        Raises:
            ValueError: a piece of another shape.
        """
        piece = np.asarray(piece, np.float32)
        if piece.ndim == 0 or piece.shape[1:] != self.item_shape:
            expected = ", ".join(["n", *map(str, self.item_shape)])
            raise ValueError(f"The file takes {self._input} [{expected}], got shape {piece.shape}.")
        self._waiting = np.concatenate([self._waiting, piece])
        while len(self._waiting) >= self.step:
            self._hear(self._waiting[: self.step])
            self._waiting = self._waiting[self.step :]
        return self.text

    def finish(self):
        """Hear what does not fill a step, return the text of the recording, and start anew."""
        if len(self._waiting):
            self._hear(self._waiting)
        text = self.text
        self.reset()
        return text

    @property
    def text(self):
        """The text so far."""
        return self.tokenizer.decode(self._labels)

    def logits(self, inputs):
        """Hear a whole recording, step by step; what was fed before is forgotten.

        Args:
            inputs: samples `[n]` in [-1, 1], or features `[n, bins]`.

        Returns:
            The logits `[1, frames, vocabulary]` without the certain blanks that follow the recording.
        """
        self.reset()
        begins = range(0, max(len(inputs), 1), self.step)  # one step of silence has the shape of no frames
        steps = [self._step(inputs[begin : begin + self.step]) for begin in begins]
        self.reset()
        logits = np.concatenate(steps, axis=1)
        real = logits[0, :, 1:].max(axis=-1) > IMPOSSIBLE
        return logits[:, : np.flatnonzero(real).max(initial=-1) + 1]

    def _hear(self, chunk):
        best = self._step(chunk)[0].argmax(axis=-1)
        changed = np.diff(best, prepend=self._last) != 0
        self._labels += best[changed & (best != 0)].tolist()
        self._last = best[-1]

    def _step(self, chunk):
        """Return the logits of a step that the chunk begins, and remember the state after it."""
        padded = np.zeros((1, self.step, *self.item_shape), np.float32)
        padded[0, : len(chunk)] = chunk
        outputs = self._run(**{self._input: padded, "length": np.array([len(chunk)], np.int32), "state": self._state})
        self._state = outputs["state"]
        return outputs["logits"]


def is_streaming(interpreter):
    """True for a LiteRT interpreter whose file has the streaming signature."""
    signatures = interpreter.get_signature_list().values()
    return any({"length", "state"} < set(signature["inputs"]) for signature in signatures)
