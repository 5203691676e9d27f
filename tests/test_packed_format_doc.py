"""docs/packed_format.md: what the page says of the example is what `save_packed` writes."""

import json
import pathlib
import re
import zlib

import keras
import numpy as np
import pytest
from keras import ops
from safetensors import safe_open

import keras_usm_lite as usm
from keras_usm_lite.packing.packed_reader import VERSION_JOINED, VERSION_NAMED
from keras_usm_lite.packing.patterns import enumerative_bits, pattern_table, word_layout
from keras_usm_lite.packing.positions import position_list_bits

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "packed_format.md").read_text()
EXAMPLE = PAGE[PAGE.index("## Worked example") :]


def block(kind):
    return re.search(rf"```{kind}\n(.*?)```", EXAMPLE, re.DOTALL)[1]


def written(path):
    with safe_open(path, "numpy") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    return metadata, tensors, json.loads(zlib.decompress(tensors.pop("description").tobytes()))


def tables():
    """`{array: (hexadecimal bytes, CRC-32)}` for both tables of the example."""
    rows = r"\| `(example/tiny/\w+)` \| `([0-9a-f ]+)` \| (\d+) \|"
    first, second = EXAMPLE.split('With `masks="positions"')
    return [{name: (data, int(crc)) for name, data, crc in re.findall(rows, part)} for part in (first, second)]


@pytest.fixture
def example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block("python"), names)  # the code of the page itself
    return names["model"]


def contents(tensors):
    return {name: (array.tobytes().hex(" "), zlib.crc32(array.tobytes())) for name, array in tensors.items()}


def test_the_bytes_and_checksums_of_the_page_are_those_of_its_code(example, tmp_path):
    metadata, tensors, parts = written("example.usm")
    plain, reduced = tables()
    assert len(plain) == 3 and contents(tensors) == plain
    assert {key: parts[key] for key in ("layers", "variables", "crc32")} == json.loads(block("json"))
    assert keras.saving.deserialize_keras_object(parts["model"]).name == "example"
    with safe_open("example.usm", "numpy") as file:
        crc = zlib.crc32(file.get_tensor("description").tobytes())
    assert metadata == {"keras_usm_lite.packed": f"{VERSION_NAMED} {crc}"}
    assert f"# The packed file, versions {VERSION_NAMED} and {VERSION_JOINED}\n" in PAGE
    _, tensors, _ = written(usm.save_packed(example, tmp_path / "b.usm", masks="positions", scales="bfloat16"))
    assert len(reduced) == 2 and reduced.items() <= contents(tensors).items()


def test_the_archive_of_the_example_has_one_array_and_the_parts_that_the_page_lists(example, tmp_path):
    metadata, tensors, parts = written(usm.save_packed(example, tmp_path / "a.usm", archive=True))
    assert metadata["keras_usm_lite.packed"].startswith(f"{VERSION_JOINED} ") and list(tensors) == ["arrays"]
    plain, _ = tables()
    patterns, codes, scale = (plain[f"example/tiny/{key}"][0] for key in ("patterns", "codes", "scale"))
    assert tensors["arrays"].tobytes().hex(" ") == f"{patterns} {codes} {scale}"  # of one number: planes are its bytes
    assert sorted(parts) == ["crc32", "layers", "model", "planes", "streams", "variables"]
    assert (parts["streams"], parts["planes"]) == ([2, 1], [["bytes", 1]] * 4)


def test_the_example_reads_back_as_the_page_says(example):
    (layer,) = usm.compressed_layers(usm.load_packed("example.usm"))
    kernel = ops.convert_to_numpy(layer.effective_kernel()).ravel()
    np.testing.assert_array_equal(kernel, np.float32([0.75, 0, 0.53571427, 0]))


def test_the_table_of_patterns_is_what_the_code_computes():
    rows = re.findall(r"\| (\d+):(\d+) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", PAGE)
    assert len(rows) == 3
    for n, m, patterns, groups, bits, *sizes in rows:
        n, m = int(n), int(m)
        assert (len(pattern_table(n, m)), *word_layout(n, m)) == (int(patterns), int(groups), int(bits))
        exact = int(bits) / int(groups) / m, enumerative_bits(n, m), position_list_bits(n, m)
        assert [float(size) for size in sizes] == [round(size, 3) for size in exact]
