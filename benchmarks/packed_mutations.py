"""Ways to damage a packed file: at random, and with knowledge of every field and checksum of docs/packed_format.md.

A mutation takes a `Draft` and a `random.Random`, and changes the draft or returns other bytes for the file. All
checksums around what it changed are made anew, so that the checks behind them are reached; mutations of the family
"raw" leave the checksums alone.
"""

import json
import math
import struct
import zlib

import numpy as np
from packed_draft import Draft, Tensor, contained, damaged_bytes

from keras_usm_lite.packing.packed_entry import PackedEntry
from keras_usm_lite.packing.packed_reader import DESCRIPTION, FORMAT
from keras_usm_lite.packing.packed_variable import TYPES

WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
NUMBERS = [0, 1, -1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 127, 128, 255, 256, 2**15, 2**16, 10**6,
           2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)]  # fmt: skip
NAMES = ["", ".", "/", "../../../../etc/passwd", "/etc/passwd", "C:\\x", "a\0b", "\ud800", "\u202e", "x" * 100_000,
         "#2", DESCRIPTION, "__metadata__", FORMAT, "%s%n", "{0.__class__}"]  # fmt: skip
CHOICES = ["bits", "range", "zstd", "enumerative", "positions", "float32", "float16", "bfloat16", "int8", "bool",
           "int64", "symmetric", "full", "midrise", "asymmetric", "absmax", "mse", "learned", "native"]  # fmt: skip
CLASSES = ["Dense", "Embedding", "LSTM", "Sequential", "Functional", "Lambda", "Dropout", "QuantDense", "Popen",
           "InputLayer", "MultiHeadAttention", "BatchNormalization", "__lambda__", "__numpy__", "__tensor__",
           "__bytes__", "function", "CompressedLayer", "CompressedModel", "USMForCTC"]  # fmt: skip
OTHERS = [None, True, False, 0.5, -0.0, 1e308, math.nan, math.inf, [], {}, [1], [[]], [1, 1], {"a": 1}, "4", "relu"]
FIELDS = ["name", "rows", "columns", "bits", "codebook", "scale_shape", "n", "m", "codes", "masks", "scales", "values"]


def anything(draw, like=None):
    """Return a value that does not belong there, or nearly does."""
    if isinstance(like, int) and not isinstance(like, bool) and draw.random() < 0.6:
        return draw.choice(
            [like + 1, like - 1, like * 2, like // 2, -like, like * 1000, str(like), float(like), [like]]
        )
    return draw.choice(draw.choice([NUMBERS, NAMES, CHOICES, CLASSES, OTHERS]))


def leaves(tree):
    """Return every place in nested lists and dicts, as pairs of the container and its key."""
    places, todo = [], [tree]
    while todo:
        node = todo.pop()
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in list(keys):
            places.append((node, key))
            todo.append(node[key])
    return places


def rearrange(entries, kind, draw):
    """Repeat an entry of a list, exchange all, or drop one."""
    if kind == "repeat":
        entries.insert(draw.randrange(len(entries)), draw.choice(entries))
    elif kind == "shuffle":
        draw.shuffle(entries)
    else:
        entries.pop(draw.randrange(len(entries)))


def layer_field(draft, draw):
    """Change one or two fields of a layer's description; half the time make its arrays anew to fit."""
    entry = draw.choice(draft.parts["layers"])
    before = dict(entry)
    for _ in range(draw.choice([1, 1, 2])):
        field = draw.choice(FIELDS)
        if draw.random() < 0.1:
            entry.pop(field, None)
        elif draw.random() < 0.3:
            entry[field] = draw.choice(draft.parts["layers"]).get(field)
        else:
            entry[field] = anything(draw, entry.get(field))
    if draw.random() < 0.5:
        refit(draft, draw, before, entry)


def refit(draft, draw, before, entry):
    """Give a changed layer arrays of the types and shapes that its description now demands."""
    try:
        demanded = PackedEntry(**entry).arrays()
    except (TypeError, ValueError):
        return
    if sum(math.prod(shape or (0,)) for _, shape in demanded.values()) > 2**20:
        return
    old = {key: draft.tensors.pop(f"{before['name']}/{key}") for key in PackedEntry(**before).arrays()}
    for key, (dtype, shape) in demanded.items():
        source = old.get(key, next(iter(old.values())))
        kind = TYPES[dtype]
        shape = source.shape if shape is None else shape
        size = math.prod(shape) * WIDTHS.get(kind, 1)
        data = draw.choice([bytes(size), (source.data * (size + 1))[:size] if size < 4096 else bytes(size)])
        draft.tensors[f"{entry['name']}/{key}"] = Tensor(kind, shape, data)


def layer_name(draft, draw):
    """Rename a layer and its arrays: names are labels, so most are the same model."""
    entry, name = draw.choice(draft.parts["layers"]), draw.choice(NAMES)
    for key in PackedEntry(**entry).arrays():
        draft.tensors[f"{name}/{key}"] = draft.tensors.pop(f"{entry['name']}/{key}")
    entry["name"] = name


def variable_field(draft, draw):
    """Change one field of a variable's description."""
    entry, field = draw.choice(draft.parts["variables"]), draw.choice(["name", "shape", "dtype", "stored", "more"])
    if draw.random() < 0.1:
        entry.pop(field, None)
    elif field == "shape" and draw.random() < 0.5:
        entry[field] = [draw.choice(NUMBERS) for _ in range(draw.randrange(4))]
    elif field == "dtype" and draw.random() < 0.5:
        entry["dtype"] = entry["stored"] = draw.choice([*TYPES])
    else:
        entry[field] = anything(draw)


def part(draft, draw):
    """Remove, exchange, repeat or replace whole parts of the description."""
    parts, name = draft.parts, draw.choice(["model", "layers", "variables", "crc32"])
    if draft.archive and draw.random() < 0.5:
        return layout(draft, draw)
    kind = draw.choice(["remove", "replace", "extra", "repeat", "shuffle", "drop"])
    if kind == "remove":
        del parts[name]
    elif kind == "replace":
        parts[name] = anything(draw)
        draft.crc32 = parts[name] if name == "crc32" else None
    elif kind == "extra":
        parts[draw.choice(NAMES)] = anything(draw)
    elif isinstance(parts[name], list):
        entries = list(parts[name])
        rearrange(entries, kind, draw)
        draft.parts = {**parts, name: entries}
        draft.crc32 = entries if name == "crc32" else None


def layout(draft, draw):
    """Change lengths and forms of the streams and planes of an archive, or exchange, repeat or drop some."""
    _, right = draft.contained
    name = draw.choice([*right])
    entries = json.loads(json.dumps(right[name]))
    kind = draw.choice(["leaf", "leaf", "leaf", "shift", "replace", "repeat", "shuffle", "drop"])
    if kind == "leaf":
        node, key = draw.choice(leaves(entries))
        node[key] = anything(draw, node[key])
    elif kind == "shift" and len(entries) > 1:
        one, other = draw.sample(range(len(entries)), 2)  # the sum stays
        for place, change in ((one, 1), (other, -1)):
            if name == "streams":
                entries[place] += change
            else:
                entries[place][1] += change
    elif kind == "replace":
        entries = anything(draw)
    else:
        rearrange(entries, kind, draw)
    draft.layout = {name: entries}
    del draft.contained  # made anew with it


def text(draft, draw):
    """Damage the JSON text of the description: bytes, encodings, nesting, numbers without end."""
    good = draft.sealed_text
    odd = [
        good.decode().encode("utf-16"), good + b" {}", b"[" * 200_000, b'{"model":' * 50_000, b"", b"null",
        good.replace(b"1", b"1" * 5000, 1), good.replace(b"4", b"1e999", 1), good.replace(b"4", b"NaN", 1),
        good[:-1] + b',"model":{}}', good.replace(b'"layers":', b'"layers":[],"layers":', 1), b"\xff" + good,
    ]  # fmt: skip
    draft.text = draw.choice(odd) if draw.random() < 0.3 else damaged_bytes(good, draw)


def description(draft, draw):
    """Damage the zlib stream of the description: bytes, other containers, a second stream."""
    good = zlib.compress(draft.sealed_text)
    odd = [good + good, good + b"\0", good[:-1], good[:-4] + b"\0\0\0\0", b"", good[2:-4], zlib.compress(good),
           b"\x1f\x8b\x08" + good, zlib.compress(draft.sealed_text, 0)]  # fmt: skip
    draft.description = draw.choice(odd) if draw.random() < 0.5 else damaged_bytes(good, draw)


def bomb(draft, draw):
    """A description that is small in the file and large in memory."""
    size = draw.choice([3 * 2**18, 2**20, 2**22, 2**23 - 2**15, 2**24, 2**26])
    good = draft.sealed_text
    filling = draw.choice([b"[],", b"{},", b"1,", b'"a",', b"[[],", b"  ", b"0.5,"])
    nested = b"]" if filling == b"[[]," else b""
    count = size // len(filling) if not nested else min(size // len(filling), 400)
    inside = filling * count + b"0" + nested * count
    draft.text = draw.choice([
        b'{"extra":[' + inside + b"]," + good[1:],
        good[:-1] + b',"crc32":[' + inside + b"]}",
        good.replace(b'"layers":[', b'"layers":[' + inside + b",", 1),
        good.replace(b'"variables":[', b'"variables":[' + inside + b",", 1),
        good.replace(b'"config":{', b'"config":{"extra":[' + inside + b"],", 1),
        b" " * size + good,
        b'"' + b"x" * size + b'"',
        bytes(size),
    ])  # fmt: skip


def model_leaf(draft, draw):
    """Change one or two places of the Keras configuration."""
    for _ in range(draw.choice([1, 1, 1, 2])):
        node, key = draw.choice(leaves(draft.parts["model"]))
        kind = draw.random()
        if kind < 0.1:
            node.pop(key, None) if isinstance(node, dict) else node.pop(min(key, len(node) - 1)) if node else None
        elif kind < 0.2:
            source, other = draw.choice(leaves(draft.parts["model"]))
            node[key] = json.loads(json.dumps(source[other]))
        elif kind < 0.3 and isinstance(node, list):
            node.extend(json.loads(json.dumps(node)))
        elif isinstance(node, dict) and key in node or isinstance(node, list) and key < len(node):
            node[key] = anything(draw, node[key])


def model_number(draft, draw):
    """Make one whole number of the Keras configuration large: units, layers, heads, shapes."""
    places = [(node, key) for node, key in leaves(draft.parts["model"]) if type(node[key]) is int]
    if places:
        node, key = draw.choice(places)
        node[key] = draw.choice([number for number in NUMBERS if number > 64] + [node[key] * 100, node[key] + 1])


def model_code(draft, draw):
    """Plant objects that Keras treats in a special way where a layer is expected."""
    value = [1.0] * draw.choice([1, 1000])
    planted = draw.choice([
        {"class_name": "__lambda__", "config": {"value": "4wEAAAAA", "defaults": None, "closure": None}},
        {"class_name": "__numpy__", "config": {"value": value, "dtype": "float64"}},
        {"class_name": "__tensor__", "config": {"value": value, "dtype": "float32"}},
        {"class_name": "__slice__", "config": {"start": 0, "stop": 2**62, "step": 1}},
        {"class_name": "function", "config": "system", "module": "os", "registered_name": "system"},
        {"class_name": "Popen", "config": {"args": "true"}, "module": "subprocess", "registered_name": None},
        {"class_name": "get_file", "config": {"origin": "file:///etc/passwd"}, "module": "keras.utils"},
        {"module": "keras.layers", "class_name": "Lambda", "config": {"function": "system"}, "registered_name": None},
        {"module": "keras.layers", "class_name": "Dense", "config": {"units": 2**40}, "registered_name": None,
         "build_config": {"input_shape": [None, 2**40]}},
        {"module": "keras", "class_name": "Sequential", "config": {"layers": []}, "registered_name": None,
         "compile_config": {"optimizer": "adam", "loss": "mse"}},
    ])  # fmt: skip
    dicts = [(node, key) for node, key in leaves(draft.parts) if isinstance(node[key], dict)]
    node, key = draw.choice(dicts)
    node[key] = planted
    if draw.random() < 0.3:
        draft.parts["model"]["compile_config"] = {"optimizer": "adam", "loss": "mse"}


def array(draft, draw):
    """Change the bytes, the type or the shape of an array, or exchange two arrays."""
    name = draw.choice([*draft.tensors])
    dtype, shape, data = draft.tensors[name]
    kind = draw.choice(["bytes", "bytes", "bytes", "numbers", "type", "shape", "exchange", "remove", "copy"])
    if kind == "bytes":
        data = damaged_bytes(data, draw)
        data = data[: math.prod(shape) * WIDTHS.get(dtype, 1)].ljust(math.prod(shape) * WIDTHS.get(dtype, 1), b"\0")
    elif kind == "numbers" and dtype == "F32" and data:
        values = np.frombuffer(data, "<f4").copy()
        odd = [math.nan, math.inf, -math.inf, 0, -1, 1e-45, 1e38, 3e38, -0.0, 2.0**101, 0.5, 127, 128, -129]
        values[draw.randrange(values.size)] = draw.choice(odd)
        data = values.tobytes()
    elif kind == "type":
        dtype = draw.choice([*WIDTHS, "U8", "I8", "BOOL", "F8_E4M3", "C64", "F4"])
    elif kind == "shape":
        shape = draw.choice([shape[::-1], (*shape, 1), (math.prod(shape),), (1, *shape), (), (0,), (2**40, 2**40)])
    elif kind == "exchange":
        other = draw.choice([*draft.tensors])
        draft.tensors[name], draft.tensors[other] = draft.tensors[other], draft.tensors[name]
        return
    elif kind == "remove":
        del draft.tensors[name]
        return
    elif kind == "copy":
        name = draw.choice([f"{name}#2", f"{name}/x", *NAMES])
    draft.tensors[name] = Tensor(dtype, shape, data)


def plane(draft, draw):
    """Replace a plane of an archive by another of another coder, with right checksums of bytes."""
    planes = draft.contained[1]["planes"]
    number = draw.randrange(len(planes))
    form, _ = planes[number]
    count = draft.plane_counts()[number] + draw.choice([0, 0, 0, 1, -1, 10**6])
    coder, data = recoded(draw, count, 256, 256, draw.randbytes(count))
    draft.planes[number] = coder or form, data
    del draft.contained


def stream(draft, draw):
    """Replace a stream by another of another coder, with right checksums of symbols that may be none."""
    if draft.archive and draw.random() < 0.3:
        return plane(draft, draw)
    entry = draw.choice(draft.parts["layers"])
    about = PackedEntry(**entry)
    sizes = {"codes": (about.kept_rows * about.columns, about.alphabet)} if about.quantized else {}
    if about.n is not None:
        sizes["masks"] = about.groups, about.patterns
    field = draw.choice([*sizes])
    count, alphabet = sizes[field]
    name = f"{about.name}/{'codes' if field == 'codes' else about.mask_key}"
    highest = draw.choice([1, alphabet, alphabet, alphabet + 1, 256])
    count += draw.choice([0, 0, 0, 1, -1, 10**6])
    coder, data = recoded(draw, count, alphabet, highest, draft.tensors[name].data)
    entry[field] = coder or entry[field]
    if about.mask_key == "positions" and field == "masks":
        draft.tensors[f"{about.name}/patterns"] = draft.tensors.pop(name)
        name = f"{about.name}/patterns"
    draft.tensors[name] = Tensor("U8", (len(data),), data)


def recoded(draw, count, alphabet, highest, old):
    """Return a coder, None for that of the old stream, and a stream of some symbols below `highest`."""
    import zstandard

    symbols = bytes(draw.randrange(min(highest, 256)) for _ in range(min(count, 5000))).ljust(count, b"\0")
    frame = zstandard.ZstdCompressor(level=draw.choice([1, 19, 22]), write_content_size=draw.random() < 0.9)
    table = draw.choice([
        bytes(2 * alphabet), b"\xff" * 2 * alphabet, draw.randbytes(2 * alphabet), b"\1\0" + bytes(2 * alphabet - 2),
        bytes(2 * alphabet - 2) + b"\xff\xff",
    ])  # fmt: skip
    bodies = {
        "zstd": frame.compress(symbols),
        "frames": frame.compress(symbols) + frame.compress(b""),
        "claim": b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", draw.choice([count, 2**40, 2**64 - 1])) + b"\x01\0\0",
        "runs": b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", count) + (2**17 - 1 << 3 | 2).to_bytes(3, "little") + b"\0",
        "window": b"\x28\xb5\x2f\xfd\x80\xf8" + struct.pack("<I", count) + b"\x01\0\0",
        "skippable": b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"1234",
        "range": table + draw.randbytes(4 * draw.choice([0, 1, 2, 50])),
        "damaged": damaged_bytes(old, draw)[4:],
    }
    kind = draw.choice([*bodies])
    crc = old[:4] if draw.random() < 0.3 else struct.pack("<I", zlib.crc32(symbols))
    data = crc + bodies[kind] + bytes(draw.choice([0, 0, 0, 4]))
    return {"range": "range", "damaged": None}.get(kind, "zstd"), data


def metadata(draft, draw):
    """Change the metadata of the container: version, names, types, more keys."""
    right = draft.metadata[FORMAT]
    kind = draw.choice(["version", "key", "type", "extra", "empty"])
    if kind == "version":
        version = draw.choice(["", "0", "1", "2", "3", "4", "02", "2.0", "two", "2 2", "-2", "2\n", "9" * 10_000])
        draft.metadata[FORMAT] = draw.choice([f"{version} 0", version])
    elif kind == "key":
        draft.metadata = {draw.choice([FORMAT.upper(), "format", ""]): right}
    elif kind == "type":
        draft.metadata = draw.choice([None, [], 3, {FORMAT: None}, {FORMAT: 2}, {FORMAT: [right]}])
        return contained([("__metadata__", draft.metadata)], b"")
    elif kind == "extra":
        draft.metadata[draw.choice(["format", "../x", "\0", "z" * 10_000])] = str(anything(draw))
    else:
        draft.metadata = {}


def container(draft, draw):
    """Change offsets, shapes, types and names in the JSON of the container, or the JSON itself."""
    pairs, data = draft.header()
    index = draw.randrange(1, len(pairs))
    name, entry = pairs[index]
    kind = draw.choice(["offset", "offset", "shape", "type", "twice", "order", "rename", "extra", "length", "json"])
    if kind == "offset":
        entry["data_offsets"][draw.randrange(2)] = anything(draw, draw.choice(entry["data_offsets"]))
    elif kind == "shape":
        entry["shape"] = draw.choice(
            [[2**62, 4], [2**64], [-1], [0], [], [2**32, 2**32], "1", [1.5], entry["shape"] * 2]
        )
    elif kind == "type":
        entry["dtype"] = draw.choice([*WIDTHS, "U8", "I8", "BOOL", "F8_E5M2", "C64", "F4", "X", "", 3])
    elif kind == "twice":
        pairs.append((name, draw.choice([entry, pairs[-1][1]])))
    elif kind == "order":
        draw.shuffle(pairs)
    elif kind == "rename":
        pairs[index] = draw.choice(NAMES), entry
    elif kind == "extra":
        entry["extra"] = anything(draw)
    elif kind == "length":
        return struct.pack("<Q", draw.choice([0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1])) + draft.file()[8:]
    elif kind == "json":
        content = contained(pairs, data)
        length = struct.unpack("<Q", content[:8])[0]
        changed = damaged_bytes(content[8 : 8 + length], draw)
        return struct.pack("<Q", len(changed)) + changed + data
    return contained(pairs, data)


def raw(draft, draw, content, other):
    """Damage the file as bytes; nothing is repaired."""
    return damaged_bytes(content, draw, draw.choice([b"", other]))


def raw_fields(draft, draw, content, other):
    """Change a field or an array and leave the checksums as they were, or only those of the arrays."""
    crc32, text = draft.parts["crc32"], draft.metadata[FORMAT]
    change = draw.choice([layer_field, variable_field, array, array, array, model_leaf])
    change(draft, draw)
    draft.crc32 = crc32
    pairs, data = draft.header()
    if change is not array or draw.random() < 0.5:
        pairs[0] = "__metadata__", {FORMAT: text}
    return contained(pairs, data)


def graft(draft, draw, content, other):
    """Put together parts of two files."""
    donor, name = Draft(other), draw.choice(["model", "layers", "variables"])
    draft.parts[name] = donor.parts[name]
    if draw.random() < 0.5:
        shared = draft.tensors.keys() & donor.tensors.keys()
        draft.tensors.update({key: donor.tensors[key] for key in shared if draw.random() < 0.5})
    if draw.random() < 0.5 and name != "model":
        draft.tensors = donor.tensors


UNREPAIRED = {"raw": raw, "raw fields": raw_fields}
TWO_FILES = {**UNREPAIRED, "graft": graft}
REPAIRED = {
    "layer field": layer_field, "layer name": layer_name, "variable field": variable_field, "part": part, "text": text,
    "description": description, "bomb": bomb, "model leaf": model_leaf, "model number": model_number,
    "model code": model_code, "array": array, "stream": stream, "metadata": metadata, "container": container,
}  # fmt: skip
# How often each family is tried, in percent.
SHARES = {
    "raw": 20, "raw fields": 8, "layer field": 16, "layer name": 1, "variable field": 6, "part": 3, "text": 5,
    "description": 2, "bomb": 0.5, "model leaf": 8, "model number": 4, "model code": 2, "array": 11, "stream": 7,
    "metadata": 1, "container": 4.5, "graft": 1,
}  # fmt: skip


def mutated(content, other, family, draw):
    """Return the bytes of a file with one mutation of a family, and whether its checksums were made anew."""
    draft = Draft(content)
    if family in TWO_FILES:
        changed = TWO_FILES[family](draft, draw, content, other)
    else:
        changed = REPAIRED[family](draft, draw)
    return draft.file() if changed is None else changed, family not in UNREPAIRED
