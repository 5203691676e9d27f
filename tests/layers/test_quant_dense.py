"""QuantDense: what it multiplies by, what it learns, and that it is a normal Keras layer."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.testing import TestCase

import keras_usm_lite as usm
from keras_usm_lite.core.nm_mask import nm_mask, nm_violations
from keras_usm_lite.core.quantize import dequantize

CONFIGS = {
    "int8": usm.QuantizationConfig(bits=8),
    "int4": usm.QuantizationConfig(bits=4),
    "int4 fake": usm.QuantizationConfig(bits=4, form="fake"),
    "int4 blocks": usm.QuantizationConfig(bits=4, form="fake", block_size=4),
    "int4 asymmetric": usm.QuantizationConfig(bits=4, codebook="asymmetric"),
    "int4 asymmetric mse": usm.QuantizationConfig(bits=4, codebook="asymmetric", scale="mse"),
    "int3 learned": usm.QuantizationConfig(bits=3, scale="learned"),
    "int2 mse": usm.QuantizationConfig(bits=2, scale="mse"),
    "int2 full": usm.QuantizationConfig(bits=2, scale="mse", codebook="full"),
    "int2 midrise": usm.QuantizationConfig(bits=2, scale="mse", codebook="midrise"),
    "int2 per tensor": usm.QuantizationConfig(bits=2, scale="mse", per_tensor=True),
    "int1": usm.QuantizationConfig(bits=1),
}


def array(tensor):
    return ops.convert_to_numpy(tensor)


def built(quantization, sparsity=None, inputs=16, units=6, seed=0):
    keras.utils.set_random_seed(seed)
    layer = usm.QuantDense(units, quantization=quantization, sparsity=sparsity)
    layer.build((None, inputs))
    if sparsity:
        layer.update_mask()
    return layer


class LayerContract(TestCase):
    def test_quant_dense_keeps_every_promise_of_a_keras_layer(self):
        self.run_layer_test(
            usm.QuantDense,
            init_kwargs={"units": 5, "quantization": "int4", "sparsity": "2:4", "activation": "relu"},
            input_shape=(3, 8),
            expected_output_shape=(3, 5),
            expected_num_trainable_weights=2,
            expected_num_non_trainable_weights=5,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=True,
        )

    def test_quant_dense_without_compression_keeps_every_promise(self):
        self.run_layer_test(
            usm.QuantDense,
            init_kwargs={"units": 5, "quantization": None, "use_bias": False},
            input_shape=(2, 7, 8),
            expected_output_shape=(2, 7, 5),
            expected_num_trainable_weights=1,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=True,
        )


@pytest.mark.parametrize("sparsity", [None, "2:4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_effective_kernel_is_the_dequantized_integer_kernel_bit_for_bit(name, sparsity):
    layer = built(CONFIGS[name], sparsity)
    np.testing.assert_array_equal(array(dequantize(*layer.quantized_kernel())), array(layer.effective_kernel()))


@pytest.mark.parametrize("name", CONFIGS)
def test_sparse_effective_kernel_obeys_the_pattern(name):
    layer = built(CONFIGS[name], "1:4")
    assert int(nm_violations(layer.effective_kernel(), 1, 4)) == 0
    assert np.all(array(layer.effective_kernel())[array(layer.mask) == 0] == 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_forward_pass_multiplies_by_the_effective_kernel(name):
    layer = built(CONFIGS[name], "2:4")
    x = np.random.default_rng(0).normal(size=(4, 16)).astype("float32")
    expected = x @ array(layer.effective_kernel()) + array(layer.bias)
    np.testing.assert_allclose(array(layer(x)), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_fit_their_bits(name):
    layer = built(CONFIGS[name], "2:4")
    codes = array(layer.quantized_kernel()[0])
    assert codes.dtype == np.int8
    kept = codes[array(layer.mask) == 1]
    assert len(np.unique(kept)) <= 2 ** CONFIGS[name].bits


def test_save_and_reload_is_bit_for_bit(tmp_path):
    for name, config in CONFIGS.items():
        model = keras.Sequential([keras.Input((16,)), built(config, "2:4")])
        path = tmp_path / f"{name.replace(' ', '_')}.keras"
        model.save(path)
        reloaded = keras.models.load_model(path)
        np.testing.assert_array_equal(
            array(reloaded.layers[0].effective_kernel()),
            array(model.layers[0].effective_kernel()),
            err_msg=name,
        )


def gradients(layer, x, rate=0.1):
    """d sum(y * weights) / d (trainable variables) through one real training step of plain SGD."""
    model = keras.Sequential([keras.Input((x.shape[1],)), layer])
    before = [array(v) for v in model.trainable_variables]
    model.compile(keras.optimizers.SGD(rate), loss=lambda y_true, y_pred: ops.sum(y_true * y_pred, axis=-1))
    target = np.random.default_rng(5).normal(size=(len(x), layer.units)).astype("float32")
    model.train_on_batch(x, target)
    after = [array(v) for v in model.trainable_variables]
    return target / len(x), [(b - a) / rate for b, a in zip(before, after, strict=True)]


def test_gradient_of_the_kernel_is_straight_through_with_a_stopped_scale():
    layer = built(usm.QuantizationConfig(bits=4, stop_scale_gradient=True))
    x = np.random.default_rng(1).normal(size=(8, 16)).astype("float32")
    upstream, (kernel_gradient, bias_gradient) = gradients(layer, x)
    np.testing.assert_allclose(kernel_gradient, x.T @ upstream, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias_gradient, upstream.sum(axis=0), rtol=1e-4, atol=1e-5)


SHARED = {"channel": ({}, (1, 6)), "tensor": ({"per_tensor": True}, (1, 1)), "block": ({"block_size": 4}, (4, 6))}


@pytest.mark.parametrize("shared", SHARED)
def test_learned_scale_receives_the_lsq_gradient(shared):
    options, shape = SHARED[shared]
    layer = built(usm.QuantizationConfig(bits=2, scale="learned", form="fake", **options))
    kernel, scale = array(layer.kernel), array(layer.kernel_scale)
    assert scale.shape == shape
    scale = np.broadcast_to(scale.repeat(16 // shape[0], axis=0), (16, 6))
    x = np.random.default_rng(1).normal(size=(8, 16)).astype("float32")
    ratio = kernel / scale
    inside = np.abs(ratio) <= 1
    codes = np.clip(np.floor(ratio + 0.5), -1, 1)
    upstream, (kernel_gradient, _, scale_gradient) = gradients(layer, x)
    plain = x.T @ upstream
    np.testing.assert_allclose(kernel_gradient, plain * inside, rtol=1e-4, atol=1e-5)
    expected = (plain * np.where(inside, codes - ratio, codes)).reshape(shape[0], -1, shape[1], 6 // shape[1])
    number = expected.shape[1] * expected.shape[3]  # of weights that share a scale; the highest code is 1
    expected = expected.sum(axis=(1, 3)) / np.sqrt(number * 1)
    np.testing.assert_allclose(scale_gradient, expected, rtol=1e-3, atol=1e-4)


def test_adam_moves_a_learned_scale_by_as_many_per_cent_as_its_rate_and_never_to_zero():
    layer = built(usm.QuantizationConfig(bits=4, scale="learned"))
    layer.assign_matrix(array(layer.kernel) * np.logspace(-5, 0, array(layer.kernel).shape[1]))
    layer.update_scale()
    model = keras.Sequential([keras.Input((16,)), layer])
    x = np.random.default_rng(1).normal(size=(8, 16)).astype("float32")
    y = np.random.default_rng(2).normal(size=(8, layer.units)).astype("float32")
    for rate, bounds in ((0.01, (0.989, 1.011)), (100.0, (0.0624, None))):
        model.compile(keras.optimizers.Adam(rate), loss="mse")
        before = array(layer.quantized_kernel()[1])
        model.train_on_batch(x, y)
        ratio = array(layer.quantized_kernel()[1]) / before
        assert ratio.min() >= bounds[0] and (bounds[1] is None or ratio.max() <= bounds[1])
        assert np.abs(ratio - 1).max() > 0.9 * min(rate, 0.9)


def test_a_learned_scale_starts_anew_when_it_is_estimated_and_rests_when_it_is_frozen():
    layer = built(usm.QuantizationConfig(bits=4, scale="learned"))
    estimated = array(layer.quantized_kernel()[1])
    layer.scale_gain.assign(1.5 * array(layer.scale_gain))
    np.testing.assert_array_equal(array(layer.quantized_kernel()[1]), np.float32(1.5) * estimated)
    layer.freeze_scale()
    layer.scale_gain.assign(3.0 * array(layer.scale_gain))
    np.testing.assert_array_equal(array(layer.quantized_kernel()[1]), np.float32(1.5) * estimated)
    layer.freeze_scale()
    layer.scale_frozen.assign(0.0)  # thawed, it goes on from there
    np.testing.assert_array_equal(array(layer.quantized_kernel()[1]), np.float32(1.5) * estimated)
    layer.update_scale()
    np.testing.assert_array_equal(array(layer.quantized_kernel()[1]), estimated)


def test_sums_of_integer_codes_stay_within_float16():
    x = np.full((1, 1024), 100, "float32")
    dense = keras.layers.Dense(4, dtype="mixed_float16")
    dense.build(x.shape)
    layer = usm.QuantDense(4, usm.QuantizationConfig(8, form="native"), dtype="mixed_float16")
    layer.build(x.shape)
    kernel = np.abs(np.random.default_rng(0).normal(0, 0.02, (1024, 4)).astype("float32"))
    dense.kernel.assign(kernel)
    layer.kernel.assign(kernel)
    np.testing.assert_allclose(array(layer(x)), array(dense(x)), rtol=0.01)


def test_hard_gradient_of_pruned_weights_is_zero_and_ste_passes():
    x = np.random.default_rng(1).normal(size=(8, 16)).astype("float32")
    hard = built(None, usm.SparsityConfig(gradient="hard"))
    upstream, (gradient, _) = gradients(hard, x)
    np.testing.assert_allclose(gradient, (x.T @ upstream) * array(hard.mask), rtol=1e-4, atol=1e-5)
    ste = built(None, usm.SparsityConfig(gradient="ste"))
    upstream, (gradient, _) = gradients(ste, x)
    np.testing.assert_allclose(gradient, x.T @ upstream, rtol=1e-4, atol=1e-5)


def test_sr_ste_adds_the_decay_of_pruned_weights_and_no_loss_value():
    decay = 0.3
    layer = built(None, usm.SparsityConfig(gradient="sr_ste", sr_ste_decay=decay))
    kernel, mask = array(layer.kernel), array(layer.mask)
    x = np.random.default_rng(1).normal(size=(8, 16)).astype("float32")
    upstream, (gradient, _) = gradients(layer, x)
    np.testing.assert_allclose(gradient, x.T @ upstream + decay * (1 - mask) * kernel, rtol=1e-4, atol=1e-5)
    layer(x, training=True)
    assert float(sum(layer.losses)) == 0.0


def test_every_step_mask_follows_the_kernel_inside_the_step():
    layer = built(None, usm.SparsityConfig(n=2, m=4, every_step=True, gradient="ste"))
    kernel = -array(layer.kernel)[::-1]
    layer.kernel.assign(kernel)
    stale = array(layer.mask)
    gradients(layer, np.ones((2, 16), "float32"))
    fresh = array(layer.mask)
    assert np.any(stale != fresh)
    np.testing.assert_array_equal(fresh, array(nm_mask(np.abs(kernel), 2, 4)))


def test_mask_fade_lets_pruned_weights_through_in_part():
    layer = built(None, "2:4")
    layer.mask_fade.assign(0.25)
    kernel, mask = array(layer.kernel), array(layer.mask)
    np.testing.assert_allclose(array(layer.effective_kernel()), kernel * (mask + (1 - mask) * 0.25), rtol=1e-6)


def test_the_gradient_of_a_fading_weight_fades_with_it_or_is_full_with_ste():
    x = np.random.default_rng(1).normal(size=(8, 16)).astype("float32")
    for gradient, share in (("hard", 0.25), ("ste", 1.0)):
        layer = built(None, usm.SparsityConfig(gradient=gradient))
        layer.mask_fade.assign(0.25)
        upstream, (found, _) = gradients(layer, x)
        expected = (x.T @ upstream) * np.where(array(layer.mask) == 1, 1, share)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bits_in_force_can_be_higher_than_configured_and_float_like():
    layer = built("int2")
    coarse = np.abs(array(layer.effective_kernel()) - array(layer.kernel)).max()
    layer.bits.assign(8)
    assert layer.active_bits == 8
    fine = np.abs(array(layer.effective_kernel()) - array(layer.kernel)).max()
    layer.bits.assign(24)
    np.testing.assert_allclose(array(layer.effective_kernel()), array(layer.kernel), rtol=1e-6, atol=1e-7)
    assert fine < coarse / 10
    with pytest.raises(ValueError, match="no integer codes.*24"):
        layer.quantized_kernel()


def test_scales_are_float32_under_mixed_precision():
    layer = usm.QuantDense(6, quantization="int4", sparsity="2:4", dtype="mixed_bfloat16")
    x = ops.ones((2, 16))
    assert keras.backend.standardize_dtype(layer(x).dtype) == "bfloat16"
    for variable in (layer.kernel, layer.mask):
        assert variable.dtype == "float32"
    assert keras.backend.standardize_dtype(layer.effective_kernel().dtype) == "float32"


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_sixteen_bits_multiply_by_the_scale_that_is_served(dtype):
    """With one input of 1 the output is a row of the effective kernel, rounded once."""
    layer = usm.QuantDense(64, quantization="int4", use_bias=False, dtype=dtype)
    layer.build((None, 16))
    row = array(ops.cast(layer(ops.eye(16))[3], "float32"))
    served = array(layer.effective_kernel())[3]
    np.testing.assert_array_equal(row, array(ops.cast(ops.cast(served, layer.compute_dtype), "float32")))


def test_fit_with_compression_lowers_the_loss():
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(256, 16)).astype("float32")
    y = x @ np.random.default_rng(1).normal(size=(16, 3)).astype("float32")
    model = keras.Sequential([keras.Input((16,)), usm.QuantDense(3, quantization="int4", sparsity="2:4")])
    model.layers[0].update_mask()
    model.compile(keras.optimizers.Adam(0.02), loss="mse")
    losses = model.fit(x, y, epochs=25, batch_size=32, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert int(nm_violations(model.layers[0].effective_kernel(), 2, 4)) == 0


def test_bad_arguments_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="units must be a positive integer, got 0"):
        usm.QuantDense(0)
    with pytest.raises(ValueError, match="6 inputs.*2:4.*sparsity=None"):
        usm.QuantDense(3, sparsity="2:4").build((None, 6))
    with pytest.raises(ValueError, match="multiple of block_size=5"):
        usm.QuantDense(3, usm.QuantizationConfig(form="fake", block_size=5)).build((None, 16))
    with pytest.raises(ValueError, match="sparsity=None"):
        built("int4").update_mask()


@pytest.mark.parametrize(("codebook", "half"), [("symmetric", 0.5), ("midrise", 1.0)])  # half a step, in scales
def test_noise_trains_with_one_integer_step_of_noise_and_serves_the_integers(codebook, half):
    layer = built(usm.QuantizationConfig(bits=4, codebook=codebook, form="noise"), "2:4", inputs=64, units=32)
    identity = np.eye(64, dtype="float32")
    scale = array(layer.quantized_kernel()[1])
    masked, mask = array(layer.masked_kernel()), array(layer.mask)
    first, second = (array(layer(identity, training=True)) for _ in range(2))
    noise = (first - masked) / scale
    assert np.any(first != second)
    assert np.all(noise[mask == 0] == 0) and np.abs(noise).max() <= half + 1e-4
    assert np.std(noise[mask == 1]) == pytest.approx(half / 3**0.5, rel=0.1)
    np.testing.assert_allclose(array(layer(identity)), array(layer.effective_kernel()), rtol=1e-5, atol=1e-6)


def test_penalties_enter_the_training_loss_only():
    layer = built(usm.QuantizationConfig(bits=2, error_loss=0.5, kurtosis_loss=0.25))
    x = np.ones((2, 16), "float32")
    layer(x, training=True)
    error = np.mean((array(layer.kernel) - array(layer.effective_kernel())) ** 2)
    centred = array(layer.kernel) - array(layer.kernel).mean(axis=0)
    kurtosis = (centred**4).mean(axis=0) / (centred**2).mean(axis=0) ** 2
    expected = 0.5 * error + 0.25 * np.mean((kurtosis - 1.8) ** 2)
    assert sum(
        float(array(loss.detach() if hasattr(loss, "detach") else loss)) for loss in layer.losses
    ) == pytest.approx(expected, rel=1e-4)
    layer(x)
    assert not layer.losses


def test_the_largest_code_is_inside_the_range_for_the_gradient_of_a_learned_scale():
    layer = built(usm.QuantizationConfig(2, scale="learned", form="fake"), inputs=4, units=1)
    layer.kernel.assign([[1.0], [-1.0], [0.25], [1.5]])
    layer.kernel_scale.assign([[1.0]])
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    upstream, (gradient, *_) = gradients(layer, x)
    np.testing.assert_allclose(gradient, (x.T @ upstream) * [[1], [1], [1], [0]], rtol=1e-4, atol=1e-5)
