"""CompressedLayer: every kind of kernel is the matrix it should be, and the wrapped layer computes with it."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.testing import TestCase

import keras_usm_lite as usm
from keras_usm_lite.core.nm_mask import nm_mask, nm_violations
from keras_usm_lite.layers.compressed_layer import CompressedLayer

LAYERS = {
    "queries": (lambda: keras.layers.EinsumDense("abc,cde->abde", (None, 2, 4), bias_axes="de"), (2, 5, 8), (8, 8)),
    "outputs": (lambda: keras.layers.EinsumDense("abcd,cde->abe", (None, 6)), (2, 5, 2, 4), (8, 6)),
    "ellipsis": (lambda: keras.layers.EinsumDense("...x,xy->...y", 6, activation="relu"), (2, 3, 5, 8), (8, 6)),
    "per group": (lambda: keras.layers.EinsumDense("bgx,gxy->bgy", (3, 5)), (2, 3, 8), (8, 15)),
    "conv1d": (lambda: keras.layers.Conv1D(6, 3, padding="causal"), (2, 9, 8), (24, 6)),
    "conv2d": (lambda: keras.layers.Conv2D(6, 3, strides=2), (2, 9, 9, 4), (36, 6)),
    "depthwise1d": (lambda: keras.layers.DepthwiseConv1D(5), (2, 9, 8), (5, 8)),
    "depthwise2d": (lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2), (2, 9, 9, 4), (9, 8)),
    "embedding": (lambda: keras.layers.Embedding(10, 8), None, (8, 10)),
}
SPARSE = ("queries", "outputs", "ellipsis", "per group", "conv1d", "conv2d")


def array(tensor):
    return ops.convert_to_numpy(tensor)


def inputs_of(kind):
    shape = LAYERS[kind][1]
    draw = np.random.default_rng(0)
    return draw.integers(10, size=(2, 5)) if shape is None else draw.normal(size=shape).astype("float32")


def wrapped(kind, quantization="int4", sparsity=None):
    keras.utils.set_random_seed(0)
    layer = CompressedLayer(LAYERS[kind][0](), quantization, sparsity)
    layer(inputs_of(kind))
    if sparsity is not None:
        layer.update_mask()
    return layer


@pytest.mark.parametrize("kind", LAYERS)
def test_the_wrapped_layer_computes_with_the_effective_kernel(kind):
    layer = wrapped(kind, "int3", "2:4" if kind in SPARSE else None)
    assert layer.matrix_shape == LAYERS[kind][2]
    plain = LAYERS[kind][0]()
    plain(inputs_of(kind))
    plain.set_weights(layer.layer.get_weights())
    before = array(plain(inputs_of(kind)))
    kernel = plain.embeddings if kind == "embedding" else plain.kernel
    kernel.assign(array(layer.kernel_view.from_matrix(layer.effective_kernel())))
    outputs = array(layer(inputs_of(kind)))
    np.testing.assert_allclose(outputs, array(plain(inputs_of(kind))), rtol=1e-5, atol=1e-5)
    assert np.abs(outputs - before).max() > 1e-3


@pytest.mark.parametrize("kind", SPARSE)
def test_training_makes_masks_in_the_step_adds_penalties_and_noise(kind):
    sparsity = usm.SparsityConfig(2, 4, every_step=True, gradient="ste")
    layer = wrapped(kind, usm.QuantizationConfig(4, form="noise", error_loss=0.5), sparsity)
    layer.assign_matrix(-array(layer.kernel_matrix())[::-1])
    served = array(layer(inputs_of(kind)))
    trained = array(layer(inputs_of(kind), training=True))
    expected = nm_mask(np.abs(array(layer.kernel_matrix())), 2, 4)
    np.testing.assert_array_equal(array(layer.mask), array(expected))
    error = np.mean((array(layer.masked_kernel()) - array(layer.effective_kernel())) ** 2)
    assert [float(loss) for loss in layer.losses] == pytest.approx([0.5 * error], rel=1e-4)
    assert (trained != served).any() and (array(layer(inputs_of(kind), training=True)) != trained).any()


@pytest.mark.parametrize("kind", LAYERS)
def test_every_output_has_its_own_scale_and_pruning_runs_along_the_sum(kind):
    layer = wrapped(kind, "int4", "2:4" if kind in SPARSE else None)
    codes, scale = layer.quantized_kernel()
    assert tuple(scale.shape) == (1, LAYERS[kind][2][1])
    assert np.all(np.abs(array(codes)).max(axis=0) == 7)  # absmax: the largest weight of every output has the last code
    if kind in SPARSE:
        assert int(nm_violations(layer.effective_kernel(), 2, 4)) == 0


@pytest.mark.parametrize("kind", LAYERS)
def test_the_latent_kernel_learns_through_the_rounding(kind):
    layer = wrapped(kind, "int4", "1:4" if kind in SPARSE else None)
    inputs = keras.Input(inputs_of(kind).shape[1:], dtype=str(inputs_of(kind).dtype))
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = array(layer.kernel_matrix())
    model.fit(inputs_of(kind), np.ones(model(inputs_of(kind)).shape), verbose=0)
    moved = array(layer.kernel_matrix()) != before
    assert moved.any()
    if kind in SPARSE:
        assert not moved[array(layer.mask) == 0].any()  # hard gradient


@pytest.mark.parametrize("kind", ["queries", "conv1d", "depthwise1d"])
def test_sixteen_bit_layers_compute_in_sixteen_bits_with_masks_and_scales_in_thirty_two(kind):
    policy = keras.DTypePolicy("mixed_bfloat16")
    plain = LAYERS[kind][0]()
    layer = CompressedLayer(type(plain).from_config({**plain.get_config(), "dtype": policy}), "int4")
    outputs = layer(inputs_of(kind))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    assert {variable.dtype for variable in layer.variables} == {"float32"}
    assert keras.backend.standardize_dtype(layer.effective_kernel().dtype) == "float32"
    np.testing.assert_allclose(
        array(ops.cast(outputs, "float32")), array(wrapped_like(layer, kind)(inputs_of(kind))), rtol=0.05, atol=0.05
    )


def wrapped_like(layer, kind):
    """The same layer in float32."""
    other = wrapped(kind)
    other.layer.set_weights(layer.layer.get_weights())
    return other


@pytest.mark.parametrize("kind", LAYERS)
def test_it_survives_save_and_reload_bit_for_bit(kind, tmp_path):
    layer = wrapped(kind, usm.QuantizationConfig(2, scale="mse"), "2:4" if kind in SPARSE else None)
    layer.update_scale()
    inputs = keras.Input(inputs_of(kind).shape[1:], dtype=str(inputs_of(kind).dtype))
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(array(loaded(inputs_of(kind))), array(model(inputs_of(kind))))
    packed = usm.load_packed(usm.save_packed(model, tmp_path / "model.usm"))
    np.testing.assert_array_equal(array(packed(inputs_of(kind))), array(model(inputs_of(kind))))


def test_masks_of_padding_pass_through_an_embedding():
    layer = CompressedLayer(keras.layers.Embedding(10, 8, mask_zero=True), "int8")
    np.testing.assert_array_equal(array(layer.compute_mask(ops.convert_to_tensor([[3, 0]]))), [[True, False]])


def test_a_layer_that_asks_what_it_wraps_for_its_shape_is_called_on_symbols_again():
    frames = keras.Input((3, 8, 8, 4))
    model = keras.Sequential([frames, keras.layers.TimeDistributed(keras.layers.Conv2D(6, 3, name="convolution"))])
    small = usm.compress(model, {"convolution": ("int8", None)})
    inputs = np.random.default_rng(0).normal(size=(2, 3, 8, 8, 4)).astype("float32")
    np.testing.assert_allclose(array(usm.bake(small)(inputs)), array(small(inputs)), atol=1e-5)
    assert small.compute_output_shape((None, 3, 8, 8, 4)) == (None, 3, 6, 6, 6)


@pytest.mark.parametrize(
    ("equation", "shape", "inputs", "axes"),
    [
        ("abc,cde->abde", (None, 2, 4), (2, 5, 8), (2,)),
        ("abcd,cde->abe", (None, 6), (2, 5, 2, 4), (2, 3)),
        ("...x,xy->...y", 6, (2, 5, 8), (-1,)),
    ],
)
def test_a_token_is_what_an_einsum_sums_over(equation, shape, inputs, axes):
    layer = CompressedLayer(keras.layers.EinsumDense(equation, shape), "int4")
    layer(np.ones(inputs, "float32"))
    assert layer.token_axes() == axes


def test_integer_activations_of_an_einsum_have_one_range_per_token():
    config = usm.QuantizationConfig(bits=8, activations="dynamic")
    layer, plain = wrapped("outputs", config), wrapped("outputs", "int8")
    inputs = inputs_of("outputs") * np.array([1.0, 1000.0]).reshape(2, 1, 1, 1)
    error = np.abs(array(layer(inputs)) - array(plain(inputs)))
    assert 0 < error[0].max() < 0.1  # a range for both rows together would round the small one to nothing


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: keras.layers.Dense(3), {}, "wraps EinsumDense.*got Dense.*use QuantDense"),
        (lambda: keras.layers.Embedding(8, 8), {"sparsity": "2:4"}, "cannot be 2:4 sparse.*Give it sparsity=None"),
        (lambda: keras.layers.DepthwiseConv1D(4), {"sparsity": "2:4"}, "cannot be 2:4 sparse"),
        (lambda: keras.layers.Conv1D(4, 4), {"sparsity": "4:8"}, "has 4 inputs per tap, which sparsity 4:8 cannot"),
        (
            lambda: keras.layers.Conv1D(4, 4),
            {"quantization": usm.QuantizationConfig(activations="dynamic")},
            "cannot have activations='dynamic'.*Give it activations=None",
        ),
    ],
)
def test_what_cannot_be_compressed_is_refused_with_the_fix(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        CompressedLayer(make(), **arguments).build((None, 9, 4))


class LayerContract(TestCase):
    def test_compressed_layer_keeps_every_promise_of_a_keras_layer(self):
        self.run_layer_test(
            CompressedLayer,
            init_kwargs={"layer": keras.layers.Conv1D(4, 3), "quantization": "int4", "sparsity": "2:4"},
            input_shape=(2, 9, 8),
            expected_output_shape=(2, 7, 4),
            expected_num_trainable_weights=2,
            expected_num_non_trainable_weights=5,
            supports_masking=False,
        )
