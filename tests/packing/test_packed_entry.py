"""The description of a layer: what it demands, and that nothing else passes."""

import dataclasses
import math

import pytest

from keras_usm_lite.packing.packed_entry import PackedEntry

SPARSE = {
    "name": "a/b", "rows": 16, "columns": 6, "bits": 4, "codebook": "symmetric", "scale_shape": [1, 6], "n": 2, "m": 4,
    "codes": "bits", "masks": "enumerative", "scales": "float32",
}  # fmt: skip
FLOAT = {"name": "a", "rows": 16, "columns": 6, "bits": 32, "values": "float32"}


def test_the_arrays_of_a_sparse_quantized_layer():
    entry = PackedEntry(**SPARSE)
    assert entry.arrays() == {
        "patterns": ("uint8", (math.ceil(math.ceil(24 / 5) * 13 / 8),)),
        "codes": ("uint8", (8 * 6 // 2,)),
        "scale": ("float32", (1, 6)),
    }
    assert (entry.kept_rows, entry.alphabet, entry.grid, entry.groups, entry.patterns) == (8, 15, (-7, 1), 24, 6)


def test_the_arrays_of_other_forms():
    other = {**SPARSE, "masks": "positions", "codes": "range", "scales": "bfloat16", "codebook": "asymmetric"}
    assert PackedEntry(**other).arrays() == {
        "positions": ("uint8", (8 * 6 * 2 // 8,)),
        "codes": ("uint8", None),
        "scale": ("bfloat16", (1, 6)),
        "zero_point": ("float32", (1, 6)),
    }
    assert PackedEntry(**{**SPARSE, "masks": "zstd"}).arrays()["patterns"] == ("uint8", None)
    assert PackedEntry(**FLOAT).arrays() == {"values": ("float32", (6, 16))}
    assert PackedEntry(**{**FLOAT, "values": "int8"}).arrays() == {
        "values": ("int8", (6, 16)),
        "values.row_scale": ("float32", (6,)),
    }


@pytest.mark.parametrize(
    ("codebook", "bits", "alphabet", "grid"),
    [
        ("symmetric", 2, 3, (-1, 1)),
        ("full", 2, 4, (-2, 1)),
        ("asymmetric", 8, 256, (-128, 1)),
        ("midrise", 2, 4, (-3, 2)),
    ],
)
def test_the_codes_of_each_codebook(codebook, bits, alphabet, grid):
    entry = PackedEntry(**{**SPARSE, "codebook": codebook, "bits": bits})
    assert (entry.alphabet, entry.grid) == (alphabet, grid)


def test_the_elements_are_those_of_the_variables():
    assert PackedEntry(**SPARSE).elements == 2 * 16 * 6 + 3 * 6 + 3
    assert PackedEntry(**FLOAT).elements == 16 * 6 + 3


def test_an_entry_comes_back_from_its_fields():
    entry = PackedEntry(**SPARSE)
    assert PackedEntry(**dataclasses.asdict(entry)) == entry


WRONG = {
    "name": [None, 3], "rows": [0, -4, 15, 16.0, "16", True, None, 10**30 + 1], "columns": [0, 5, 6.0, "6", [6]],
    "bits": [0, 9, 32, 33, 4.0, "4", True, None], "codebook": ["other", None, 1, ["symmetric"]],
    "scale_shape": [None, 6, [6], [1, 6, 1], [3, 6], [1, 5], [0, 6], [1, 0], [1.0, 6], "16", {"1": 1, "6": 6}],
    "n": [0, 4, 5, -1, 2.0, "2", True], "m": [None, 1, 3, 32, 4.0, "4", -4], "codes": [None, "plain", 1, "enumerative"],
    "masks": [None, "bits", 0, ["positions"]], "scales": [None, "float64", "int8", 16], "values": ["float32", 0],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_field_that_cannot_be_is_refused(field, value):
    with pytest.raises((ValueError, TypeError)):
        PackedEntry(**{**SPARSE, field: value})


@pytest.mark.parametrize(
    "change",
    [{"values": None}, {"values": "bfloat16"}, {"codes": "bits"}, {"codebook": "full"}, {"scale_shape": [1, 6]},
     {"scales": "float32"}, {"m": 4}, {"masks": "enumerative"}, {"n": 2}, {"n": 2, "m": 4}, {"extra": 1}],
)  # fmt: skip
def test_a_float_entry_with_a_wrong_field_is_refused(change):
    with pytest.raises((ValueError, TypeError)):
        PackedEntry(**{**FLOAT, **change})


def test_codes_that_int8_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="bits=8"):
        PackedEntry(**{**SPARSE, "codebook": "midrise", "bits": 8})


def test_the_message_names_the_layer_the_field_and_its_value():
    with pytest.raises(ValueError, match="layer 'a/b' cannot have rows=0 in .*columns=6"):
        PackedEntry(**{**SPARSE, "rows": 0})
