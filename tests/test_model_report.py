"""The report: every number of a small model by hand."""

import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm


def array(tensor):
    return ops.convert_to_numpy(tensor)


def one(quantization, sparsity, inputs=64, units=8, **kwargs):
    keras.utils.set_random_seed(0)
    layer = usm.QuantDense(units, quantization, sparsity=sparsity, use_bias=False, name="only", **kwargs)
    model = keras.Sequential([keras.Input((inputs,)), layer], name="model")
    usm.update_masks(model)
    return model


def two():
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((8,)),
        usm.QuantDense(4, "int4", sparsity="2:4", name="small"),
        keras.layers.Dense(3, name="big"),
    ]
    model = keras.Sequential(layers, name="two")
    usm.update_masks(model)
    return model


def test_the_bytes_of_a_small_model_are_those_computed_by_hand():
    table = usm.report(two())
    codes, scales = 16 * 4, 4 * 32  # bits: 8 x 4 weights, half of them kept; one float32 scale per output
    masks, positions = 8 * math.log2(6), 16 * 2  # 8 groups of 6 patterns; 2 bits for each kept weight
    rest = 32 * (12 + 4 + 3)  # the kernel of Dense and both biases
    assert table.weights == 32 + 12 + 7
    assert table.float32_bytes == 4 * 51
    assert table.bytes == pytest.approx((codes + masks + scales + rest) / 8)
    assert table.position_list_bytes == pytest.approx((codes + positions + rest) / 8)
    assert table.compressed_share == pytest.approx(32 / 51)
    assert table.kernel_bits_per_weight == pytest.approx((codes + masks + scales) / 32)


def test_the_rows_say_what_was_done_to_each_layer():
    small, big, rest = usm.report(two()).rows
    assert (small.path, small.kind, small.weights) == ("two/small", "QuantDense", 32)
    assert (small.quantization, small.sparsity, small.compressed) == ("int4", "2:4", True)
    assert (big.path, big.weights, big.quantization, big.sparsity, big.compressed) == ("two/big", 12, None, None, False)
    assert (rest.weights, rest.bits_per_weight) == (7, 32)


def test_four_bits_and_two_of_four_take_three_thirty_seconds_by_the_papers_accounting():
    table = usm.report(one("int4", "2:4"))
    assert table.position_list_bytes / table.float32_bytes == 3 / 32


@pytest.mark.parametrize(
    ("quantization", "sparsity", "bits", "positions"),
    [
        ("int8", None, 8 + 32 / 64, 8),
        ("int4", "2:4", 4 / 2 + math.log2(6) / 4 + 32 / 64, 4 / 2 + 1),
        ("int2", "1:4", 2 / 4 + 2 / 4 + 32 / 64, 2 / 4 + 2 / 4),
        ("int1", "4:8", 1 / 2 + math.log2(70) / 8 + 32 / 64, 1 / 2 + 3 / 2),
        (None, "2:4", 32 / 2 + math.log2(6) / 4, 32 / 2 + 1),
        (usm.QuantizationConfig(bits=4, codebook="asymmetric"), None, 4 + 2 * 32 / 64, 4),
        (usm.QuantizationConfig(bits=4, per_tensor=True), None, 4 + 32 / 512, 4),
        (usm.QuantizationConfig(bits=4, form="fake", block_size=16), None, 4 + 32 / 16, 4),
        (usm.QuantizationConfig(bits=3, scale="learned"), None, 3 + 32 / 64, 3),
    ],
)
def test_bits_per_weight_are_the_formulas(quantization, sparsity, bits, positions):
    (row,) = usm.report(one(quantization, sparsity)).rows
    assert row.bits_per_weight == pytest.approx(bits)
    assert row.position_list_bits == pytest.approx(positions)


def test_bits_in_force_count_not_the_configured_ones():
    model = one("int2", None)
    model.layers[0].bits.assign(8)
    (row,) = usm.report(model).rows
    assert row.quantization == "int8" and row.bits_per_weight == 8 + 32 / 64


def test_a_float_warm_up_is_called_so_and_counts_as_float():
    model = one("int2", "2:4")
    model.layers[0].bits.assign(24)
    (row,) = usm.report(model).rows
    assert (row.quantization, row.compressed) == ("float", True)
    assert row.bits_per_weight == pytest.approx(32 / 2 + math.log2(6) / 4)
    assert row.archive_bits == pytest.approx(row.bits_per_weight, rel=0.01)


@pytest.mark.parametrize(
    ("quantization", "sparsity"), [("int4", "2:4"), ("int2", None), ("int3", "1:4"), ("int8", "4:8")]
)
def test_the_archive_has_the_size_that_is_estimated(quantization, sparsity, tmp_path):
    model = one(quantization, sparsity, inputs=512, units=256)
    size = usm.save_packed(model, tmp_path / "model.usm", archive=True).stat().st_size
    estimate = usm.report(model).archive_bytes
    assert 0 < size - estimate < 700 + 0.01 * estimate  # a container and tables


def test_non_zeros_are_counted_in_the_effective_kernel():
    model = one("int2", "2:4")
    (row,) = usm.report(model).rows
    assert row.non_zero == np.mean(array(model.layers[0].effective_kernel()) != 0)
    assert 0 < row.non_zero < 0.5  # ternary codes round some survivors to zero, too


def test_nothing_is_compressed_in_a_float_model():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="a"), keras.layers.BatchNormalization()])
    table = usm.report(model)
    assert table.weights == model.count_params()
    assert table.bytes == table.position_list_bytes == table.float32_bytes == 4 * model.count_params()
    assert table.compressed_share == table.kernel_bits_per_weight == 0
    assert "not compressed" in str(table)


def test_every_weight_of_a_recogniser_is_counted_once_in_model_order():
    size = {"num_layers": 2, "dim": 8, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": 8}
    plain = usm.USMForCTC(5, name="usm", **size)
    small = usm.compress(plain, {"depthwise": (None, None), "block_1|head": ("int4", "2:4")})
    table = usm.report(small)
    assert table.weights == usm.report(plain).weights == plain.count_params()
    assert [row.path for row in table.rows] == [row.path for row in usm.report(plain).rows]
    assert sum(row.compressed for row in table.rows) == len(usm.compressed_layers(small))


def test_a_weight_of_another_layer_may_have_the_name_of_a_state_of_ours():
    class Gated(keras.layers.Layer):
        def build(self, input_shape):
            self.mask = self.add_weight(name="mask", shape=(input_shape[-1], 2))
            self.bits = self.add_weight(name="bits", shape=(3,))

        def call(self, x):
            return ops.matmul(x, self.mask)

    model = keras.Sequential([keras.Input((8,)), Gated()])
    assert usm.report(model).weights == 8 * 2 + 3


def test_a_shared_layer_is_counted_once():
    inputs = keras.Input((8,))
    layer = usm.QuantDense(8, "int4", use_bias=False)
    assert usm.report(keras.Model(inputs, layer(layer(inputs)))).weights == 64


def test_the_printed_table_names_every_layer_and_the_totals():
    table = usm.report(two())
    text = str(table)
    for row in table.rows:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{row.path} ")]
        assert f"{row.bits_per_weight:.3f}" in line
    assert "int4" in text and "2:4" in text
    assert f"{table.float32_bytes:,} bytes" in text
    assert f"{table.bytes:,.0f} bytes" in text
    assert "not compressed: two/big, (biases and norms)" in text


def test_sizes_that_wait_for_a_mask_are_marked():
    model = keras.Sequential([keras.Input((16,)), usm.QuantDense(8, "int4", sparsity="2:4", name="late")], name="model")
    assert "masks not made yet, sizes as if they were: model/late" in str(usm.report(model))
    usm.update_masks(model)
    assert "not made yet" not in str(usm.report(model))


def test_a_model_without_weights_has_a_report_too():
    assert "weights 0," in str(usm.report(keras.Sequential([keras.Input((8,)), keras.layers.ReLU()])))


def test_a_model_that_is_not_built_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="'bare' is not built.*Call it on a batch"):
        usm.report(keras.Sequential([usm.QuantDense(2)], name="bare"))


def test_of_a_distiller_the_student_is_described():
    teacher = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    student = usm.compress(teacher, {"dense": ("int4", None)})
    assert usm.report(usm.Distiller(student, teacher)) == usm.report(student)
