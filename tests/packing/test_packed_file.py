"""save_packed and load_packed: the same model back, and an error instead of a different one."""

import importlib.util
import itertools
import os
import pathlib
import struct
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops
from safetensors import safe_open

import keras_usm_lite as usm
from keras_usm_lite.packing.packed_reader import PackedReader
from keras_usm_lite.rewrite import layer_path, walk_layers

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
    "float": None,
}
SPARSITIES = [None, "2:4", "1:4", "4:8"]
SIZE = {"num_layers": 1, "dim": 8, "num_heads": 2, "kernel_size": 3, "subsampling_channels": 4, "num_mel_bins": 8}
X = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")


def array(tensor):
    return ops.convert_to_numpy(tensor)


def shaken(model):
    """Give every weight that a training would change a random value, and make the masks."""
    draw = np.random.default_rng(5)
    for weight in model.trainable_variables:
        if weight.name != "scale_gain":
            weight.assign(array(weight) + 0.3 * draw.normal(size=weight.shape))
    usm.update_masks(model)
    return model


def small():
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8,)), usm.QuantDense(4, "int4", sparsity="2:4", name="a"), keras.layers.Dense(2, name="b")]
    return shaken(keras.Sequential(layers, name="small"))


@keras.saving.register_keras_serializable("test_packed_file")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(8, name="first")
        self.rest = [keras.Sequential([keras.layers.Dense(8, name="same")], name=f"part_{i}") for i in range(2)]
        self.norm = keras.layers.BatchNormalization(name="norm")

    def call(self, x, training=None):
        x = self.first(x)
        for part in self.rest:
            x = part(x)
        return self.norm(x, training=training)

    def get_config(self):
        return {"name": self.name}


@pytest.fixture
def packed(tmp_path):
    return usm.save_packed(small(), tmp_path / "small.usm")


def assert_same(loaded, model):
    """The same layers, effective kernels and other variables, bit for bit."""
    assert [type(layer) for layer in walk_layers(loaded)] == [type(layer) for layer in walk_layers(model)]
    pairs = list(zip(usm.compressed_layers(loaded), usm.compressed_layers(model), strict=True))
    for new, old in pairs:
        np.testing.assert_array_equal(array(new.effective_kernel()), array(old.effective_kernel()))
        assert (new.quantization, new.sparsity) == (old.quantization, old.sparsity)
    state = {id(weight) for _, layer in pairs for weight in layer.weights if weight is not layer.bias}
    for new, old in zip(loaded.weights, model.weights, strict=True):
        if id(old) not in state:
            np.testing.assert_array_equal(array(new), array(old), err_msg=old.path)


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_and_outputs_of_every_configuration_come_back_bit_for_bit(name, tmp_path):
    keras.utils.set_random_seed(0)
    choices = [sparsity for sparsity in SPARSITIES if sparsity or CONFIGS[name]]
    layers = [usm.QuantDense(8, CONFIGS[name], sparsity=sparsity, activation="tanh") for sparsity in choices]
    model = shaken(keras.Sequential([keras.Input((8,)), *layers]))
    loaded = usm.load_packed(usm.save_packed(model, tmp_path / "model.usm"))
    assert len(usm.compressed_layers(loaded)) == len(choices)
    assert_same(loaded, model)
    np.testing.assert_array_equal(array(loaded(X)), array(model(X)))


@pytest.mark.parametrize(
    "name,sparsity", [("int4", "2:4"), ("int2 mse", "1:4"), ("int4 blocks", "4:8"), ("int1", None)]
)
def test_a_recogniser_comes_back_bit_for_bit(name, sparsity, tmp_path):
    model = shaken(usm.USMForCTC(5, quantization=CONFIGS[name], sparsity=sparsity, **SIZE))
    loaded = usm.load_packed(usm.save_packed(model, tmp_path / "model.usm"))
    assert_same(loaded, model)


def test_a_recogniser_with_all_configurations_at_once_gives_the_same_logits(tmp_path):
    plain = usm.USMForCTC(5, name="usm", **{**SIZE, "num_layers": 2})
    choices = itertools.cycle(itertools.product(CONFIGS.values(), SPARSITIES[1:]))
    names = [layer_path(layer) for layer in walk_layers(plain) if isinstance(layer, usm.QuantDense)]
    model = shaken(
        usm.compress(plain, {f"^{name}$": next(choices) for name in names if "block" in name or "head" in name})
    )
    loaded = usm.load_packed(usm.save_packed(model, tmp_path / "model.usm"))
    assert_same(loaded, model)
    batch = {"features": np.ones((2, 20, 8), "float32"), "lengths": np.array([20, 9], "int32")}
    np.testing.assert_array_equal(loaded.predict_on_batch(batch), model.predict_on_batch(batch))


def test_a_compressed_subclassed_model_comes_back_bit_for_bit(tmp_path):
    plain = Subclassed(name="subclassed")
    plain(X)
    model = shaken(usm.compress(plain, {"first": ("int4", "2:4"), "part_1": (None, "4:8"), "part_0": ("int2", None)}))
    model.model.norm.moving_mean.assign(np.arange(8.0))
    loaded = usm.load_packed(usm.save_packed(model, tmp_path / "model.usm"))
    assert_same(loaded, model)
    np.testing.assert_array_equal(array(loaded(X)), array(model(X)))


def test_layers_of_the_same_path_are_told_apart(tmp_path):
    inputs = x = keras.Input((8,))
    for name in ("left", "right"):
        part = keras.Input((8,))
        x = keras.Model(part, usm.QuantDense(8, "int4", name="same")(part), name=name)(x)
    model = shaken(keras.Model(inputs, x))
    assert len({layer_path(layer) for layer in usm.compressed_layers(model)}) == 1
    loaded = usm.load_packed(usm.save_packed(model, tmp_path / "model.usm"))
    np.testing.assert_array_equal(array(loaded(X)), array(model(X)))


def test_a_model_in_bfloat16_comes_back(tmp_path):
    kinds = {"dtype": "bfloat16"}
    model = shaken(keras.Sequential([keras.Input((8,)), usm.QuantDense(8, **kinds), keras.layers.Dense(2, **kinds)]))
    loaded = usm.load_packed(usm.save_packed(model, tmp_path / "model.usm"))
    np.testing.assert_array_equal(array(ops.cast(loaded(X), "float32")), array(ops.cast(model(X), "float32")))


def test_the_file_is_the_sum_of_its_parts(tmp_path):
    layers = [keras.Input((64,)), usm.QuantDense(64, "int4", sparsity="2:4"), keras.layers.Dense(4)]
    model = shaken(keras.Sequential(layers))
    path = usm.save_packed(model, tmp_path / "model.usm")
    (contents,) = struct.unpack("<Q", path.read_bytes()[:8])
    codes, patterns = 64 * 64 // 2 * 4 // 8, -(-64 * 64 // 4 // 5) * 13 / 8
    data = codes + np.ceil(patterns) + 4 * (64 + 64) + 4 * (64 * 4 + 4)  # scales and bias, Dense
    with safe_open(path, "numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}
    assert path.stat().st_size == 8 + contents + data + arrays["description"].nbytes
    assert data == pytest.approx(usm.report(model).bytes, rel=0.01)
    assert max(array.nbytes for array in arrays.values()) == codes  # no float kernel of QuantDense


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = small()
    first, second = (usm.save_packed(model, tmp_path / name, archive=True).read_bytes() for name in "ab")
    assert first == second


def wide():
    """A model with something for every option: a sparse float kernel, an embedding, norms, rare patterns."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((8,), dtype="int32"),
        keras.layers.Embedding(50, 64, name="table"),
        usm.QuantDense(128, "int4", sparsity="2:4", name="codes"),
        usm.QuantDense(64, None, sparsity="2:4", name="values"),
        keras.layers.BatchNormalization(name="norm"),
    ]
    model = keras.Sequential(layers, name="wide")
    kernel = model.get_layer("codes").kernel
    kernel.assign(array(kernel) * np.tile([9, 6, 3, 1], 16)[:, None])
    return shaken(model)


TOKENS = np.random.default_rng(0).integers(0, 50, (4, 8)).astype("int32")


@pytest.mark.parametrize("options", [{"archive": True}, {"masks": "positions"}])
def test_other_forms_of_codes_and_masks_reload_bit_for_bit(options, tmp_path):
    model = wide()
    path = usm.save_packed(model, tmp_path / "model.usm", **options)
    loaded = usm.load_packed(path)
    assert_same(loaded, model)
    np.testing.assert_array_equal(array(loaded(TOKENS)), array(model(TOKENS)))
    plain = usm.save_packed(model, tmp_path / "plain.usm").stat().st_size
    assert path.stat().st_size < plain if "archive" in options else path.stat().st_size > plain


def test_an_archive_calls_its_arrays_by_numbers_and_the_description_lists_them_in_order(tmp_path):
    file = PackedReader(usm.save_packed(wide(), tmp_path / "model.usm", archive=True))
    names = [part.name for part in (*file.layers, *file.variables)]
    assert names == [str(number) for number in range(len(names))]


def variables(model):
    return [array(variable).astype("float64") for variable in model.weights]


@pytest.mark.parametrize("others", ["float16", "int8"])
def test_other_tensors_are_rounded_within_their_bound_and_codes_not_at_all(others, tmp_path):
    model = wide()
    path = usm.save_packed(model, tmp_path / "model.usm", others=others)
    assert path.stat().st_size < usm.save_packed(model, tmp_path / "plain.usm").stat().st_size
    loaded = usm.load_packed(path)
    new, old = (next(layer for layer in kind.layers if layer.name == "codes") for kind in (loaded, model))
    np.testing.assert_array_equal(array(new.effective_kernel()), array(old.effective_kernel()))
    new, old = (kind.get_layer("values") for kind in (loaded, model))
    errors = {"values": (array(new.effective_kernel()).T, array(old.effective_kernel()).T)}  # a row for each output
    for variable, rounded, value in zip(model.weights, variables(loaded), variables(model), strict=True):
        if any(name in variable.path for name in ("norm", "table", "bias")):
            errors[variable.path] = rounded, value
    assert len(errors) == 1 + 4 + 1 + 2
    for key, (rounded, value) in errors.items():
        bound = np.maximum(2.0**-11 * np.abs(value), 2.0**-25)
        if others == "int8" and value.ndim > 1:
            bound = np.abs(value).max(axis=-1, keepdims=True) / 254 * (1 + 2.0**-16)
        assert np.all(np.abs(rounded - value) <= bound), key
    assert any(np.any(rounded != value) for rounded, value in errors.values())


@pytest.mark.parametrize("archive", [False, True])
def test_trained_vectors_can_take_8_bits_and_moving_statistics_are_left_as_they_are(archive, tmp_path):
    norm = keras.layers.BatchNormalization(name="batch_norm")
    model = shaken(keras.Sequential([keras.Input((8,)), usm.QuantDense(6, "int4", name="dense"), norm]))
    norm.moving_variance.assign([1e-6, 1.0, 1e-3, 5.0, 2.0, 1e-4])
    path = usm.save_packed(model, tmp_path / "model.usm", archive=archive, vectors="int8")
    assert sorted(part.stored for part in PackedReader(path).variables) == ["float32"] * 2 + ["int8"] * 3
    loaded = usm.load_packed(path)
    new, old = ({"/".join(v.path.split("/")[-2:]): array(v) for v in each.weights} for each in (loaded, model))
    for name in ("batch_norm/moving_mean", "batch_norm/moving_variance"):
        np.testing.assert_array_equal(new[name], old[name])
    for name in ("batch_norm/gamma", "batch_norm/beta", "dense/bias"):
        assert 0 < np.abs(new[name] - old[name]).max() <= np.abs(old[name]).max() / 254 * (1 + 2.0**-16)


@pytest.mark.parametrize(("scales", "bound"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_rounded_scales_move_the_effective_kernels_by_no_more_than_their_bound(scales, bound, tmp_path):
    model = wide()
    loaded = usm.load_packed(usm.save_packed(model, tmp_path / "model.usm", scales=scales))
    new, old = (array(kind.get_layer("codes").effective_kernel()).astype("float64") for kind in (loaded, model))
    assert np.all(np.abs(new - old) <= bound * (1 + 2.0**-20) * np.abs(old)) and np.any(new != old)
    for variable, rounded, value in zip(model.weights, variables(loaded), variables(model), strict=True):
        if any(name in variable.path for name in ("norm", "table", "bias")):
            np.testing.assert_array_equal(rounded, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": "float8"}, "scales='float8' is not supported; choose one of 'float32', 'float16', 'bfloat16'"),
        ({"others": "bfloat16"}, "others='bfloat16' is not supported; choose one of 'float32', 'float16', 'int8'"),
        ({"vectors": "int4"}, "vectors='int4' is not supported; choose one of None, 'float32', 'float16', 'int8'"),
        ({"masks": "bits"}, "masks='bits' is not supported; choose one of 'enumerative', 'positions'"),
        ({"masks": "positions", "archive": True}, "archive=True codes the patterns"),
    ],
)
def test_an_unknown_choice_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        usm.save_packed(small(), tmp_path / "model.usm", **options)
    assert os.listdir(tmp_path) == []


def test_a_number_that_does_not_fit_is_refused_with_the_name_of_its_variable(tmp_path):
    model = small()
    model.get_layer("b").bias.assign([1e6, 0])
    with pytest.raises(ValueError, match="Variable 'small/b/bias': 1e.06 is beyond float16"):
        usm.save_packed(model, tmp_path / "model.usm", others="float16")
    assert os.listdir(tmp_path) == []


def test_a_model_that_was_compressed_again_and_again_reloads(tmp_path):
    sizes = {"num_layers": 1, "dim": 32, "num_heads": 2, "subsampling_channels": 4}
    model, left_out = usm.USMForCTC(9, **sizes), {"depthwise|subsampling/conv": (None, None)}
    for quantization in (None, "int4", "int2"):
        model = usm.compress(model, {**left_out, "encoder/": (quantization, "2:4")})
        usm.update_masks(model)
    assert_same(usm.load_packed(usm.save_packed(model, tmp_path / "model.usm")), model)


def test_a_loaded_model_is_not_compiled_and_can_be_saved_again(packed, tmp_path):
    loaded = usm.load_packed(packed)
    assert not loaded.compiled
    again = usm.load_packed(usm.save_packed(loaded, tmp_path / "again.usm"))
    assert_same(again, small())
    np.testing.assert_array_equal(array(again(X)), array(loaded(X)))


def test_an_unregistered_class_is_found_in_custom_objects(tmp_path):
    class Doubling(keras.layers.Layer):
        def call(self, x):
            return 2 * x

    model = shaken(keras.Sequential([keras.Input((8,)), usm.QuantDense(4), Doubling()]))
    path = usm.save_packed(model, tmp_path / "model.usm")
    with pytest.raises(usm.PackedFileError, match="(?s)cannot be rebuilt from its description.*Doubling"):
        usm.load_packed(path)
    loaded = usm.load_packed(path, custom_objects={"Doubling": Doubling})
    np.testing.assert_array_equal(array(loaded(X)), array(model(X)))


def test_a_model_that_is_not_ready_is_refused_and_leaves_no_file(tmp_path):
    path = tmp_path / "model.usm"
    layer = usm.QuantDense(4, "int4", sparsity="2:4", name="a")
    with pytest.raises(ValueError, match="'model' is not built"):
        usm.save_packed(keras.Sequential([layer], name="model"), path)
    model = keras.Sequential([keras.Input((8,)), layer], name="model")
    with pytest.raises(ValueError, match=r"'model/a'.*usm\.update_masks"):
        usm.save_packed(model, path)
    usm.update_masks(model)
    layer.mask_fade.assign(0.1)
    with pytest.raises(ValueError, match="'model/a'.*still fading"):
        usm.save_packed(model, path)
    assert os.listdir(tmp_path) == []


def test_a_failing_write_leaves_the_old_file_as_it_was(packed, full_disk):
    before = packed.read_bytes()
    with full_disk(1000), pytest.raises(OSError):
        usm.save_packed(small(), packed)
    assert packed.read_bytes() == before
    assert os.listdir(packed.parent) == [packed.name]


def test_a_model_saved_under_one_backend_loads_under_another(tmp_path):
    keras.utils.set_random_seed(0)
    layers = [usm.QuantDense(8, config, sparsity="2:4") for config in CONFIGS.values()]
    model = shaken(keras.Sequential([keras.Input((8,)), *layers]))
    path = usm.save_packed(model, tmp_path / "model.usm")
    program = (
        "import sys, numpy as np, keras_usm_lite as usm\n"
        "from keras import ops\n"
        "layers = usm.compressed_layers(usm.load_packed(sys.argv[1]))\n"
        "np.savez(sys.argv[2], *[ops.convert_to_numpy(layer.effective_kernel()) for layer in layers])\n"
    )
    others = [name for name in ("torch", "jax", "tensorflow") if name != keras.backend.backend()]
    other = next(name for name in others if importlib.util.find_spec(name))  # torch is not among what we install
    environment = {**os.environ, "KERAS_BACKEND": other, "PYTHONPATH": str(pathlib.Path(usm.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program, path, tmp_path / "kernels.npz"], check=True, env=environment)
    with np.load(tmp_path / "kernels.npz") as kernels:
        for kernel, layer in zip(kernels.values(), usm.compressed_layers(model), strict=True):
            np.testing.assert_array_equal(kernel, array(layer.effective_kernel()))


def test_a_missing_file_is_reported_with_its_path(tmp_path):
    for path in (tmp_path / "nothing.usm", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            usm.load_packed(path)


def test_others_may_read_a_packed_file_as_they_may_any_new_file(tmp_path):
    (tmp_path / "any").write_bytes(b"")
    path = usm.save_packed(keras.Sequential([keras.Input((8,)), usm.QuantDense(4)]), tmp_path / "model.usm")
    assert os.stat(path).st_mode == os.stat(tmp_path / "any").st_mode


def test_an_adapted_normalization_reloads_with_the_statistics_it_learned(tmp_path):
    inputs = (5 + 2 * np.random.default_rng(0).normal(size=(64, 8))).astype("float32")
    normalization = keras.layers.Normalization()
    normalization.adapt(inputs)
    model = keras.Sequential([keras.Input((8,)), normalization, usm.QuantDense(4, "int8")])
    reloaded = usm.load_packed(usm.save_packed(model, tmp_path / "model.usm"))
    np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(one(inputs)) for one in (reloaded, model)))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="lookups are layers of TensorFlow")
def test_a_vocabulary_that_a_layer_learned_is_refused_and_one_that_it_was_made_with_reloads(tmp_path):
    def model(lookup):
        layers = [lookup, keras.layers.Embedding(5, 4), usm.QuantDense(4, "int8")]
        return keras.Sequential([keras.Input((3,), dtype="int64"), *layers])

    learned, words = keras.layers.IntegerLookup(), np.array([[7, 8, 9]])
    learned.adapt(words)
    with pytest.raises(ValueError, match=r"integer_lookup.* keeps vocabulary.txt beside its weights.*vocabulary="):
        usm.save_packed(model(learned), tmp_path / "learned.usm")
    assert not (tmp_path / "learned.usm").exists()
    given = model(keras.layers.IntegerLookup(vocabulary=[7, 8, 9]))
    reloaded = usm.load_packed(usm.save_packed(given, tmp_path / "given.usm"))
    np.testing.assert_array_equal(*(np.array(one(words)) for one in (reloaded, given)))
