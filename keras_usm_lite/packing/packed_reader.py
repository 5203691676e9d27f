"""`PackedReader`: an open packed file of which every byte has been checked."""

import json
import os
import zlib

import numpy as np
from safetensors import safe_open

from keras_usm_lite.packing.entropy import EXPANSION
from keras_usm_lite.packing.packed_entry import PackedEntry
from keras_usm_lite.packing.packed_file_error import PackedFileError
from keras_usm_lite.packing.packed_variable import TYPES, PackedVariable

FORMAT = "keras_usm_lite.packed"  # key of the only text in the file's metadata
VERSION = 2
DESCRIPTION = "description"  # name of the array that describes the others
_MAX_DESCRIPTION = 2**23  # bytes of JSON
_MAX_CONTAINERS = 2**18  # lists and dicts in it, each of which takes some hundred bytes as a Python object


def checksum(array):
    """Return the CRC-32 of an array's bytes in row-major order."""
    return zlib.crc32(array.tobytes())


class PackedReader:
    """A packed file. Opening it maps it into memory; an array is copied out of it when it is asked for.

    Opening checks, in this order and before anything of the size of the model is allocated: the container, the version,
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
        self._file = safe_open(os.fspath(path), framework="numpy")
        header = self._read_header(self._file.metadata() or {})
        self.model = header["model"]
        self.layers = [PackedEntry(**entry) for entry in header["layers"]]
        self.variables = [PackedVariable(**variable) for variable in header["variables"]]
        self._check_arrays(self._expected(), header["crc32"])

    def _read_header(self, metadata):
        if FORMAT not in metadata:
            raise PackedFileError(f"not a packed model: its metadata have no {FORMAT!r}, but {sorted(metadata)[:5]}.")
        version, _, crc = metadata[FORMAT].partition(" ")
        if version != str(VERSION):
            raise PackedFileError(
                f"packed format version {version[:20]!r}; this library reads version {VERSION}. Install the version of "
                "keras_usm_lite that wrote the file."
            )
        packed = self._file.get_tensor(DESCRIPTION)
        if str(checksum(packed)) != crc:
            raise PackedFileError("the description is damaged (checksum mismatch).")
        stream = zlib.decompressobj()
        text = stream.decompress(packed.tobytes(), _MAX_DESCRIPTION)
        if not stream.eof or stream.unused_data:
            raise PackedFileError(f"the description is not one zlib stream of at most {_MAX_DESCRIPTION} bytes.")
        _check_size(text)
        header = json.loads(text)
        parts = sorted(header) if isinstance(header, dict) else type(header).__name__
        if parts != ["crc32", "layers", "model", "variables"]:
            raise PackedFileError(f"the description has the parts {parts[:9]}.")
        return header

    def layer_arrays(self, entry):
        """Return the arrays of a layer, by their names in `entry.arrays()`."""
        return {key: self._file.get_tensor(f"{entry.name}/{key}") for key in entry.arrays()}

    def variable_arrays(self, variable):
        """Return the arrays of a variable, by their suffixes in `variable.arrays()`."""
        return {suffix: self._file.get_tensor(f"{variable.name}{suffix}") for suffix in variable.arrays()}

    def _expected(self):
        """Return `{array name: (type, shape, bytes that a stream stands for)}` of all arrays."""
        expected = {}
        for entry in self.layers:
            for key, (dtype, shape) in entry.arrays().items():
                plain_size = entry.plain_size(key) if shape is None else None
                _add(expected, f"{entry.name}/{key}", dtype, shape, plain_size)
        for variable in self.variables:
            for suffix, (dtype, shape) in variable.arrays().items():
                _add(expected, f"{variable.name}{suffix}", dtype, shape, None)
        return expected

    def _check_arrays(self, expected, checksums):
        names = sorted(set(self._file.keys()) - {DESCRIPTION})
        if set(names) != set(expected):
            missing, extra = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
            raise PackedFileError(f"arrays are missing: {missing[:5]}; arrays that nothing describes: {extra[:5]}.")
        for name, crc in zip(names, checksums, strict=True):
            self._check_type(name, *expected[name])
            if checksum(self._file.get_tensor(name)) != crc:
                raise PackedFileError(f"the array {name!r} is damaged (checksum mismatch).")

    def _check_type(self, name, dtype, shape, plain_size):
        view = self._file.get_slice(name)
        found, size = view.get_dtype(), tuple(view.get_shape())
        if found != TYPES[dtype] or (size != shape if shape is not None else len(size) != 1):
            raise PackedFileError(
                f"the array {name!r} has type {found} and shape {size}, expected {TYPES[dtype]} and "
                f"{'one axis' if shape is None else shape}."
            )
        if shape is None and plain_size > EXPANSION * size[0]:
            raise PackedFileError(
                f"the stream {name!r} of {size[0]} bytes claims to stand for {plain_size} bytes, more than {EXPANSION} "
                "times as many."
            )


def write_description(model, layers, variables, tensors):
    """Add the description of a file to its arrays and return the file's metadata: version and checksum.

    Args:
        model: configuration of the Keras model.
        layers, variables: descriptions, dicts.
        tensors: all arrays by name.
    """
    crc32 = [checksum(tensors[name]) for name in sorted(tensors)]
    parts = {"model": model, "layers": layers, "variables": variables, "crc32": crc32}
    # In the order of its dicts: the first rule of a CompressedModel that matches wins.
    text = json.dumps(parts, separators=(",", ":")).encode()
    _check_size(text)
    packed = np.frombuffer(zlib.compress(text, 9), np.uint8)
    tensors[DESCRIPTION] = packed
    return {FORMAT: f"{VERSION} {checksum(packed)}"}


def _check_size(text):
    containers = text.count(b"[") + text.count(b"{")
    if len(text) > _MAX_DESCRIPTION or containers > _MAX_CONTAINERS:
        raise ValueError(
            f"the description of the model takes {len(text)} bytes and {containers} brackets; it may take "
            f"{_MAX_DESCRIPTION} and {_MAX_CONTAINERS}."
        )


def _add(expected, name, *what):
    if name in expected:
        raise PackedFileError(f"the array {name!r} is described twice.")
    expected[name] = what
