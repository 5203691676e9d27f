"""Reading trusts nothing: whatever is wrong with a file is an error that names the file, never another model."""

import json
import pathlib
import struct
import sys
import zlib

import keras
import numpy as np
import pytest
import zstandard
from keras import ops
from safetensors import safe_open
from safetensors.numpy import save_file

import keras_usm_lite as usm
from keras_usm_lite.packing.packed_reader import PackedReader

X = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")


def array(tensor):
    return ops.convert_to_numpy(tensor)


def small():
    """A model whose codes are worth a coder: many are zero."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8,)), usm.QuantDense(64, "int4", sparsity="2:4", name="a"), keras.layers.Dense(2, name="b")]
    model = keras.Sequential(layers, name="small")
    kernel = model.get_layer("a").kernel
    kernel.assign(array(kernel) ** 15)
    usm.update_masks(model)
    return model


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """The bytes of a plain file and of an archive."""
    path, model = tmp_path_factory.mktemp("packed") / "small.usm", small()
    contents = {archive: usm.save_packed(model, path, archive=archive).read_bytes() for archive in (False, True)}
    assert len(contents[True]) < len(contents[False])
    return contents


@pytest.fixture
def packed(contents, tmp_path):
    path = tmp_path / "small.usm"
    path.write_bytes(contents[False])
    return path


@pytest.fixture
def archive(contents, tmp_path):
    path = tmp_path / "small.usm"
    path.write_bytes(contents[True])
    return path


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"\xff" * 64, b"PK\x03\x04 a zip, perhaps", struct.pack("<Q", 2) + b"{}"]
)
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    path = tmp_path / "other.usm"
    path.write_bytes(content)
    with pytest.raises(usm.PackedFileError, match="other.usm"):
        usm.load_packed(path)


def test_a_safetensors_file_of_somebody_else_is_refused(tmp_path):
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": np.ones(3, "float32")}, tmp_path / "other.safetensors", metadata=metadata)
        with pytest.raises(usm.PackedFileError, match="not a packed model: its metadata have no"):
            usm.load_packed(tmp_path / "other.safetensors")


@pytest.mark.parametrize("kind", [False, True])
def test_a_truncated_file_is_refused_wherever_it_ends(kind, contents, packed):
    content = contents[kind]
    data = 8 + struct.unpack("<Q", content[:8])[0]
    for length in (0, 1, 7, 8, 9, 100, data // 2, data - 1, data, data + 1, len(content) - 17, len(content) - 1):
        packed.write_bytes(content[:length])
        with pytest.raises(usm.PackedFileError, match="may be truncated"):
            usm.load_packed(packed)
    packed.write_bytes(content + b"\0")
    with pytest.raises(usm.PackedFileError):
        usm.load_packed(packed)


@pytest.mark.parametrize("kind", [False, True])
def test_a_flipped_bit_anywhere_is_noticed(kind, contents, packed):
    content = contents[kind]
    data = 8 + struct.unpack("<Q", content[:8])[0]
    draw = np.random.default_rng(0)
    for position in [*range(data), *draw.integers(data, len(content), 100)]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(draw.integers(8))
        packed.write_bytes(damaged)
        with pytest.raises(usm.PackedFileError, match="small.usm"):
            usm.load_packed(packed)


def changed(path, edit):
    """Write the file anew after `edit(header, tensors)`, with right checksums."""
    with safe_open(path, "numpy") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    header = json.loads(zlib.decompress(tensors.pop("description")))
    before = [*header["crc32"]]
    header = edit(header, tensors) or header
    if isinstance(header, dict) and header.get("crc32") == before:
        header["crc32"] = [zlib.crc32(tensors[name].tobytes()) for name in sorted(tensors)]
    described(path, zlib.compress(json.dumps(header).encode()), metadata, tensors)


def described(path, description, metadata, tensors):
    tensors["description"] = np.frombuffer(description, "uint8")
    crc = zlib.crc32(description)
    save_file(tensors, path, metadata={key: f"{text.split()[0]} {crc}" for key, text in metadata.items()})


@pytest.mark.parametrize("version", ["1", "4", "20", "", "two"])
def test_another_version_asks_for_another_library(version, packed):
    with safe_open(packed, "numpy") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    (text,) = metadata.values()
    save_file(tensors, packed, metadata={"keras_usm_lite.packed": text.replace("2", version, 1)})
    with pytest.raises(
        usm.PackedFileError, match=f"version {version!r}; this library reads version 2 and 3. Install the ver"
    ):
        usm.load_packed(packed)


def test_a_description_without_end_is_refused_before_it_is_unpacked(packed):
    with safe_open(packed, "numpy") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    for description in (zlib.compress(bytes(2**23 + 1)), zlib.compress(b"{}")[:-2], zlib.compress(b"{}") + b"more"):
        described(packed, description, metadata, tensors)
        with pytest.raises(usm.PackedFileError, match="not one zlib stream of at most 8388608 bytes"):
            usm.load_packed(packed)


@pytest.mark.parametrize("filling", ["[]", "{}", '{"a":1}'])
def test_a_description_of_millions_of_lists_is_refused_before_it_is_parsed(filling, packed):
    """8 MB of text would be some hundred MB of Python objects."""
    with safe_open(packed, "numpy") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    text = f"[{','.join([filling] * (2**23 // len(filling) // 2))}]"
    assert len(text) < 2**23
    described(packed, zlib.compress(text.encode()), metadata, tensors)
    with pytest.raises(usm.PackedFileError, match="brackets; it may take 8388608 and 262144"):
        usm.load_packed(packed)


def test_the_message_about_a_name_of_a_megabyte_is_short(packed):
    changed(packed, layer(name="x" * 2**20, bits=0))
    with pytest.raises(usm.PackedFileError, match=r"small.usm: .*layer 'xxx.* \.\.\. .*") as error:
        usm.load_packed(packed)
    assert len(str(error.value)) < 2200 + len(str(packed))


def layer(**fields):
    """An edit that changes fields of the first layer's entry; None removes one."""

    def edit(header, tensors):
        entry = header["layers"][0]
        entry.update(fields)
        header["layers"][0] = {key: value for key, value in entry.items() if value is not None}

    return edit


def variable(**fields):
    return lambda header, tensors: header["variables"][0].update(fields)


def part(**parts):
    return lambda header, tensors: header.update(parts)


def model(**fields):
    return lambda header, tensors: header["model"].update(fields)


def tensor(name, change):
    return lambda header, tensors: tensors.__setitem__(name, np.ascontiguousarray(change(tensors[name])))


def without(key):
    return lambda header, tensors: {name: value for name, value in header.items() if name != key}


DAMAGES = {
    "no header": ("the parts", lambda header, tensors: ["model", "layers"]),
    "header is a text": ("the parts", lambda header, tensors: "model"),
    "no model": ("the parts", without("model")),
    "no layers": ("the parts", without("layers")),
    "no checksums": ("the parts", without("crc32")),
    "one part more": ("the parts", part(extra=1)),
    "model is a number": ("rebuilt .* is a int", part(model=3)),
    "model is empty": ("rebuilt .* is a dict", part(model={})),
    "model is a layer": (
        "describes 1 compressed layers, but its model has 0",
        part(model=keras.saving.serialize_keras_object(keras.layers.Dense(3))),
    ),
    "unknown class": ("cannot be rebuilt", model(class_name="Unknown", module="os")),
    "class of another library": (
        "cannot be rebuilt",
        model(class_name="Popen", module="subprocess", config={"args": "true"}, registered_name=None),
    ),
    "config of wrong type": ("cannot be rebuilt", model(config=[1])),
    "layers is a number": ("not iterable", part(layers=1)),
    "layers is empty": ("nothing describes", part(layers=[])),
    "layer is a text": ("mapping", part(layers=["a"])),
    "layer without name": ("name", layer(name=None)),
    "layer of another name": ("arrays are missing", layer(name="small/c")),
    "layer elsewhere": ("arrays are missing", layer(name="../../etc/passwd")),
    "layer without bits": ("bits", layer(bits=None)),
    "layer with a field more": ("unexpected keyword", layer(path="/etc/passwd")),
    "rows too many": ("the array .* has type U8 and shape", layer(rows=12)),
    "rows a text": ("cannot have rows='8'", layer(rows="8")),
    "columns missing": ("columns", layer(columns=None)),
    "bits 5": ("the array .*codes.* expected U8", layer(bits=5)),
    "bits 32": ("cannot have values=None", layer(bits=32)),
    "bits a text": ("cannot have bits='4'", layer(bits="4")),
    "another codebook": ("has codebook='full', but its model has 'symmetric'", layer(codebook="full")),
    "another pattern": ("the array .* has type U8 and shape", layer(n=1)),
    "no pattern": ("nothing describes", layer(n=None, m=None, masks=None)),
    "coded, it says": ("range-coded|range", layer(codes="range")),
    "masks are positions, it says": ("arrays are missing", layer(masks="positions")),
    "another type of scale": ("expected F16", layer(scales="float16")),
    "another shape of scale": ("the array .*scale", layer(scale_shape=[1, 1])),
    "variables missing": ("nothing describes", lambda header, tensors: header["variables"].pop() and None),
    "variables a number": ("not iterable", part(variables=3)),
    "variables exchanged": ("but its model has", lambda header, tensors: header["variables"].reverse()),
    "variable unknown": ("arrays are missing", variable(name="nobody")),
    "variable twice": ("is described twice", variable(name="small/a/scale")),
    "variable of another shape": ("the array .* has type F32", variable(shape=[2, 32])),
    "variable of another type": ("the array .* expected I32", variable(dtype="int32", stored="int32")),
    "variable stored otherwise": ("expected F16", variable(stored="float16")),
    "checksums missing": ("zip", part(crc32=[])),
    "checksums too few": ("damaged|zip", lambda header, tensors: header["crc32"].pop() and None),
    "checksums are texts": ("checksum mismatch", lambda h, t: h.update(crc32=[str(crc) for crc in h["crc32"]])),
    "array missing": ("arrays are missing", lambda header, tensors: tensors.pop("small/a/codes").size and None),
    "array too many": ("nothing describes: ..extra", lambda h, t: t.update(extra=np.ones(2))),
    "array of another shape": ("has type F32 and shape", tensor("small/a/scale", np.transpose)),
    "array of another type": ("has type I8", tensor("small/a/codes", lambda codes: codes.view("int8"))),
    "array of half the size": ("has type F16", tensor("small/a/scale", lambda scale: scale.astype("float16"))),
    "codes that are none": ("the number 15 stands for no code", tensor("small/a/codes", lambda codes: codes | 0xF0)),
    "patterns that are none": (
        "word 0 is 8191",
        tensor("small/a/patterns", lambda words: np.r_[np.uint8([255, 255]), words[2:]]),
    ),
    "scale that is none": ("not a number of a magnitude", tensor("small/a/scale", lambda scale: scale * np.nan)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_contradicts_itself_is_refused_whatever_its_checksums(damage, packed):
    message, edit = DAMAGES[damage]
    changed(packed, edit)
    with pytest.raises(usm.PackedFileError, match=f"small.usm: .*({message})"):
        usm.load_packed(packed)


def test_values_of_right_form_and_checksum_are_another_file(packed):
    changed(packed, tensor("small/a/scale", lambda scale: scale * 2))
    old, new = small().get_layer("a"), usm.load_packed(packed).get_layer("a")
    np.testing.assert_array_equal(array(new.effective_kernel()), 2 * array(old.effective_kernel()))


def frame(size):
    return np.frombuffer(b"\0\0\0\0" + zstandard.ZstdCompressor().compress(bytes(size)), "uint8")


def codes(stream, **fields):
    """An edit that gives the layer of an archive other codes, which lie behind its mask, and changes its entry."""

    def edit(header, tensors):
        mask, old = header["streams"]
        tensors["arrays"] = np.r_[tensors["arrays"][:mask], stream, tensors["arrays"][mask + old :]]
        header["streams"] = [mask, stream.size]
        layer(**{"codes": "zstd", **fields})(header, tensors)

    return edit


def plane(number, *now):
    return lambda header, tensors: header["planes"].__setitem__(number, list(now))


def joined(change):
    return lambda header, tensors: tensors.update(arrays=change(tensors["arrays"]))


ARCHIVE_DAMAGES = {
    "a bomb": ("a Zstandard frame of 1000 bytes where 256 are needed", codes(frame(1000))),
    "a stream that is too good": ("of 1 bytes claims to stand for 128 bytes, m", codes(np.zeros(1, "uint8"))),
    "not a frame": ("Zstandard frame is damaged", codes(np.zeros(64, "uint8"))),
    "no table": ("a table of 30 bytes", codes(np.zeros(16, "uint8"), codes="range")),
    "an empty table": ("the table of frequencies is empty", codes(np.zeros(66, "uint8"), codes="range")),
    "a stream that is too short": ("cannot have 9 bytes; 128 w", codes(np.zeros(9, "uint8"), codes="bits")),
    "the array is not there": ("has one array, 'arrays'", lambda h, t: t.update(other=t.pop("arrays"))),
    "another array": ("has one array, 'arrays'", lambda h, t: t.update(extra=np.ones(2))),
    "array of another type": ("has type I8", joined(lambda all: all.view("int8"))),
    "array of another shape": ("expected U8 and one axis", joined(lambda all: all[None])),
    "array too short": ("do not add up", joined(lambda all: all[:-1])),
    "array too long": ("do not add up", joined(lambda all: np.r_[all, np.uint8([0])])),
    "no streams": ("the parts", without("streams")),
    "no planes": ("the parts", without("planes")),
    "streams too few": ("zip", lambda header, tensors: header["streams"].pop() and None),
    "planes too few": ("zip", lambda header, tensors: header["planes"].pop() and None),
    "a length below zero": ("cannot have -1 bytes", part(streams=[-1, 0])),
    "a length that is none": ("cannot have True bytes", part(streams=[True, 0])),
    "a plane of an unknown form": ("'byte 0 of float32' cannot be stored as 'bits'", plane(0, "bits", 258)),
    "a plane of another length": ("'byte 1 of float32' cannot have 5 bytes; 258 w", plane(1, "bytes", 5)),
    "a plane that is too good": ("'byte 1 of float32' of 4 bytes claims to stand for 258", plane(1, "zstd", 4)),
    "a plane that is no pair": ("unpack", plane(1, "bytes")),
    "a plane of another coder": ("range-coded", lambda h, t: h["planes"][0].__setitem__(0, "range")),
    "a layer too many": ("is described twice", lambda header, tensors: header["layers"].append(header["layers"][0])),
}


@pytest.mark.parametrize("damage", ARCHIVE_DAMAGES)
def test_an_archive_that_contradicts_itself_is_refused_whatever_its_checksums(damage, archive):
    message, edit = ARCHIVE_DAMAGES[damage]
    changed(archive, edit)
    with pytest.raises(usm.PackedFileError, match=f"small.usm: .*({message})"):
        usm.load_packed(archive)


def test_an_archive_of_version_2_is_read_as_ever():
    """Written when the arrays of archives had names too, from this model."""
    path = pathlib.Path(__file__).with_name("archive_of_version_2.usm")
    (entry,) = PackedReader(path).layers
    assert (entry.codes, entry.masks) == ("range", "range")
    old, draw = usm.load_packed(path), np.random.default_rng(0)
    layers = [keras.Input((64,)), usm.QuantDense(96, "int4", sparsity="2:4", name="a"), keras.layers.Dense(2, name="b")]
    model = keras.Sequential(layers, name="small")
    for weight in model.trainable_variables:
        weight.assign(draw.normal(size=weight.shape))
    kernel = model.get_layer("a").kernel
    kernel.assign(array(kernel) * np.tile([9, 6, 3, 1], 16)[:, None])
    usm.update_masks(model)
    found, expected = (array(kind.get_layer("a").quantized_kernel()[0]) for kind in (old, model))
    np.testing.assert_array_equal(found, expected)
    for found, expected in zip(old.get_layer("b").weights, model.get_layer("b").weights, strict=True):
        np.testing.assert_array_equal(array(found), array(expected))
    effective = [array(kind.get_layer("a").effective_kernel()) for kind in (old, model)]
    np.testing.assert_allclose(*effective, rtol=2.0**-11)  # float16 scales


def test_nothing_is_decoded_for_variables_that_the_model_does_not_have(archive):
    def edit(header, tensors):
        header["variables"].append({"name": "9", "shape": [64], "dtype": "float64", "stored": "float64"})
        header["planes"] += [["zstd", 1]] * 8  # no frames
        tensors["arrays"] = np.r_[tensors["arrays"], np.zeros(8, "uint8")]

    changed(archive, edit)
    with pytest.raises(usm.PackedFileError, match="describes 4 other variables, but its model has 3"):
        usm.load_packed(archive)


def test_an_archive_without_its_packages_says_what_to_install(archive, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"pip install constriction zstandard"):
        usm.load_packed(archive)


@pytest.mark.parametrize("config", [{"units": 10**12}, {"units": 10**6}])
def test_a_model_larger_than_its_file_is_refused_before_it_is_built(config, packed):
    def edit(header, tensors):
        for described in header["model"]["config"]["layers"]:
            if described["config"]["name"] == "b":
                described["config"].update(config)

    changed(packed, edit)
    with pytest.raises(usm.PackedFileError, match="variables or .* elements are created"):
        usm.load_packed(packed)
