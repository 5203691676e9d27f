"""`export_onnx`: a float ONNX file of a recogniser, written by Keras' own exporter."""

import importlib.util
import os

import keras
from keras import ops

from keras_usm_lite.data.manifest import replacing
from keras_usm_lite.export.bake import bake
from keras_usm_lite.export.serving import num_mel_bins, serving_model
from keras_usm_lite.layers.log_mel import FLOOR, LogMel
from keras_usm_lite.rewrite import in_float32

CONVERTERS = {"tensorflow": "tf2onnx", "torch": "onnxscript"}


def export_onnx(model, path, sample_rate_input=None, batch=1, length=None, frontend=None):
    """Write a recogniser as an ONNX file with float32 kernels that lie on the trained grid.

    One input, `features` `[batch, frames, bins]` or `audio` `[batch, samples]`, and one output, the logits. The values
    are those the compressed model multiplies by; the file is as large as the float model. Tools that know ONNX can
    make integers of them again.

    Keras converts through tf2onnx on the TensorFlow backend, where batch or length may be free, and through PyTorch's
    exporter on the PyTorch backend, where both must be fixed: `pip install onnx tf2onnx onnxscript`.

    Args:
        model: `USMForCTC` or its compressed copy.
        path: file to write, ending in ".onnx".
        sample_rate_input: None for log-mel features as input, 16000 for raw audio (front end inside the graph).
        batch: rows per call, None for any number.
        length: frames (or samples) per row, None for any number.
        frontend: the `LogMel` the model was trained with, if it is not the default.

    Returns:
        `path`.

    Raises:
        RuntimeError: the backend is neither TensorFlow nor PyTorch.
        ImportError: the converter is not installed.
        ValueError: a path without ".onnx", or free sizes that the converter cannot express.

    Example:

    >>> import numpy as np, onnxruntime, tempfile, keras_usm_lite as usm
    >>> model = usm.USMForCTC(4, quantization="int4", num_layers=1, dim=16, num_heads=2, subsampling_channels=4)
    >>> path = export_onnx(model, os.path.join(tempfile.mkdtemp(), "model.onnx"), length=40)
    >>> (logits,) = onnxruntime.InferenceSession(path).run(None, {"features": np.zeros((1, 40, 80), "float32")})
    >>> logits.shape
    (1, 10, 4)
    """
    path = os.fspath(path)
    if not path.endswith(".onnx"):
        raise ValueError(f"path={path!r} must end in '.onnx'.")
    _check_converter()
    _check_sizes(batch, length)
    frontend = frontend if frontend is not None else LogMel(num_mel_bins=num_mel_bins(model) or 80)
    served = serving_model(
        bake(in_float32(model)), sample_rate_input, batch, length, _ConvolutionLogMel.from_config(frontend.get_config())
    )
    (tensor,) = served.inputs
    signature = [keras.InputSpec(shape=tensor.shape, dtype="float32", name=tensor.name)]
    with replacing(path) as temporary:
        served.export(temporary, format="onnx", verbose=False, input_signature=signature)
    return path


class _ConvolutionLogMel(LogMel):
    """`LogMel` without a Fourier transform, which converters do not know: a convolution with its sines and cosines."""

    def __init__(self, **config):
        super().__init__(**config)
        # The transform is linear, so what it makes of the unit impulses are the filters.
        impulses = ops.eye(self.fft_length, dtype="float32")
        transformed = ops.stft(impulses, self.window, self.stride, self.fft_length, window="hann", center=False)
        self.filters = [ops.convert_to_numpy(part) for part in transformed]  # [samples, 1, frequencies]

    def _log_mel(self, audio):
        audio = ops.expand_dims(ops.cast(audio, "float32"), -1)
        real, imaginary = (ops.conv(audio, filters, self.stride) for filters in self.filters)
        return ops.log(ops.matmul(ops.square(real) + ops.square(imaginary), self.mel_matrix) + FLOOR)


def _check_converter():
    backend = keras.backend.backend()
    if backend not in CONVERTERS:
        raise RuntimeError(
            f"export_onnx needs the TensorFlow or the PyTorch backend; the active one is {backend!r}. Save the model "
            "with model.save('model.keras') or usm.save_packed, and export it in a process started with "
            "KERAS_BACKEND=tensorflow."
        )
    if importlib.util.find_spec(CONVERTERS[backend]) is None:
        raise ImportError(
            f"export_onnx on the {backend} backend needs {CONVERTERS[backend]}: pip install onnx {CONVERTERS[backend]}."
        )


def _check_sizes(batch, length):
    if keras.backend.backend() == "torch" and None in (batch, length):
        raise ValueError(
            f"batch={batch!r}, length={length!r}: PyTorch's exporter needs both fixed, such as batch=1, length=16000. "
            "For a free size export in a process started with KERAS_BACKEND=tensorflow."
        )
    if batch is None and length is None:
        raise ValueError(
            "batch=None, length=None: tf2onnx writes a file that does not run when both are free. Fix one of them; "
            "batch=1 serves one utterance of any length at a time."
        )
