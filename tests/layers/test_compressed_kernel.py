"""CompressedKernel: the state shared by all compressed layers."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.core.scales import mse_scale


def test_state_is_float32_and_not_trainable_except_a_learned_scale():
    config = usm.QuantizationConfig(bits=3, scale="learned")
    layer = usm.QuantDense(4, config, sparsity="2:4")
    layer.build((None, 8))
    names = {v.name: v for v in layer.variables}
    assert set(names) == {"kernel", "bias", "mask", "mask_fade", "bits", "scale_frozen", "kernel_scale", "scale_gain"}
    assert {v.dtype for v in layer.variables} == {"float32"}
    assert {v.name for v in layer.trainable_variables} == {"kernel", "bias", "scale_gain"}


@pytest.mark.parametrize("codebook", ["symmetric", "midrise"])
def test_a_new_mask_refreshes_an_mse_scale_over_the_survivors_only(codebook):
    keras.utils.set_random_seed(3)
    layer = usm.QuantDense(4, usm.QuantizationConfig(bits=2, codebook=codebook, scale="mse"), sparsity="1:4")
    layer.build((None, 32))
    dense_scale = ops.convert_to_numpy(layer.kernel_scale)
    layer.update_mask()
    assert np.all(ops.convert_to_numpy(layer.kernel_scale) > dense_scale)
    kernel, mask = ops.convert_to_numpy(layer.kernel), ops.convert_to_numpy(layer.mask)
    survivors = kernel.T[mask.T == 1].reshape(4, 8).T
    np.testing.assert_allclose(layer.kernel_scale, mse_scale(survivors, 2, codebook)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("estimator", "codebook"),
    [
        ("absmax", "symmetric"),
        ("mse", "symmetric"),
        ("absmax", "asymmetric"),
        ("mse", "asymmetric"),
        ("learned", "full"),
    ],
)
def test_a_frozen_scale_holds_whatever_happens_to_the_kernel(estimator, codebook):
    layer = usm.QuantDense(4, usm.QuantizationConfig(bits=4, scale=estimator, codebook=codebook), sparsity="1:4")
    layer.build((None, 32))
    layer.update_mask()
    before = [ops.convert_to_numpy(v) for v in layer.quantized_kernel()]
    layer.freeze_scale()
    after = [ops.convert_to_numpy(v) for v in layer.quantized_kernel()]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    layer.kernel.assign(2.0 * layer.kernel + 0.3)
    layer.update_mask()
    layer.update_scale()
    if estimator == "learned":
        layer.scale_gain.assign(3.0 * layer.scale_gain)  # an optimizer goes on moving it
    for old, new in zip(before[1:], layer.quantized_kernel()[1:], strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(new), old)


def test_a_learned_scale_stays_positive_and_a_layer_without_scale_has_nothing_to_freeze():
    layer = usm.QuantDense(2, usm.QuantizationConfig(2, scale="learned"))
    layer.build((None, 8))
    assert np.all(ops.convert_to_numpy(layer.scale_gain.constraint(-layer.scale_gain)) > 0)
    usm.NMSparseDense(2, "2:4").freeze_scale()


def test_one_bit_kernel_is_sign_times_mean_magnitude():
    keras.utils.set_random_seed(3)
    layer = usm.QuantDense(4, "int1")
    layer.build((None, 64))
    for factor in (1.0, 0.3):  # the scale follows the kernel through a training
        layer.kernel.assign(factor * layer.kernel)
        kernel = ops.convert_to_numpy(layer.kernel)
        expected = np.where(kernel >= 0, 1, -1) * np.abs(kernel).mean(axis=0)
        np.testing.assert_allclose(ops.convert_to_numpy(layer.effective_kernel()), expected, rtol=1e-5)


def test_the_mean_of_one_bit_is_that_of_survivors():
    keras.utils.set_random_seed(3)
    layer = usm.QuantDense(4, "int1", sparsity="1:4")
    layer.build((None, 64))
    assert not layer.mask_made
    layer.update_mask()
    assert layer.mask_made
    kernel = ops.convert_to_numpy(layer.masked_kernel())
    expected = np.sign(kernel) * np.abs(kernel).sum(axis=0) / 16
    np.testing.assert_allclose(ops.convert_to_numpy(layer.effective_kernel()), expected, rtol=1e-5)


def test_masks_can_be_milder_than_configured_for_schedules_that_prune_step_by_step():
    layer = usm.NMSparseDense(4, "1:4")
    layer.build((None, 16))
    layer.update_mask(n=3)
    assert float(ops.mean(layer.mask)) == 0.75
    layer.update_mask(n=2)
    assert float(ops.mean(layer.mask)) == 0.5


def test_weights_of_another_width_go_on_at_theirs_and_say_so(tmp_path):
    path = tmp_path / "int8.weights.h5"
    keras.Sequential([keras.Input((8,)), usm.QuantDense(4, "int8")]).save_weights(path)
    model = keras.Sequential([keras.Input((8,)), usm.QuantDense(4, "int4")])
    with pytest.warns(UserWarning, match=r"at 8 bits were loaded into layers made for 4.*Schedule.*\(0, 4\)"):
        model.load_weights(path)
    assert model.layers[0].active_bits == 8
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 8)), np.ones((4, 4)), callbacks=[usm.callbacks.QuantizationSchedule([(0, 4)])], verbose=0)
    assert model.layers[0].active_bits == 4
