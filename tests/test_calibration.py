"""Calibration: the layers know what came in, and nothing else changes."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.calibration import input_matrix
from keras_usm_lite.layers.compressed_layer import CompressedLayer

WANDA = usm.SparsityConfig(2, 4, score="activation")
STATIC = usm.QuantizationConfig(8, activations="static")
RNG = np.random.default_rng(0)
BATCHES = [RNG.normal(size=(4, 6, 8)).astype("float32") * np.arange(1, 9) for _ in range(3)]


def array(tensor):
    return ops.convert_to_numpy(tensor)


@keras.saving.register_keras_serializable(package="test_calibration")
class Held(keras.Model):
    """Subclassed, with its layers in a list."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.held = [keras.layers.Dense(8, activation="tanh", name="first"), keras.layers.Dense(3, name="second")]

    def call(self, inputs):
        for layer in self.held:
            inputs = layer(inputs)
        return inputs

    def get_config(self):
        return {"name": self.name}


def functional():
    inputs = keras.Input((6, 8))
    hidden = keras.layers.Dense(8, activation="tanh", name="first")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="second")(hidden))


def compressed(make, quantization=STATIC, sparsity=WANDA):
    keras.utils.set_random_seed(0)
    model = make()
    model(BATCHES[0])
    return usm.compress(model, {".": (quantization, sparsity)})


@pytest.mark.parametrize("make", [functional, Held])
def test_norms_and_ranges_are_those_of_the_inputs_of_each_layer(make):
    model = compressed(make)
    seen = np.concatenate(BATCHES).reshape(-1, 8)
    first, second = usm.compressed_layers(model)
    hidden = np.tanh(seen @ array(first.effective_kernel()) + array(first.bias))
    before = [array(weight) for weight in model.weights if "input_" not in weight.path]
    assert usm.calibrate(model, BATCHES) == 2
    for layer, inputs in ((first, seen), (second, hidden)):
        np.testing.assert_allclose(array(layer.input_norm), np.sqrt(np.mean(inputs**2, axis=0)), rtol=1e-4)
        np.testing.assert_allclose([layer.input_low, layer.input_high], [inputs.min(), inputs.max()], rtol=1e-4)
    for old, new in zip(before, [w for w in model.weights if "input_" not in w.path], strict=True):
        np.testing.assert_array_equal(old, array(new))


def test_wanda_keeps_the_weights_with_the_largest_product_of_magnitude_and_norm():
    model = compressed(functional, None)
    usm.calibrate(model, BATCHES)
    usm.update_masks(model)
    layer = usm.compressed_layers(model)[0]
    norm = np.sqrt(np.mean(np.concatenate(BATCHES).reshape(-1, 8) ** 2, axis=0))
    scores = np.abs(array(layer.kernel)) * norm[:, None]
    rank = np.argsort(np.argsort(-scores.reshape(2, 4, 8), axis=1), axis=1)
    np.testing.assert_array_equal(array(layer.mask), (rank < 2).reshape(8, 8))
    magnitude = compressed(functional, None, "2:4")
    usm.update_masks(magnitude)
    assert np.any(array(usm.compressed_layers(magnitude)[0].mask) != array(layer.mask))


def test_wanda_prunes_with_less_output_error_than_magnitude_where_inputs_differ_in_size():
    def error(sparsity):
        model = keras.Sequential([keras.Input((6, 8)), usm.NMSparseDense(64, sparsity)])
        model.layers[0].kernel.assign(np.random.default_rng(0).normal(size=(8, 64)))
        before = [array(model(batch)) for batch in BATCHES]
        if sparsity is WANDA:
            usm.calibrate(model, BATCHES)
        usm.update_masks(model)
        return sum(np.sum((array(model(batch)) - old) ** 2) for batch, old in zip(BATCHES, before, strict=True))

    assert error(WANDA) < 0.9 * error(usm.SparsityConfig(2, 4))


def test_static_activations_are_float_until_calibrated_and_clipped_to_the_range_afterwards():
    model, plain = compressed(functional, STATIC, None), compressed(functional, "int8", None)
    for new, old in zip(usm.compressed_layers(plain), usm.compressed_layers(model), strict=True):
        new.kernel.assign(array(old.kernel))
    np.testing.assert_array_equal(array(model(BATCHES[0])), array(plain(BATCHES[0])))
    usm.calibrate(model, BATCHES)
    difference = np.abs(array(model(BATCHES[0])) - array(plain(BATCHES[0])))
    assert 0 < difference.max() < 0.5
    far = 100 * BATCHES[0][:1]
    assert np.abs(array(model(far)) - array(plain(far))).max() > 0.5


def test_calibration_survives_save_and_reload(tmp_path):
    model = compressed(functional)
    usm.calibrate(model, BATCHES)
    usm.update_masks(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(array(loaded(BATCHES[0])), array(model(BATCHES[0])))
    assert usm.update_masks(loaded) == 0


def test_a_recogniser_is_calibrated_with_its_lengths():
    size = {"num_layers": 1, "dim": 8, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": 8}
    model = usm.USMForCTC(5, sparsity=WANDA, **size)
    batch = {"features": BATCHES[0].repeat(2, axis=1), "lengths": np.array([12, 12, 8, 8])}
    assert usm.calibrate(model, [batch]) == 11
    assert all(np.any(array(layer.input_norm) != 1.0) for layer in usm.compressed_layers(model))


def test_a_batched_einsum_gets_its_range():
    model = keras.Sequential([keras.Input((2, 8)), keras.layers.EinsumDense("bgx,gxy->bgy", (2, 5))])
    small = usm.compress(model, {".": (STATIC, None)})
    inputs = RNG.normal(size=(6, 2, 8)).astype("float32")
    assert usm.calibrate(small, [inputs[:2], inputs[2:]]) == 1
    (layer,) = usm.compressed_layers(small)
    assert (float(layer.input_low), float(layer.input_high)) == (inputs.min(), inputs.max())


def test_an_einsum_sees_the_matrix_that_its_kernel_multiplies():
    layer = CompressedLayer(keras.layers.EinsumDense("abcd,cde->abe", (None, 6)), "int8")
    inputs = RNG.normal(size=(2, 5, 2, 4)).astype("float32")
    outputs = array(layer(inputs)).reshape(-1, 6)
    np.testing.assert_allclose(
        input_matrix(layer, inputs) @ array(layer.effective_kernel()), outputs, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "batches", "message"),
    [
        (("int4", "2:4"), BATCHES, "No layer needs calibration. Use SparsityConfig"),
        ((None, WANDA), [], "batches is empty"),
        ((None, WANDA), [np.full((1, 6, 8), np.nan, "float32")], "inputs of layer 'first' are not finite"),
    ],
)
def test_bad_calibration_is_refused_with_the_reason(arguments, batches, message):
    with pytest.raises(ValueError, match=message):
        usm.calibrate(compressed(functional, *arguments), batches)


def test_activation_scores_of_a_convolution_are_refused():
    model = keras.Sequential([keras.Input((6, 8)), keras.layers.Conv1D(4, 3, name="conv")])
    with pytest.raises(ValueError, match="/conv cannot have score='activation'.*score='magnitude'"):
        usm.calibrate(usm.compress(model, {"conv": (None, WANDA)}), BATCHES)


def test_a_second_calibration_is_not_clipped_by_the_first():
    model, fresh = compressed(functional, STATIC, None), compressed(functional, STATIC, None)
    usm.calibrate(model, [0.1 * batch for batch in BATCHES])
    for calibrated in (model, fresh):
        usm.calibrate(calibrated, BATCHES)
    for again, once in zip(usm.compressed_layers(model), usm.compressed_layers(fresh), strict=True):
        np.testing.assert_allclose([again.input_low, again.input_high], [once.input_low, once.input_high], rtol=1e-5)


@pytest.mark.parametrize(("batches", "message"), [([], "empty"), ([BATCHES[0] * np.nan], "not finite")])
def test_a_calibration_that_fails_leaves_the_earlier_one(batches, message):
    model = compressed(functional, STATIC, None)
    usm.calibrate(model, BATCHES)
    ranges = [[float(layer.input_low), float(layer.input_high)] for layer in usm.compressed_layers(model)]
    assert np.all(np.array(ranges)[:, 1] > 0)
    with pytest.raises(ValueError, match=message):
        usm.calibrate(model, batches)
    assert [[float(layer.input_low), float(layer.input_high)] for layer in usm.compressed_layers(model)] == ranges
