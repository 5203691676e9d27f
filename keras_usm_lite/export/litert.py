"""`export_litert`: a `.tflite` file whose kernels are the integers that were trained."""

import contextlib
import errno
import io
import os
import re
import tempfile
import warnings

import keras

from keras_usm_lite.compression import compressed_layers
from keras_usm_lite.core.nm_mask import nm_violations
from keras_usm_lite.data.manifest import replacing
from keras_usm_lite.export.litert_integers import check_integers, litert_kernels, match_kernels
from keras_usm_lite.export.litert_kernel import litert_layer
from keras_usm_lite.export.litert_weights import read_litert_weights
from keras_usm_lite.export.serving import num_mel_bins, require_tensorflow, serving_model
from keras_usm_lite.export.verify import verify_gate
from keras_usm_lite.models.compressed_model import CompressedModel
from keras_usm_lite.rewrite import GRAPHS, in_float32, rewrite


def export_litert(
    model, path, sample_rate_input=None, batch=1, length=None, frontend=None, verify=None, tokenizer=None
):
    """Write a recogniser as a `.tflite` file that runs its kernels as 2, 4 or 8 bit integers.

    The compressed kernels are baked into plain Dense layers, exported by Keras, and turned back into integers by
    ai-edge-quantizer, which is given the trained scales; the integers in the finished file are read back and compared
    with the trained ones. At run time LiteRT quantizes activations to int8 per token ("dynamic range"), which is the
    only difference to the Keras model.

    LiteRT has dense kernels for 2, 4 and 8 bits, convolutions for 4 and 8, depthwise convolutions for 8, with one scale
    per output channel. Other kernels are stored in the next width that holds their integers, with a warning; embedding
    tables stay float. Dense asymmetric and midrise codes keep their width: what their integers lack is added as a
    rank-1 correction (`OffsetDense`). N:M sparsity changes neither size nor speed of a `.tflite` file; it shows in the
    compressed download and in `save_packed`.

    Args:
        model: `USMForCTC` or its compressed copy; or any other built Keras model, which keeps its own inputs. Those
            of a functional model keep their names; of a subclassed one Keras calls them `args_0`, `args_0_1` and so on,
            those of a dict in the order of its keys.
        path: file to write, ending in ".tflite".
        sample_rate_input: None for log-mel features as input, 16000 for raw audio (front end inside the graph).
        batch: rows per call, None for any number.
        length: frames (or samples) per row, None for any number.
        frontend: the `LogMel` the model was trained with, if it is not the default.
        verify: what `verify_litert`, with its usual tolerance, compares the file and the model on before the file gets
            its name: for audio `SpeechTask.utterances["test"]`, for features `SpeechTask.labelled("test")`. None
            compares the integers only.
        tokenizer: for `verify`: see there.

    Returns:
        `path`.

    Raises:
        RuntimeError: the backend is not TensorFlow.
        ParityError: the file does not hold the trained integers, or its WER on `verify` differs. Nothing is written.
        FileNotFoundError: the folder of the path is not there.
        ValueError: a path without ".tflite", a dataset that is not for this file, or a kernel LiteRT cannot run: one
            with sub-channel scales, or one whose integers, without their zero point, lie outside -127 to 127.

    Example:

    >>> import tempfile, keras_usm_lite as usm
    >>> model = usm.USMForCTC(4, quantization="int4", num_layers=1, dim=16, num_heads=2, subsampling_channels=4)
    >>> path = export_litert(model, os.path.join(tempfile.mkdtemp(), "model.tflite"))
    >>> sorted({weight.bits for weight in read_litert_weights(path)})  # bits per weight, of all matrices in the file
    [4, 32]
    """
    path = os.fspath(path)
    kernels = prepare_export("export_litert", model, path)
    served = float_copy(model)
    if num_mel_bins(served) is not None:
        served = serving_model(served, sample_rate_input, batch, length, frontend)
        served = keras.Model(served.input, {"logits": served.output}, name="serving")  # a dict names the output
    elif sample_rate_input is not None or length is not None:
        raise ValueError(
            f"{type(model).__name__} {model.name!r} does not say how many mel bins it takes, so sample_rate_input and "
            "length mean nothing to it: they are for USMForCTC and its copies. Leave them out."
        )
    signature = (served.inputs, served.outputs) if isinstance(served, GRAPHS) else None
    return write_litert(served, path, kernels, verify_gate(model, signature, verify, tokenizer, frontend))


def prepare_export(what, model, path):
    """Return the `litert_kernels` of a model, or stop before the work; warn of what the file is not going to be.

    Args:
        what: name of the exporting function.
        model: what it exports.
        path: the file it is going to write.

    Raises:
        RuntimeError, FileNotFoundError, ValueError: see `export_litert`.
    """
    require_tensorflow(what)
    if not path.endswith(".tflite"):
        raise ValueError(f"path={path!r} must end in '.tflite'.")
    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "There is no such folder to write to; make it first", folder)
    kernels = litert_kernels(model)
    for message in sorted({kernel.widened for kernel in kernels if kernel.widened}):
        warnings.warn(f"{path}: stores {message}, the next width LiteRT can run.", stacklevel=3)
    sparse = [layer for layer in compressed_layers(model) if layer.sparsity is not None]
    unmade = [layer for layer in sparse if int(nm_violations(layer.mask, layer.sparsity.n, layer.sparsity.m))]
    if unmade:
        warnings.warn(
            f"{path}: {len(unmade)} of {len(sparse)} sparse layers do not obey their pattern yet, {unmade[0].path!r} "
            f"for one is not {unmade[0].sparsity}. Train with callbacks.NMPruning, or call usm.update_masks(model).",
            stacklevel=3,
        )
    return kernels


def float_copy(model):
    """Return the copy that is converted: float32 layers whose kernels are trained integers times scales."""
    copy = rewrite(in_float32(model), litert_layer)
    return copy.model if isinstance(copy, CompressedModel) else copy


def write_litert(served, path, kernels, gate=None):
    """Convert a functional model made of `float_copy` layers, put the integers in, check them, and write the file.

    Args:
        served: functional model with float layers.
        path: file to write.
        kernels: `litert_kernels` of the compressed model.
        gate: None, or a function that is given the path of the finished file and raises if it must not be kept.

    Returns:
        `path`.

    Raises:
        ParityError: the file does not hold the trained integers.
    """
    content = _convert(served, kernels)
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(content)
        check_integers(temporary, kernels)
        if gate is not None:
            gate(temporary)
    return path


def _convert(served, kernels):
    """Return the content of the file."""
    with tempfile.TemporaryDirectory() as folder:
        float_path = os.path.join(folder, "float.tflite")
        served.export(float_path, format="litert", verbose=False, input_signature=_signature(served))
        return _recover_integers(float_path, kernels)


def _signature(served):
    import tensorflow as tf

    if not isinstance(served, GRAPHS) or len(served.inputs) > 1:
        return None  # Keras makes one of the model's own structure of inputs
    return [tf.TensorSpec(tensor.shape, tensor.dtype, name=tensor.name) for tensor in served.inputs]


def _recover_integers(float_path, kernels):
    """Return the content of the quantized file; ai-edge-quantizer rounds the weights to the trained integers."""
    quantized = [kernel for kernel in kernels if kernel.bits is not None]
    if not quantized:
        with open(float_path, "rb") as file:
            return file.read()
    from ai_edge_quantizer import qtyping, quantizer

    converter = quantizer.Quantizer(float_path)
    ranges = {}
    for weight, kernel, factor in match_kernels(read_litert_weights(float_path), quantized):
        converter.add_dynamic_config(
            regex="^" + re.escape(weight.name) + ";",
            operation_name=qtyping.TFLOperationName[weight.operation],
            num_bits=kernel.bits,
        )
        ranges[weight.tensor] = kernel.integer_range(weight.shape, factor)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = converter.quantize(ranges, enable_progress_report=False, enable_progress_bar=False)
    return bytes(result.quantized_model)
