"""`save_packed` and `load_packed`: a whole model in one small self-describing file."""

import contextlib
import dataclasses
import itertools
import os
import tempfile

import numpy as np
from keras import ops

from keras_usm_lite.compression import compressed_layers
from keras_usm_lite.data.manifest import replacing
from keras_usm_lite.packing.array_demand import demanded
from keras_usm_lite.packing.joined_arrays import JOINED, join_arrays
from keras_usm_lite.packing.model_description import describe_model, rebuild_model
from keras_usm_lite.packing.packed_file_error import PackedFileError
from keras_usm_lite.packing.packed_layer import PACKED_VARIABLES, describe, pack_layer, unpack_layer
from keras_usm_lite.packing.packed_reader import DESCRIPTION, PackedReader, write_description
from keras_usm_lite.packing.packed_variable import PackedVariable
from keras_usm_lite.packing.precision import OTHERS, SCALES, reduce, restore
from keras_usm_lite.rewrite import finish_normalization, layer_path, walk_layers

MASKS = ("enumerative", "positions")
# A model may create so many times the weights of its file while it is rebuilt: a CompressedModel builds its template
# first, which may be a CompressedModel itself (compressed twice: 5 times, thrice: 10). The constants are for random
# states and counters, which are not stored.
_REBUILD, _SPARE_VARIABLES, _SPARE_ELEMENTS = 12, 1000, 10_000
_MAX_PART = 1000  # characters that are shown of the beginning, and of the end, of a long error


def save_packed(model, path, archive=False, masks="enumerative", scales="float32", others="float32", vectors=None):
    """Write a model as one file: integer codes, N:M patterns and scales instead of float kernels.

    The container is safetensors; one of its arrays holds the model's Keras configuration and a description of the rest
    (`docs/packed_format.md`). By default `load_packed` gives bit-identical effective kernels and logits. The same model
    gives the same bytes. The file is written to a temporary name and renamed. Beside the model this takes the memory of
    the file and of one float32 kernel; an archive up to four times the memory of what has no codes more.

    Args:
        model: a built Keras model with compressed layers.
        path: file to write.
        archive: entropy-coded, for downloads: the codes and the mask of each layer, and all other numbers byte by byte,
            with a range coder or Zstandard, whichever is smaller, a little above their zeroth-order entropy; in one
            array instead of many. Reloads as exactly, but takes longer.
        masks: "enumerative" (near log2 C(M, N) bits per group) or "positions" (ceil(log2 M) bits per kept weight, the
            paper's accounting and NVIDIA's metadata).
        scales: "float32" (exact), "float16" or "bfloat16". Every weight of a layer moves by at most a factor
            1 +- 2^-11 (float16) or 1 +- 2^-8 (bfloat16); a scale that the type cannot hold so well is refused.
        others: float32 arrays that have no codes: embeddings, convolutions, biases, norms, kernels that are sparse
            only. "float32" (exact); "float16", `|error| <= max(2^-11 |w|, 2^-25)`; "int8" with a float32 scale for
            each index of the first axis (of each output channel for a sparse kernel), `|error| <= max|w| / 254` with
            the maximum over that row, while vectors and scalars are float16.
        vectors: the trainable ones among the float32 vectors: biases, and gains and offsets of norms. "float32" or
            "float16" as above; "int8" with one float32 scale for each vector, `|error| <= max|w| / 254`. None: as
            `others` says. Moving statistics are not trainable, and always are as `others` says.

    Returns:
        `path`.

    Raises:
        ValueError: a model that is not built, a layer with a vocabulary that it learned by `adapt`, a mask that is not
            made yet, a schedule that has not finished, an unknown choice, or a number that does not fit the chosen
            precision.
        ImportError: `archive=True` without `constriction` and `zstandard`.

    Example:

    >>> import os, tempfile, keras, keras_usm_lite as usm
    >>> model = keras.Sequential([keras.Input((64,)), usm.QuantDense(64, "int4", sparsity="2:4")])
    >>> _ = usm.update_masks(model)
    >>> path = os.path.join(tempfile.mkdtemp(), "model.usm")
    >>> usm.load_packed(usm.save_packed(model, path)).count_params() == model.count_params()
    True
    """
    _check_choices(masks=(masks, MASKS), scales=(scales, tuple(SCALES)), others=(others, OTHERS))
    _check_choices(vectors=(vectors, (None, *OTHERS)))
    if archive and masks == "positions":
        raise ValueError("archive=True codes the patterns of the masks; masks='positions' is for files without it.")
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built, so it has no weights yet. Call it on a batch, or build() it."
        )
    _refuse_assets(model)
    entries, variables, tensors, packed = [], [], {}, set()
    for layer in compressed_layers(model):
        entry, arrays = pack_layer(layer, layer_path(layer), archive=archive, masks=masks, scales=scales, others=others)
        entry = _named(entry, len(entries)) if archive else entry
        entries.append(_add(entry, {f"/{key}": array for key, array in arrays.items()}, tensors))
        packed |= _packed_variables(layer)
    for variable in model.weights:
        if id(variable) not in packed:
            described, arrays = _pack_variable(variable, others, vectors if variable.trainable else None)
            described = _named(described, len(entries) + len(variables)) if archive else described
            variables.append(_add(described, arrays, tensors))
    more_parts = {}
    if archive:
        joined, more_parts = join_arrays(tensors, demanded(entries, variables))
        tensors = {JOINED: joined}
    metadata = write_description(describe_model(model), entries, variables, tensors, more_parts)
    _write(path, tensors, metadata)
    return path


def load_packed(path, custom_objects=None):
    """Rebuild the model of a packed file, an archive or not.

    The effective kernels and the logits are bit-identical to those of the saved model unless `save_packed` was told to
    round. Scales are frozen at their stored values. For training on, keep the `.keras` file instead: the latent float
    kernels are not in a packed file.

    The file is mapped and read layer by layer; what has no codes in an archive is read at once, and takes its memory
    twice. The file is trusted in nothing: every type, shape and checksum is verified, and the model is built without
    weights to count them, before its weights take memory. The cap is 12 times what the file describes. (Usually it is
    once; a `CompressedModel` builds its original first, which may be one itself.)

    Args:
        path: file written by `save_packed`.
        custom_objects: classes of your own that the model contains, as in `keras.models.load_model`.

    Returns:
        The model, not compiled.

    Raises:
        PackedFileError: the file is truncated, damaged, not a packed file, newer than this library, or inconsistent.
        FileNotFoundError: there is no such file.
        ImportError: it is an archive, and `constriction` or `zstandard` is not installed.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no packed file {os.fspath(path)!r}.")
    with _blaming(path):
        file = PackedReader(path)
        model = _rebuild(file, custom_objects)
        _fill(model, file)
    return model


def _check_choices(**choices):
    for name, (choice, allowed) in choices.items():
        if choice not in allowed:
            raise ValueError(f"{name}={choice!r} is not supported; choose one of {', '.join(map(repr, allowed))}.")


def _pack_variable(variable, others, vectors):
    array = np.ascontiguousarray(ops.convert_to_numpy(variable)).reshape(tuple(variable.shape))
    try:
        arrays = reduce(array, others, vectors)
    except ValueError as error:
        raise ValueError(f"Variable {variable.path!r}: {error}") from error
    return PackedVariable(variable.path, array.shape, array.dtype.name, arrays[""].dtype.name), arrays


def _named(described, number):
    """Names are labels; in an archive, whose bytes count, numbers do."""
    return dataclasses.replace(described, name=str(number))


def _add(described, arrays, tensors):
    """Add arrays to `tensors` under names that are still free and return the description with its name."""
    for number in itertools.count(1):
        name = described.name if number == 1 else f"{described.name}#{number}"
        named = {f"{name}{suffix}": array for suffix, array in arrays.items()}
        if not named.keys() & {*tensors, DESCRIPTION}:
            tensors.update(named)
            return dataclasses.replace(described, name=name)


def _write(path, tensors, metadata):
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with replacing(os.fspath(path)) as temporary:
        try:
            with open(temporary, "wb"):
                mode = os.stat(temporary).st_mode  # of any new file; safetensors makes one for its owner's eyes only
            save_file(tensors, temporary, metadata=metadata)
            os.chmod(temporary, mode)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path}: cannot be written ({error}); free space or choose a writable folder.") from error


@contextlib.contextmanager
def _blaming(path):
    """Turn whatever goes wrong with the content of a file into a `PackedFileError` that names the file."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except SafetensorError as error:
        raise PackedFileError(f"{path}: not a readable safetensors file ({error}). It may be truncated.") from error
    except PackedFileError as error:
        raise PackedFileError(f"{path}: {_shortened(error)}") from error
    except ValueError as error:
        raise PackedFileError(f"{path}: does not fit its own description: {_shortened(error)}") from error
    except Exception as error:  # a description of the wrong form can fail anywhere
        raise PackedFileError(f"{path}: does not fit its own description ({_shortened(repr(error))}).") from error


def _shortened(message):
    """A name or value in a message may be as long as the file's description; Keras gives the reason at the end."""
    message = str(message)
    return message if len(message) <= 2 * _MAX_PART else f"{message[:_MAX_PART]} ... {message[-_MAX_PART:]}"


def _rebuild(file, custom_objects):
    """Return the model with arbitrary weights, if it has not many more than the file describes."""
    described = [*file.layers, *file.variables]
    elements = sum(part.elements for part in described)
    # A compressed layer has all of these variables at most.
    count = len(PACKED_VARIABLES) * len(file.layers) + len(file.variables)
    budget = _REBUILD * count + _SPARE_VARIABLES, _REBUILD * elements + _SPARE_ELEMENTS
    return rebuild_model(file.model, *budget, custom_objects)


def _fill(model, file):
    """Put every array where it belongs: layers and variables in the order of the model.

    Nothing is read before all that is described is what the model has.
    """
    layers = compressed_layers(model)
    _check_layers(layers, file)
    packed = set().union(*map(_packed_variables, layers))
    variables = [variable for variable in model.weights if id(variable) not in packed]
    _check_variables(variables, file)
    for layer, entry in zip(layers, file.layers, strict=True):
        try:
            unpack_layer(layer, entry, file.layer_arrays(entry))
        except ValueError as error:
            raise PackedFileError(f"layer {entry.name!r}: {error}") from error
    for variable, described in zip(variables, file.variables, strict=True):
        variable.assign(restore(file.variable_arrays(described), described.dtype))
    finish_normalization(model)


def _check_layers(layers, file):
    if len(layers) != len(file.layers):
        raise PackedFileError(f"describes {len(file.layers)} compressed layers, but its model has {len(layers)}.")
    for layer, entry in zip(layers, file.layers, strict=True):
        for key, value in describe(layer).items():
            if getattr(entry, key) != value:
                raise PackedFileError(
                    f"layer {entry.name!r} has {key}={getattr(entry, key)!r}, but its model has {value!r}."
                )


def _check_variables(variables, file):
    if len(variables) != len(file.variables):
        raise PackedFileError(f"describes {len(file.variables)} other variables, but its model has {len(variables)}.")
    for variable, described in zip(variables, file.variables, strict=True):
        if (tuple(variable.shape), variable.dtype) != (described.shape, described.dtype):
            raise PackedFileError(
                f"variable {described.name!r} is {described.dtype} {described.shape}, but its model has "
                f"{variable.dtype} {tuple(variable.shape)}."
            )


def _refuse_assets(model):
    """Raise for a layer that keeps files beside its weights, for which a packed file has no place."""
    for layer in walk_layers(model):
        if hasattr(layer, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                layer.save_assets(folder)
                if names := os.listdir(folder):
                    raise ValueError(
                        f"Layer {layer_path(layer)!r} of class {type(layer).__name__} keeps {', '.join(names)} beside "
                        "its weights, for which a packed file has no place. Make it with what it learned, for example "
                        "vocabulary=layer.get_vocabulary(), or leave it out of the model."
                    )


def _packed_variables(layer):
    return {id(getattr(layer, key)) for key in PACKED_VARIABLES if hasattr(layer, key)}
