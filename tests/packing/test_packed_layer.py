"""One layer as arrays and back: the same effective kernel, bit for bit, in the bytes the format promises."""

import dataclasses
import json
import zlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.core.quantize import code_range
from keras_usm_lite.layers.compressed_layer import CompressedLayer
from keras_usm_lite.packing.bits import packed_size
from keras_usm_lite.packing.packed_entry import PackedEntry
from keras_usm_lite.packing.packed_layer import pack_layer, unpack_layer
from keras_usm_lite.packing.patterns import pattern_table, patterns_size

CONFIGS = {
    "float": None,
    "int8": usm.QuantizationConfig(bits=8),
    "int8 full": usm.QuantizationConfig(bits=8, codebook="full"),
    "int4": usm.QuantizationConfig(bits=4),
    "int4 fake": usm.QuantizationConfig(bits=4, form="fake"),
    "int4 blocks": usm.QuantizationConfig(bits=4, form="fake", block_size=4),
    "int4 asymmetric": usm.QuantizationConfig(bits=4, codebook="asymmetric"),
    "int4 asymmetric mse": usm.QuantizationConfig(bits=4, codebook="asymmetric", scale="mse"),
    "int4 asymmetric blocks": usm.QuantizationConfig(bits=4, codebook="asymmetric", form="fake", block_size=4),
    "int3 learned": usm.QuantizationConfig(bits=3, scale="learned"),
    "int2 mse": usm.QuantizationConfig(bits=2, scale="mse"),
    "int2 full": usm.QuantizationConfig(bits=2, scale="mse", codebook="full"),
    "int2 midrise": usm.QuantizationConfig(bits=2, scale="mse", codebook="midrise"),
    "int4 midrise": usm.QuantizationConfig(bits=4, codebook="midrise"),
    "int2 per tensor": usm.QuantizationConfig(bits=2, scale="mse", per_tensor=True),
    "int1": usm.QuantizationConfig(bits=1),
}
SPARSITIES = [None, "2:4", "1:4", "4:8"]
X = np.random.default_rng(1).normal(size=(3, 16)).astype("float32")


def array(tensor):
    return ops.convert_to_numpy(tensor)


def bare(name, sparsity=None, inputs=16, units=5, seed=0):
    keras.utils.set_random_seed(seed)
    layer = usm.QuantDense(units, quantization=CONFIGS[name], sparsity=sparsity, name="layer")
    layer.build((None, inputs))
    return layer


def made(name, sparsity=None, **kwargs):
    layer = bare(name, sparsity, **kwargs)
    if sparsity is not None:
        layer.update_mask()
    return layer


def through_json(entry):
    return PackedEntry(**json.loads(json.dumps(dataclasses.asdict(entry))))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_effective_kernel_comes_back_bit_for_bit_from_the_arrays_that_the_description_demands(name, sparsity):
    layer, other = made(name, sparsity), bare(name, sparsity, seed=7)
    entry, arrays = pack_layer(layer, "layer")
    assert {key: (value.dtype.name, value.shape) for key, value in arrays.items()} == entry.arrays()
    unpack_layer(other, through_json(entry), arrays)
    np.testing.assert_array_equal(array(other.effective_kernel()), array(layer.effective_kernel()))
    np.testing.assert_array_equal(array(other(X)), array(layer(X)))  # the biases are zero
    if name != "float":
        for new, old in zip(other.quantized_kernel(), layer.quantized_kernel(), strict=True):
            np.testing.assert_array_equal(array(new), array(old))
    if sparsity is not None:
        np.testing.assert_array_equal(array(other.mask), array(layer.mask))
    again, arrays_again = pack_layer(other, "layer")
    assert again == entry
    assert {key: value.tobytes() for key, value in arrays_again.items()} == {k: v.tobytes() for k, v in arrays.items()}


@pytest.mark.parametrize("form", [{"archive": True}, {"masks": "positions"}])
@pytest.mark.parametrize("name", ["float", "int8", "int4 asymmetric blocks", "int2 midrise", "int1"])
def test_other_forms_of_codes_and_masks_change_nothing(name, form):
    layer, other = (bare(name, "2:4", inputs=256, units=64, seed=seed) for seed in (0, 7))
    layer.kernel.assign(array(layer.kernel) * np.tile([1, 0.6, 0.3, 0.1], 64)[:, None])  # some patterns are rare
    layer.update_mask()
    entry, arrays = pack_layer(layer, "layer", **form)
    assert entry.masks in ("range", "zstd", "positions")
    unpack_layer(other, through_json(entry), arrays)
    np.testing.assert_array_equal(array(other.effective_kernel()), array(layer.effective_kernel()))


@pytest.mark.parametrize(("scales", "bound"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
@pytest.mark.parametrize("name", ["int8", "int4 asymmetric", "int2 mse"])
def test_rounded_scales_move_every_weight_by_no_more_than_their_bound(name, scales, bound):
    layer, other = made(name, "2:4", inputs=64), bare(name, "2:4", inputs=64, seed=7)
    entry, arrays = pack_layer(layer, "layer", scales=scales)
    assert arrays["scale"].dtype.name == entry.scales == scales
    unpack_layer(other, entry, arrays)
    exact, rounded = (array(kernel.effective_kernel()).astype("float64") for kernel in (layer, other))
    assert np.all(np.abs(rounded - exact) <= bound * (1 + 2.0**-20) * np.abs(exact))  # the products are float32
    np.testing.assert_array_equal(array(other.quantized_kernel()[0]), array(layer.quantized_kernel()[0]))
    assert np.any(rounded != exact)


def test_float_values_are_int8_with_a_scale_for_each_output():
    layer, other = made("float", "2:4", inputs=64), bare("float", "2:4", inputs=64, seed=7)
    entry, arrays = pack_layer(layer, "layer", others="int8")
    assert (entry.values, arrays["values"].shape, arrays["values.row_scale"].shape) == ("int8", (5, 32), (5,))
    unpack_layer(other, through_json(entry), arrays)
    exact, rounded = array(layer.effective_kernel()), array(other.effective_kernel())
    assert np.all(np.abs(rounded - exact) <= np.abs(exact).max(axis=0) / 254 * (1 + 2.0**-16))


def test_a_kernel_that_is_not_a_matrix_comes_back_in_its_own_shape():
    def convolution(seed):
        keras.utils.set_random_seed(seed)
        layer = CompressedLayer(keras.layers.Conv1D(6, 3), "int4", "2:4")
        layer.build((None, 20, 8))
        return layer

    layer, other = convolution(0), convolution(7)
    layer.update_mask()
    entry, arrays = pack_layer(layer, "layer")
    assert (entry.rows, entry.columns) == (24, 6)
    unpack_layer(other, entry, arrays)
    x = np.random.default_rng(0).normal(size=(2, 20, 8)).astype("float32")
    np.testing.assert_array_equal(array(other(x)), array(layer(x)))


@pytest.mark.parametrize("name", ["int8", "int4", "int3 learned", "int2 full", "int1"])
def test_codes_are_shifted_to_zero_and_listed_output_by_output(name):
    layer = made(name, "1:4")
    entry, arrays = pack_layer(layer, "layer")
    codes, mask = array(layer.quantized_kernel()[0]).astype(int), array(layer.mask) == 1
    lowest, highest = code_range(entry.bits, entry.codebook)
    step = 2 if name == "int1" else 1
    stream = np.unpackbits(arrays["codes"], bitorder="little")
    position = 0
    for column in range(codes.shape[1]):
        for code in codes[:, column][mask[:, column]]:
            field = stream[position : position + entry.bits] @ 2 ** np.arange(entry.bits)
            assert lowest <= code <= highest and field == (code - lowest) // step
            position += entry.bits
    assert len(stream) - position < 8 and not stream[position:].any()


def test_float_values_are_the_survivors_output_by_output():
    layer = made("float", "2:4")
    _, arrays = pack_layer(layer, "layer")
    kernel, mask = array(layer.kernel), array(layer.mask) == 1
    expected = [kernel[:, c][mask[:, c]] for c in range(kernel.shape[1])]
    np.testing.assert_array_equal(arrays["values"], expected)


def test_patterns_are_indices_into_the_table_of_patterns():
    layer = made("int4", "1:4", inputs=8, units=3)
    _, arrays = pack_layer(layer, "layer")
    groups = array(layer.mask).T.reshape(-1, 4) == 1  # output after output, each from top to bottom
    stream = np.unpackbits(arrays["patterns"], bitorder="little")
    for number, group in enumerate(groups):  # 1:4 has 4 patterns, so 2 bits each
        np.testing.assert_array_equal(pattern_table(1, 4)[stream[2 * number] + 2 * stream[2 * number + 1]], group)


def test_the_sizes_are_those_of_the_formulas():
    _, arrays = pack_layer(made("int3 learned", "4:8", inputs=32, units=7), "layer")
    assert arrays["codes"].nbytes == packed_size(16 * 7, 3) == 42
    assert arrays["patterns"].nbytes == patterns_size(32, 7, 4, 8) == -(-6 * 31 // 8)  # 28 groups: 6 words of 31 bits
    assert arrays["scale"].nbytes == 4 * 7


def test_the_latent_weights_are_not_needed():
    layer = made("int4", "2:4")
    entry, arrays = pack_layer(layer, "layer")
    layer.kernel.assign(array(layer.kernel) * np.where(array(layer.mask) == 1, 1.0, 0.123))  # pruned ones change
    again, arrays_again = pack_layer(layer, "layer")
    assert again == entry
    for key, value in arrays.items():
        np.testing.assert_array_equal(arrays_again[key], value)


def test_the_scale_of_a_loaded_layer_is_frozen():
    layer, other = made("int4"), bare("int4", seed=7)
    unpack_layer(other, *pack_layer(layer, "layer"))
    assert float(array(other.scale_frozen)) == 1
    other.kernel.assign(array(other.kernel) * 3)
    np.testing.assert_array_equal(array(other.quantized_kernel()[1]), array(layer.quantized_kernel()[1]))


def test_a_schedule_that_stopped_above_the_configured_bits_is_packed_at_those_bits():
    layer, other = made("int2 mse", "2:4"), bare("int2 mse", "2:4", seed=7)
    layer.bits.assign(8)
    layer.update_scale()
    entry, arrays = pack_layer(layer, "layer")
    assert entry.bits == 8
    unpack_layer(other, entry, arrays)
    assert other.active_bits == 8
    np.testing.assert_array_equal(array(other.effective_kernel()), array(layer.effective_kernel()))


def test_a_mask_that_is_not_made_yet_is_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"'encoder/up'.*does not obey 2:4 yet.*usm\.update_masks\(model\)"):
        pack_layer(bare("int4", "2:4"), "encoder/up")


def test_a_mask_that_still_fades_is_refused():
    layer = made("int4", "2:4")
    layer.mask_fade.assign(0.5)
    with pytest.raises(ValueError, match="'encoder/up'.*still fading out"):
        pack_layer(layer, "encoder/up")


def test_a_float_warm_up_is_refused():
    layer = made("int4")
    layer.bits.assign(24)
    with pytest.raises(ValueError, match="no integer codes.*24.*finish the bit schedule"):
        pack_layer(layer, "layer")


def test_a_damaged_stream_is_noticed():
    entry, arrays = pack_layer(made("int4", "4:8"), "layer")
    for key in ("codes", "patterns"):
        with pytest.raises(ValueError, match="uint8 array of shape"):
            unpack_layer(bare("int4", "4:8"), entry, {**arrays, key: arrays[key][:-1]})
    with pytest.raises(ValueError, match="damaged"):
        unpack_layer(bare("int4", "4:8"), entry, {**arrays, "patterns": np.full_like(arrays["patterns"], 255)})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scale", np.nan, "not a number of a magnitude"),
        ("scale", 0.0, "not a number of a magnitude"),
        ("zero_point", 0.5, "not a whole number"),
        ("zero_point", 200.0, "not a whole number from -128 to 127"),
        ("zero_point", np.nan, "not a whole number"),
    ],
)
def test_scales_and_zero_points_that_cannot_be_are_refused(key, value, message):
    entry, arrays = pack_layer(made("int4 asymmetric"), "layer")
    with pytest.raises(ValueError, match=message):
        unpack_layer(bare("int4 asymmetric"), entry, {**arrays, key: np.full_like(arrays[key], value)})


def test_a_scale_that_does_not_fit_is_refused_with_the_name_of_the_layer():
    layer = made("int8")
    layer.kernel.assign(array(layer.kernel) * 1e-4)
    with pytest.raises(ValueError, match="Layer 'encoder/up': scale .* float16.*Choose scales='bfloat16'"):
        pack_layer(layer, "encoder/up", scales="float16")
    assert pack_layer(layer, "encoder/up", scales="bfloat16")


def test_the_bytes_are_those_of_the_worked_example_in_the_format_description():
    layer = usm.QuantDense(1, "int4", sparsity="2:4", use_bias=False)
    layer.build((None, 4))
    layer.kernel.assign(np.array([[0.75], [-0.25], [0.5], [0.125]], "float32"))
    layer.update_mask()
    entry, arrays = pack_layer(layer, "example/tiny")
    fields = {key: value for key, value in dataclasses.asdict(entry).items() if value is not None}
    assert fields == {
        "name": "example/tiny", "rows": 4, "columns": 1, "bits": 4, "codebook": "symmetric", "scale_shape": (1, 1),
        "n": 2, "m": 4, "codes": "bits", "masks": "enumerative", "scales": "float32",
    }  # fmt: skip
    hexadecimal = {key: value.tobytes().hex(" ") for key, value in arrays.items()}
    assert hexadecimal == {"codes": "ce", "patterns": "01 00", "scale": "b7 6d db 3d"}
    assert [zlib.crc32(arrays[key]) for key in sorted(arrays)] == [2933784634, 1489118142, 3679101321]
