"""`PackedReader`: an open packed file of which every byte has been checked."""

import dataclasses
import json
import os
import zlib

import numpy as np
from safetensors import safe_open

from keras_usm_lite.packing.array_demand import checksum, demanded
from keras_usm_lite.packing.joined_arrays import JoinedArrays
from keras_usm_lite.packing.named_arrays import NamedArrays
from keras_usm_lite.packing.packed_entry import PackedEntry
from keras_usm_lite.packing.packed_file_error import PackedFileError
from keras_usm_lite.packing.packed_variable import PackedVariable

FORMAT = "keras_usm_lite.packed"  # key of the only text in the file's metadata
VERSION_NAMED, VERSION_JOINED = "2", "3"  # of files whose arrays have names, and of archives
DESCRIPTION = "description"  # name of the array that describes the others
_MAX_DESCRIPTION = 2**23  # bytes of JSON
_MAX_CONTAINERS = 2**18  # lists and dicts in it, each of which takes some hundred bytes as a Python object
_ARRAYS = {VERSION_NAMED: NamedArrays, VERSION_JOINED: JoinedArrays}


class PackedReader:
    """A packed file. Opening it maps it into memory; an array is copied or decoded when it is asked for.

    Opening checks, in this order and with memory for no more than the largest array of a file with named arrays: the
    container, the version,
    the checksum of the description, every field of it, names, types and shapes of all arrays, and their checksums.

    Args:
        path: file written by `save_packed`.

    Attributes:
        model: configuration of the Keras model.
        layers: a `PackedEntry` for each compressed layer, in model order.
        variables: a `PackedVariable` for each other variable, in model order.

    Raises:
        PackedFileError, ValueError, TypeError, KeyError, safetensors.SafetensorError: the file is not sound.
    """

    def __init__(self, path):
        file = safe_open(os.fspath(path), framework="numpy")
        arrays, crc = _read_metadata(file.metadata() or {})
        header = _read_description(file.get_tensor(DESCRIPTION), crc, arrays.PARTS)
        self.model = header["model"]
        self.layers = [PackedEntry(**entry) for entry in header["layers"]]
        self.variables = [PackedVariable(**variable) for variable in header["variables"]]
        names = sorted(set(file.keys()) - {DESCRIPTION})
        self._arrays = arrays(file, names, demanded(self.layers, self.variables), header)

    def layer_arrays(self, entry):
        """Return the arrays of a layer, by their names in `entry.arrays()`."""
        return {key: self._arrays[f"{entry.name}/{key}"] for key in entry.arrays()}

    def variable_arrays(self, variable):
        """Return the arrays of a variable, by their suffixes in `variable.arrays()`."""
        return {suffix: self._arrays[f"{variable.name}{suffix}"] for suffix in variable.arrays()}


def _read_metadata(metadata):
    """Return the class that reads the arrays of this version, and the checksum of the description."""
    if FORMAT not in metadata:
        raise PackedFileError(f"not a packed model: its metadata have no {FORMAT!r}, but {sorted(metadata)[:5]}.")
    version, _, crc = metadata[FORMAT].partition(" ")
    if version not in _ARRAYS:
        raise PackedFileError(
            f"packed format version {version[:20]!r}; this library reads version {' and '.join(_ARRAYS)}. Install the "
            "version of keras_usm_lite that wrote the file."
        )
    return _ARRAYS[version], crc


def _read_description(packed, crc, more_parts):
    """Return the description of a file as a dict."""
    if str(checksum(packed)) != crc:
        raise PackedFileError("the description is damaged (checksum mismatch).")
    stream = zlib.decompressobj()
    text = stream.decompress(packed.tobytes(), _MAX_DESCRIPTION)
    if not stream.eof or stream.unused_data:
        raise PackedFileError(f"the description is not one zlib stream of at most {_MAX_DESCRIPTION} bytes.")
    _check_size(text)
    header = json.loads(text)
    parts = sorted(header) if isinstance(header, dict) else type(header).__name__
    if parts != sorted(["model", "layers", "variables", *more_parts]):
        raise PackedFileError(f"the description has the parts {parts[:9]}.")
    return header


def write_description(model, layers, variables, arrays, more_parts):
    """Add the description of a file to its arrays and return the file's metadata: version and checksum.

    Args:
        model: configuration of the Keras model.
        layers: a `PackedEntry` for each compressed layer.
        variables: a `PackedVariable` for each other variable.
        arrays: all arrays of the container by name.
        more_parts: what `join_arrays` says of an archive; an empty dict for a file whose arrays have names.
    """
    parts = {
        "model": model,
        "layers": [_fields(entry) for entry in layers],
        "variables": [_fields(variable) for variable in variables],
        "crc32": [checksum(arrays[name]) for name in sorted(arrays)],
        **more_parts,
    }
    # In the order of its dicts: the first rule of a CompressedModel that matches wins.
    text = json.dumps(parts, separators=(",", ":")).encode()
    _check_size(text)
    packed = np.frombuffer(zlib.compress(text, 9), np.uint8)
    arrays[DESCRIPTION] = packed
    return {FORMAT: f"{VERSION_JOINED if more_parts else VERSION_NAMED} {checksum(packed)}"}


def _fields(described):
    return {key: value for key, value in dataclasses.asdict(described).items() if value is not None}


def _check_size(text):
    containers = text.count(b"[") + text.count(b"{")
    if len(text) > _MAX_DESCRIPTION or containers > _MAX_CONTAINERS:
        raise ValueError(
            f"the description of the model takes {len(text)} bytes and {containers} brackets; it may take "
            f"{_MAX_DESCRIPTION} and {_MAX_CONTAINERS}."
        )
