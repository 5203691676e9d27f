"""The description of a variable: what it demands, and that nothing else passes."""

import pytest

from keras_usm_lite.packing.packed_variable import PackedVariable


@pytest.mark.parametrize(
    ("dtype", "stored", "arrays"),
    [
        ("float32", "float32", {"": ("float32", (3, 4))}),
        ("float32", "float16", {"": ("float16", (3, 4))}),
        ("float32", "int8", {"": ("int8", (3, 4)), ".row_scale": ("float32", (3,))}),
        ("int8", "int8", {"": ("int8", (3, 4))}),
        ("bfloat16", "bfloat16", {"": ("bfloat16", (3, 4))}),
    ],
)
def test_the_arrays_follow_from_the_types(dtype, stored, arrays):
    variable = PackedVariable("a/kernel", [3, 4], dtype, stored)
    assert variable.arrays() == arrays
    assert variable.elements == 12


def test_a_vector_in_int8_has_one_scale():
    vector = PackedVariable("a/bias", [4], "float32", "int8")
    assert vector.arrays() == {"": ("int8", (4,)), ".row_scale": ("float32", (1,))}


def test_a_scalar_is_one_element():
    assert PackedVariable("count", [], "int32", "int32").elements == 1


@pytest.mark.parametrize(
    "fields",
    [
        (3, [3], "float32", "float32"),
        ("a", 3, "float32", "float32"),
        ("a", "3", "float32", "float32"),
        ("a", [-3], "float32", "float32"),
        ("a", [3.0], "float32", "float32"),
        ("a", [True], "float32", "float32"),
        ("a", [2**63], "float32", "float32"),
        ("a", [9] * 10**6, "float32", "float32"),
        ("a", [3], "complex64", "complex64"),
        ("a", [3], "float64", "float32"),
        ("a", [3], "int32", "int8"),
        ("a", [3], "float32", "bfloat16"),
        ("a", [], "float32", "int8"),
        ("a", [3], None, None),
        ("a", [3], ["float32"], "float32"),
    ],
)
def test_a_field_that_cannot_be_is_refused(fields):
    with pytest.raises((ValueError, TypeError)):
        PackedVariable(*fields)
