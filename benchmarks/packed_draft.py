"""`Draft`: a packed file in parts that can be changed one by one and put together again with right checksums.

`damaged_bytes` knows nothing of the parts.
"""

import functools
import json
import struct
import zlib
from typing import NamedTuple

from keras_usm_lite.packing.packed_reader import DESCRIPTION, FORMAT


class Tensor(NamedTuple):
    """An array as safetensors stores it."""

    dtype: str
    shape: tuple
    data: bytes


class Draft:
    """A packed file in its parts. `file()` puts them together; what is set to a value is taken instead of made anew."""

    def __init__(self, content):
        length = struct.unpack("<Q", content[:8])[0]
        entries, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        self.metadata = entries.pop("__metadata__")
        self.tensors = {
            name: Tensor(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        }
        self.parts = json.loads(zlib.decompress(self.tensors.pop(DESCRIPTION).data))
        self.crc32 = self.text = self.description = self.entries = None

    @functools.cached_property
    def sealed_text(self):
        """The JSON of the description with right checksums."""
        checksums = [zlib.crc32(self.tensors[name].data) for name in sorted(self.tensors)]
        parts = self.parts
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
        tensors = {**self.tensors, DESCRIPTION: Tensor("U8", (len(description),), description)}
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
