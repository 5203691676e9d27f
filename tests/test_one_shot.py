"""one_shot: pattern and grid are exact, the outputs suffer less than with magnitude pruning."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_usm_lite as usm
from keras_usm_lite.core.nm_mask import nm_violations
from keras_usm_lite.one_shot import _rounding

RNG = np.random.default_rng(0)
MIXING = RNG.normal(size=(32, 32)) * 0.6 ** np.abs(np.subtract.outer(range(32), range(32)))
INPUTS = (RNG.normal(size=(16, 40, 32)) @ MIXING).astype("float32")
HELD_OUT = (RNG.normal(size=(4, 40, 32)) @ MIXING).astype("float32")


def array(tensor):
    return ops.convert_to_numpy(tensor)


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((40, 32))
    hidden = keras.layers.Dense(64, activation="relu", name="up")(inputs)
    hidden = keras.layers.MultiHeadAttention(2, 16, name="attention")(hidden, hidden)
    return keras.Model(inputs, keras.layers.Dense(32, name="down")(hidden))


PAIRS = [
    ("int4", "2:4"),
    (None, "1:4"),
    (usm.QuantizationConfig(2, scale="mse"), None),
    (usm.QuantizationConfig(2, "midrise", scale="mse"), "2:4"),
    (usm.QuantizationConfig(3, "asymmetric", scale="mse"), "4:8"),
    (usm.QuantizationConfig(3, form="fake", block_size=16), None),
]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def pruned(request):
    """`(quantization, sparsity, float model, compressed by one_shot, what it reports)`, to be read only."""
    quantization, sparsity = request.param
    model = network()
    small = usm.compress(model, {".": (quantization, sparsity)})
    return quantization, sparsity, model, small, usm.one_shot(small, INPUTS)


def test_outputs_suffer_less_than_with_magnitude_and_rounding(pruned):
    quantization, sparsity, model, clever, errors = pruned
    expected = array(model(HELD_OUT))

    def error(small):
        return np.mean((array(small(HELD_OUT)) - expected) ** 2) / np.mean(expected**2)

    plain = usm.compress(model, {".": (quantization, sparsity)})
    if sparsity is not None:
        usm.update_masks(plain)
    assert len(errors) == 6 and all(0 < value < 1 for value in errors.values())
    assert error(clever) < 0.8 * error(plain)


def test_the_pattern_is_obeyed_and_the_file_holds_what_was_chosen(pruned, tmp_path):
    quantization, sparsity, _, small, _ = pruned
    for layer in usm.compressed_layers(small):
        if sparsity is not None:
            assert int(nm_violations(layer.effective_kernel(), layer.sparsity.n, layer.sparsity.m)) == 0
        if quantization is not None:  # latent weights, to train on from, are not those on the grid
            assert np.mean(array(layer.kernel_matrix()) != array(layer.effective_kernel())) > 0.2
    loaded = usm.load_packed(usm.save_packed(small, tmp_path / "small.usm"))
    np.testing.assert_array_equal(array(loaded(HELD_OUT)), array(small(HELD_OUT)))


@pytest.mark.parametrize(
    "quantization", [pair[0] for pair in PAIRS if pair[0]] + [usm.QuantizationConfig(4, "full", per_tensor=True)]
)
def test_rows_are_rounded_as_the_layer_rounds_them(quantization):
    layer = usm.QuantDense(24, quantization)
    layer.build((None, 32))
    weights = RNG.normal(size=(32, 24)).astype("float32")  # many beyond the largest code
    layer.freeze_scale()
    rounded = _rounding(layer)
    found = np.stack([rounded(row, values) for row, values in enumerate(weights)])
    layer.kernel.assign(weights)
    np.testing.assert_allclose(found, array(layer.effective_kernel()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_a_survivor_that_outgrows_its_kernel_is_not_clipped(scale):
    """Both inputs are always equal, so one weight does the work of 1.0 and 0.9; no weight of the kernel is 1.9."""
    layer = usm.QuantDense(1, usm.QuantizationConfig(8, scale=scale), sparsity="1:2", use_bias=False)
    model = keras.Sequential([keras.Input((2,)), layer])
    layer.kernel.assign([[1.0], [0.9]])
    inputs = np.repeat(np.random.default_rng(0).normal(size=(64, 1)), 2, axis=1).astype("float32")
    usm.one_shot(model, inputs, damping=1e-4)
    assert array(layer.effective_kernel()).sum() == pytest.approx(1.9, rel=0.01)


@pytest.mark.parametrize("uses", [1, 2])
def test_a_later_layer_makes_up_for_the_errors_of_earlier_ones(uses):
    """No kernel of the last layer, which is hardly rounded, could do better than the one it gets."""
    keras.utils.set_random_seed(0)
    first, last = keras.layers.Dense(32, activation="relu", name="first"), keras.layers.Dense(8, name="last")
    inputs = hidden = keras.Input((32,))
    for _ in range(uses):  # what a shared layer was must be known when it is used again
        hidden = first(hidden)
    model = keras.Model(inputs, last(hidden))
    tokens = INPUTS.reshape(-1, 32)
    small = usm.compress(model, {"first": (None, "1:4"), "last": ("int8", None)})
    errors = usm.one_shot(small, tokens, damping=1e-6)
    rough, _ = usm.compressed_layers(small)
    hidden = tokens
    for _ in range(uses):
        hidden = array(rough(hidden))
    wanted = array(model(tokens)) - array(last.bias)
    best = hidden @ np.linalg.lstsq(hidden, wanted, rcond=None)[0]
    power, least = np.sum(wanted**2), np.sum((best - wanted) ** 2)
    found = np.sum((array(small(tokens)) - array(last.bias) - wanted) ** 2)
    assert found < 1.01 * least < 0.8 * np.sum((hidden @ array(last.kernel) - wanted) ** 2)
    assert list(errors.values())[-1] == pytest.approx(found / power, rel=0.01)


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_rounding_of_activations_is_made_up_for_too(activations):
    """The float side of the batch is the model before compression: its activations are not rounded."""
    model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(8, name="only")])
    small = usm.compress(model, {"only": (usm.QuantizationConfig(8, activations=activations), None)})
    tokens = INPUTS.reshape(-1, 32)
    if activations == "static":
        small.layers[0].input_low.assign(-0.5)
        small.layers[0].input_high.assign(0.5)  # most inputs are clipped
    else:
        tokens = np.concatenate([tokens[:, 1:], 200 * np.abs(tokens[:, :1])], axis=1)  # beside it the others are lost
    (reported,) = usm.one_shot(small, tokens).values()
    wanted = array(model(tokens))
    true = np.sum((array(small(tokens)) - wanted) ** 2) / np.sum(wanted**2)
    assert reported == pytest.approx(true, rel=0.01)
    if activations == "static":
        clipped = np.clip(tokens, -0.5, 0.5) @ array(model.layers[0].kernel)
        assert true < 0.8 * np.sum((clipped - wanted) ** 2) / np.sum(wanted**2)


def test_masks_and_frozen_scales_of_before_are_part_of_the_model_but_do_not_bind():
    small = usm.compress(network(), {".": (usm.QuantizationConfig(8), "2:4")})
    usm.update_masks(small)
    for layer in usm.compressed_layers(small):
        layer.freeze_scale()
        layer.assign_matrix(array(layer.kernel_matrix()) + 5.0 * (1 - array(layer.mask)))  # pruned long ago
    expected = array(small(HELD_OUT))
    usm.one_shot(small, INPUTS)
    assert np.mean((array(small(HELD_OUT)) - expected) ** 2) < 0.001 * np.mean(expected**2)


def test_pruned_weights_that_a_training_left_fading_are_gone():
    small = usm.compress(network(), {".": (usm.QuantizationConfig(2, "midrise", scale="mse"), "2:4")})
    usm.update_masks(small)
    for layer in usm.compressed_layers(small):
        layer.mask_fade.assign(0.5)
    usm.one_shot(small, INPUTS)
    for layer in usm.compressed_layers(small):
        assert int(nm_violations(layer.effective_kernel(), 2, 4)) == 0


def test_convolutions_get_their_usual_mask_and_scale():
    model = keras.Sequential([keras.Input((40, 32)), keras.layers.Conv1D(8, 3, name="conv")])
    small, plain = (usm.compress(model, {"conv": ("int4", "2:4")}) for _ in range(2))
    usm.update_masks(plain)
    errors = usm.one_shot(small, INPUTS)
    assert 0 < list(errors.values())[0] < 1
    np.testing.assert_array_equal(array(small(HELD_OUT)), array(plain(HELD_OUT)))


def test_a_recogniser_runs_through_with_its_lengths():
    size = {"num_layers": 1, "dim": 8, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": 32}
    model = usm.USMForCTC(5, **size)
    inputs = {"features": INPUTS, "lengths": np.arange(25, 41)}
    rules = {"depthwise": (None, None), "encoder/block": ("int4", "2:4")}
    plain, clever = (usm.compress(model, rules) for _ in range(2))
    usm.update_masks(plain)
    errors = usm.one_shot(clever, inputs)
    assert len(errors) == 10 and all(0 < value < 1 for value in errors.values())
    wanted, rough, fine = (array(found(inputs)) for found in (model, plain, clever))
    assert np.mean((fine - wanted) ** 2) < 0.5 * np.mean((rough - wanted) ** 2)


def test_bad_calls_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="no compressed layers.*usm.compress"):
        usm.one_shot(network(), INPUTS)
    fixed = keras.Sequential([keras.Input((8,), batch_size=4), usm.QuantDense(2)])
    with pytest.raises(ValueError, match=r"takes batches of 4 only.*keras\.Input\(shape\)"):
        usm.one_shot(fixed, np.ones((4, 8)))
    inputs = keras.Input((None, 32))
    hidden = usm.QuantDense(16, name="first")(inputs)
    turned = keras.Model(inputs, usm.QuantDense(2, name="time_major")(ops.transpose(hidden, (1, 0, 2))))
    for frames in (40, 39):
        with pytest.raises(ValueError, match="time_major' do not have the batch as their first axis"):
            usm.one_shot(turned, INPUTS[:, :frames])
    small = usm.compress(network(), {"up": ("int4", "2:4")})
    before = [array(weight) for weight in small.weights]
    with pytest.raises(ValueError, match="inputs of layer .*up' are not finite"):
        usm.one_shot(small, np.full_like(INPUTS, np.inf))
    narrow = keras.Sequential([keras.Input((8,)), usm.QuantDense(2, name="narrow")])
    with pytest.raises(ValueError, match="narrow' sees 1 token, which must be at least 2"):
        usm.one_shot(narrow, np.ones((1, 8)))
    for weight, value in zip(small.weights, before, strict=True):
        np.testing.assert_array_equal(array(weight), value)


def test_layers_of_the_same_path_are_all_settled():
    def part(inputs):
        return keras.Model(inputs, keras.layers.Dense(32, name="d")(inputs))

    inputs = keras.Input((40, 32))
    model = keras.Model(inputs, part(keras.Input((40, 32)))(part(keras.Input((40, 32)))(inputs)))
    small = usm.compress(model, {"d": ("int4", "2:4")})
    errors = usm.one_shot(small, INPUTS)
    assert len(errors) == 2
    assert [float(np.mean(array(layer.mask))) for layer in usm.compressed_layers(small)] == [0.5, 0.5]
