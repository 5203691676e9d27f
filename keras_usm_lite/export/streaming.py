"""`export_litert_streaming`: a `.tflite` file that hears a recording chunk by chunk."""

import os

import keras

from keras_usm_lite.export.litert import float_copy, prepare_export, write_litert
from keras_usm_lite.export.verify import verify_gate
from keras_usm_lite.models.streaming_ctc import StreamingCTC


def export_litert_streaming(model, path, frontend=None, chunks=1, verify=None, tokenizer=None):
    """Write a chunk-wise recogniser as a `.tflite` file with a streaming signature.

    One call takes the next 40 ms times `chunk_size` times `chunks` of a recording and the state of the call before, and
    gives logits and the new state; the logits of all calls are those of the whole recording (see `StreamingCTC`). The
    signature "serving_default" has

    * inputs `audio` float32 `[1, samples]` (or `features` float32 `[1, frames, bins]`), `length` int32 `[1]`, the
      number of real samples (or frames), and `state` float32 `[1, size]`, zeros at the start;
    * outputs `logits` float32 `[1, frames, vocabulary]` and `state`.

    Kernels go into the file as `export_litert` describes. `StreamingRecognizer` runs it.

    Args:
        model: `USMForCTC(..., chunk_size=..., causal_conv=True)` or its compressed copy.
        path: file to write, ending in ".tflite".
        frontend: the `LogMel(normalization="running")` (or None) that the model was trained with, for audio in; without
            it the file takes log-mel features.
        chunks: attention chunks per call.
        verify: whole utterances on which `verify_litert`, with its usual tolerance, compares the file, step by step,
            with the model, all at once, before the file gets its name: for audio `SpeechTask.utterances["test"]`. None
            compares the integers only.
        tokenizer: for `verify`: see `verify_litert`.

    Returns:
        `path`.

    Raises:
        RuntimeError: the backend is not TensorFlow.
        ParityError: the file does not hold the trained integers, or its WER on `verify` differs. Nothing is written.
        ValueError: a path without ".tflite", a model that is not chunk-wise, a front end that cannot run on a stream, a
            dataset that is not for this file, or a kernel LiteRT cannot run.

    Source: USM (arXiv 2303.01037), section 3.3 (chunk-wise attention).

    Example:

    >>> import tempfile, keras_usm_lite as usm
    >>> size = {"num_layers": 1, "dim": 16, "num_heads": 2, "subsampling_channels": 4}
    >>> model = usm.USMForCTC(4, quantization="int4", chunk_size=5, causal_conv=True, **size)
    >>> path = export_litert_streaming(model, os.path.join(tempfile.mkdtemp(), "streaming.tflite"))
    >>> usm.StreamingRecognizer(path, usm.CharTokenizer("abc")).step  # frames of 10 ms
    20
    """
    path = os.fspath(path)
    kernels = prepare_export("export_litert_streaming", model, path)
    served = streaming_model(float_copy(model), frontend, chunks)
    signature = served.inputs[:1], [served.output["logits"]]
    return write_litert(served, path, kernels, verify_gate(model, signature, verify, tokenizer, frontend))


def streaming_model(model, frontend=None, chunks=1):
    """Wrap `StreamingCTC` into the functional model that is exported, for one recording at a time.

    Args:
        model: `USMForCTC(..., chunk_size=..., causal_conv=True)` or its copy with other layers.
        frontend: a `LogMel` that can run on a stream, for audio in; None for features in.
        chunks: attention chunks per call.

    Returns:
        A functional model from `{"audio" or "features", "length", "state"}` to `{"logits", "state"}`.

    Raises:
        ValueError: see `StreamingCTC`.

    Example:

    >>> import keras_usm_lite as usm
    >>> model = usm.USMForCTC(9, num_layers=1, chunk_size=25, causal_conv=True)
    >>> [(x.name, x.shape) for x in streaming_model(model, usm.LogMel(normalization="running")).inputs]
    [('audio', (1, 16000)), ('length', (1,)), ('state', (1, 2850))]
    """
    step = StreamingCTC(model, frontend, chunks, name="streaming")
    name = "features" if frontend is None else "audio"
    inputs = {
        name: keras.Input(batch_shape=(1, *step.chunk_shape), name=name),
        "length": keras.Input(batch_shape=(1,), dtype="int32", name="length"),
        "state": keras.Input(batch_shape=(1, step.state_size), name="state"),
    }
    return keras.Model(inputs, step(inputs[name], inputs["length"], inputs["state"]), name="streaming")
