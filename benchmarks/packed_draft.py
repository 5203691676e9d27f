"""`Draft`: a packed file in parts that can be changed one by one and put together again with right checksums.

`damaged_bytes` knows nothing of the parts.
"""

import functools
import json
import struct
import zlib
from typing import NamedTuple

import ml_dtypes
import numpy as np

from keras_usm_lite.packing.array_demand import STREAMS, ArrayDemand, demanded
from keras_usm_lite.packing.joined_arrays import JOINED, JoinedArrays, join_arrays
from keras_usm_lite.packing.packed_entry import PackedEntry
from keras_usm_lite.packing.packed_reader import DESCRIPTION, FORMAT
from keras_usm_lite.packing.packed_variable import TYPES, PackedVariable

DTYPES = {kind: np.dtype(getattr(ml_dtypes, name, name)) for name, kind in TYPES.items()}


class Tensor(NamedTuple):
    """An array as safetensors stores it."""

    dtype: str
    shape: tuple
    data: bytes


class Draft:
    """A packed file in its parts. `file()` puts them together; what is set to a value is taken instead of made anew.

    The arrays of an archive are taken apart, and joined again in the order of the description, if that can be.
    """

    def __init__(self, content):
        length = struct.unpack("<Q", content[:8])[0]
        entries, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        self.metadata = entries.pop("__metadata__")
        self.tensors = {
            name: Tensor(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        }
        self.parts = json.loads(zlib.decompress(self.tensors.pop(DESCRIPTION).data))
        self.archive = [*self.tensors] == [JOINED]
        if self.archive:
            self.tensors = self._apart()
        self.crc32 = self.text = self.description = None
        self.layout = {}  # "streams" or "planes" of an archive
        self.planes = {}  # by their numbers: form and bytes

    def _apart(self):
        """Return the arrays of an archive by their names."""
        demands = self._demands()
        arrays, tensors = JoinedArrays(_OneTensor(self.tensors[JOINED]), [JOINED], demands, self.parts), {}
        for name, demand in demands.items():
            array = arrays[name]
            tensors[name] = Tensor(TYPES[demand.dtype], array.shape, array.tobytes())
        return tensors

    @functools.cached_property
    def contained(self):
        """The tensors of the container but the description, and what the description says of the layout."""
        if not self.archive:
            return self.tensors, {}
        arrays, demands = {}, {}
        for name in self._order():
            kind, _, data = self.tensors[name]
            dtype = DTYPES.get(kind, np.dtype("uint8"))
            array = np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
            stream = name.rpartition("/")[2] in STREAMS
            arrays[name], demands[name] = array, ArrayDemand(dtype.name, array.shape, array.size if stream else None)
        joined, layout = join_arrays(arrays, demands)
        data, end = joined.tobytes(), sum(layout["streams"])
        pieces = [data[:end]]
        for number, (form, size) in enumerate(layout["planes"]):
            form, plane = self.planes.get(number, (form, data[end : end + size]))
            layout["planes"][number] = form, len(plane)
            pieces.append(plane)
            end += size
        data = b"".join(pieces)
        return {JOINED: Tensor("U8", (len(data),), data)}, {**layout, **self.layout}

    def plane_counts(self):
        """How many bytes each plane of an archive stands for."""
        counts = {}
        for name in self._order():
            kind, _, data = self.tensors[name]
            if name.rpartition("/")[2] not in STREAMS:
                counts[kind] = counts.get(kind, 0) + len(data)
        sizes = {kind: DTYPES.get(kind, np.dtype("uint8")).itemsize for kind in counts}
        return [counts[kind] // sizes[kind] for kind in counts for _ in range(sizes[kind])]

    def _demands(self):
        layers = [PackedEntry(**entry) for entry in self.parts["layers"]]
        return demanded(layers, [PackedVariable(**entry) for entry in self.parts["variables"]])

    def _order(self):
        """The names of the arrays as the description lists them, then all others."""
        try:
            described = [name for name in self._demands() if name in self.tensors]
        except Exception:  # a description that is damaged lists nothing
            described = []
        return dict.fromkeys([*described, *self.tensors])

    @functools.cached_property
    def sealed_text(self):
        """The JSON of the description with right checksums."""
        tensors, layout = self.contained
        checksums = [zlib.crc32(tensors[name].data) for name in sorted(tensors)]
        parts = {**self.parts, **layout} if isinstance(self.parts, dict) else self.parts
        if self.crc32 is not None:
            parts = {**parts, "crc32": self.crc32}
        elif isinstance(parts, dict) and "crc32" in parts:
            parts = {**parts, "crc32": checksums}
        return json.dumps(parts, separators=(",", ":")).encode()

    def header(self):
        """Return the JSON of the container as a list of pairs, and all data; a name may occur twice."""
        description = self.description
        if description is None:
            description = zlib.compress(self.sealed_text if self.text is None else self.text)
        tensors = {**self.contained[0], DESCRIPTION: Tensor("U8", (len(description),), description)}
        if FORMAT in self.metadata and " " in self.metadata[FORMAT]:
            self.metadata[FORMAT] = f"{self.metadata[FORMAT].split(' ')[0]} {zlib.crc32(description)}"
        pairs, begin = [("__metadata__", self.metadata)], 0
        for name, (dtype, shape, data) in tensors.items():
            end = begin + len(data)
            pairs.append((name, {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}))
            begin = end
        return pairs, b"".join(tensor.data for tensor in tensors.values())

    def file(self):
        """Return the bytes of the file."""
        return contained(*self.header())


class _OneTensor:
    """A safetensors file of one array, as `JoinedArrays` reads it."""

    def __init__(self, tensor):
        self._tensor = tensor

    def get_tensor(self, name):
        return np.frombuffer(self._tensor.data, np.uint8)

    def get_slice(self, name):
        return self

    def get_dtype(self):
        return self._tensor.dtype

    def get_shape(self):
        return self._tensor.shape

    def __getitem__(self, where):
        return self.get_tensor(JOINED)[where]


def contained(pairs, data):
    """Return a safetensors file of the pairs of its JSON and its data."""
    texts = [f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}" for name, value in pairs]
    text = f"{{{','.join(texts)}}}".encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def damaged_bytes(content, draw, other=b""):
    """Flip, overwrite, cut off, add, move or exchange some bytes."""
    content, at = bytearray(content), draw.randrange(max(len(content), 1))
    length = min(draw.choice([1, 1, 2, 4, 16, 256]), max(len(content) - at, 1))
    source = other or bytes(content)
    start = draw.randrange(max(len(source), 1))
    kind = draw.choice(
        ["flip", "flip", "flips", "write", "cut", "append", "insert", "delete", "splice", "zero", "tail"]
    )
    if kind in ("flip", "flips") and content:
        for _ in range(1 if kind == "flip" else draw.randint(2, 9)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "write":
        content[at : at + length] = draw.randbytes(length)
    elif kind == "cut":
        del content[at:]
    elif kind == "append":
        content += draw.choice([b"\0", b" ", b"\xff"]) * length
    elif kind == "insert":
        content[at:at] = draw.randbytes(length)
    elif kind == "delete":
        del content[at : at + length]
    elif kind == "splice":
        content[at : at + length] = source[start : start + length]
    elif kind == "zero":
        content[at : at + length] = bytes(length)
    elif kind == "tail":
        content[at:] = source[start:]
    return bytes(content)
